"""Scale the channels between layers so that those with much in them are rounded more finely; the same function.

A column of a weight matrix that meets large activations deserves a finer grid than its neighbours in the group, and
they share a scale. Multiplied by s > 1 it gets one: relative to its values, the rounding error of the group shrinks.
What the layer sees must then be divided by s, which costs nothing where the channel comes out of something linear (AWQ,
arXiv 2306.00978, section 3.2; SmoothQuant, arXiv 2211.10438):

    an RMSNorm       its weight / s      all layers that read it, columns * s
    value heads      their rows / s      the output projection; query heads with one value head share its s
    up projection    its rows / s        the down projection

With ``H_jj`` the layer's Hessian, ``s_j`` is ``H_jj^(e/2)`` over its geometric mean: the root mean square of the
channel, weighted as the solver weighs tokens, to the power e. A block is scaled when its Hessians are known, just
before it is solved, and without a look at any other part of the model.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matgptq.core.output_hessian import OutputHessian
from matgptq.models.blocks import Block, expand_paths
from matgptq.models.families import ChannelSites
from matgptq.models.model_config import key_value_heads

_LARGEST = 16.0  # of all scales and their inverses
_ROWS_AT_A_TIME = 256  # of a Hessian


def scaled_tensors(sites: ChannelSites, blocks: Sequence[Block]) -> frozenset[str]:
    """Names of all parameters that are changed; a bias among them may not exist in this model."""
    names: set[str] = set()
    for block in blocks:
        quantized = {path for group in block.inputs for path, _ in group}
        for norm, readers in _norms(block.module, sites, quantized):
            names |= {f"{block.name}.{path}.weight" for path in (norm, *readers)}
        for producer, _ in _pairs(block.module, sites, quantized):
            names |= {f"{block.name}.{producer}.{part}" for part in ("weight", "bias")}
    return frozenset(names)


@torch.no_grad()
def scale_channels(
    block: Block,
    sites: ChannelSites,
    hessians: Sequence[Tensor],
    config: Any,
    exponent: float,
    outputs: Mapping[str, OutputHessian] | None = None,
) -> None:
    """Scale a block in place, and its Hessians, which are those of the scaled inputs and outputs then.

    Norms are left with weights that bfloat16 holds, and the layers that read them get exactly what those have lost.
    Where one of these is kept at full precision, scales are powers of two, which round nothing in it.

    Args:
        block: at full precision, all its weights there.
        sites: of its family.
        hessians: for each of ``block.inputs``, float32 ``[in, in]``; one that is not finite scales nothing. Groups with
            one input may share a tensor.
        config: of the language model.
        exponent: e above.
        outputs: Hessians of the outputs of layers, by full name.
    """
    group_of = {path: number for number, group in enumerate(block.inputs) for path, _ in group}
    scaled: set[int] = set()

    def divide(paths: Sequence[str], scales: Tensor) -> None:
        for path in paths:
            block.module.get_submodule(path).weight.data.mul_(scales)  # type: ignore[operator]
            hessian = hessians[group_of[path]] if path in group_of else None
            if hessian is not None and id(hessian) not in scaled:
                scaled.add(id(hessian))
                _divide_both_sides(hessian, scales)

    for norm, readers in _norms(block.module, sites, group_of.keys()):
        groups = sorted({group_of[path] for path in readers if path in group_of})
        seen = [hessians[number].diagonal() for number in groups]
        known = [diagonal for diagonal in seen if bool(torch.isfinite(diagonal).all())]
        if known:
            scales = channel_scales(torch.stack(known).mean(0), exponent)
            if any(path not in group_of for path in readers):
                scales = scales.log2().round_().exp2()
            divide(readers, _divide_norm(block.module.get_submodule(norm), scales, sites.norm_unit))
    for producer, reader in _pairs(block.module, sites, group_of.keys()):
        if producer == sites.values and getattr(config, "clip_qkv", None) is not None:
            continue
        energy = hessians[group_of[reader]].diagonal()
        if not bool(torch.isfinite(energy).all()):
            continue
        if producer == sites.values:
            queries, heads = config.num_attention_heads, key_value_heads(config)
            shape = (heads, queries // heads, len(energy) // queries)
            rows = channel_scales(energy.view(shape).mean(1).flatten(), exponent)
            columns = rows.view(heads, 1, -1).expand(shape).flatten()
        else:
            rows = columns = channel_scales(energy, exponent)
        _divide_rows(block.module.get_submodule(producer), rows)
        name = f"{block.name}.{producer}"
        if outputs and name in outputs:
            outputs[name].divide_outputs(name, rows)
        divide([reader], columns)


def channel_scales(energy: Tensor, exponent: float) -> Tensor:
    """``s`` of channels with these mean squares, float32; 1 for those that are always zero."""
    alive = energy > 0
    logarithms = torch.where(alive, energy, 1.0).double().log() * (exponent / 2)
    if bool(alive.any()):
        logarithms -= logarithms[alive].mean()
    logarithms[~alive] = 0
    return logarithms.exp().clamp_(1 / _LARGEST, _LARGEST).float()


def _divide_norm(norm: Any, scales: Tensor, unit: float) -> Tensor:
    """Divide what an RMSNorm multiplies by; returns by how much after rounding, 1 where that cannot be said."""
    weight = norm.weight.data
    offset = 1 - unit
    gain = weight.float() + offset
    divided = (gain / scales - offset).to(torch.bfloat16).to(weight.dtype)
    new = divided.float() + offset
    took = gain / new
    usable = torch.isfinite(took) & (took > 0) & (took < 2 * _LARGEST)
    weight.copy_(torch.where(usable, divided, weight))
    return torch.where(usable, took, 1.0)


def _divide_rows(linear: Any, scales: Tensor) -> None:
    """Divide the last rows of a Linear, and their bias."""
    linear.weight.data[-len(scales) :].div_(scales.unsqueeze(1))
    if linear.bias is not None:
        linear.bias.data[-len(scales) :].div_(scales)


def _divide_both_sides(hessian: Tensor, scales: Tensor) -> None:
    """``diag(1/s) H diag(1/s)``, symmetric to the last bit."""
    inverse = 1 / scales
    for first in range(0, len(hessian), _ROWS_AT_A_TIME):
        rows = slice(first, first + _ROWS_AT_A_TIME)
        hessian[rows].mul_(inverse[rows].unsqueeze(1) * inverse)


def _norms(block: nn.Module, sites: ChannelSites, quantized: Container[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Norms inside a block and what reads them, but for those that a layer reads which is to stay as it is."""
    for norm, named in sites.norms:
        readers = expand_paths(block, named)
        kept = expand_paths(block, sites.kept)
        if len(readers) > len(kept) and all(path in quantized or path in kept for path in readers):
            yield norm, readers


def _pairs(block: nn.Module, sites: ChannelSites, quantized: Container[str]) -> Iterator[tuple[str, str]]:
    """Producer and reader of the channels inside a block, those of experts one by one, if both are quantized."""
    for producer, reader in sites.pairs:
        for pair in zip(expand_paths(block, [producer]), expand_paths(block, [reader]), strict=True):
            if all(path in quantized for path in pair):
                yield pair
