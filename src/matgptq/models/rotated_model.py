"""Rotate a model's weights so that outliers spread over all channels and the model stays the same function.

The RMSNorm weights g move into the Linears that read them, the residual stream is rotated by an orthogonal Q, and the
value heads by an orthogonal R each (SliceGPT, arXiv 2401.15024; QuaRot, arXiv 2404.00456, sections 4.1 and 4.2):

    readers of a norm   W diag(g) Q            embedding   E Q
    writers             Q^T W                  head        W diag(g_final) Q
    values              R^T W, per head        outputs     W blockdiag(R)

An RMSNorm commutes with Q once its weights are all 1. Nothing is computed at inference that was not before.

A block is rotated without looking at any other part of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from matgptq.core.rotation import Rotation, make_factors, random_signs
from matgptq.errors import UnsupportedModelError
from matgptq.models.blocks import Block, capture_inputs, complete, expand_paths, run_block
from matgptq.models.families import Family, RotationSites
from matgptq.models.logits import output_head
from matgptq.models.model_config import head_dim, key_value_heads
from matgptq.models.residency import Residency

_CHECKED_TOKENS = 128
_ROWS_AT_A_TIME = 8192  # of embedding and head, whose float64 copies would be the largest tensors of all
# Largest relative change of the logits (root mean square) that rounding explains; a wrong rotation changes all of it.
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.2}


@dataclass(frozen=True)
class ModelRotation:
    """All orthogonal matrices of one model.

    Attributes:
        residual: Q, ``[hidden, hidden]``.
        heads: for each block the R of its value heads, ``[width, width]`` with signs ``[value heads, 1, width]``.
    """

    residual: Rotation
    heads: tuple[Rotation, ...]


def make_rotation(config: Any, seed: int) -> ModelRotation:
    """The rotation of a model with this ``config``; the same seed gives the same one."""
    generator = torch.Generator().manual_seed(seed)
    hidden, values, width = config.hidden_size, key_value_heads(config), head_dim(config)
    residual = Rotation(make_factors(hidden, generator), random_signs(hidden, generator=generator))
    factors = make_factors(width, generator)
    signs = [random_signs(values, 1, width, generator=generator) for _ in range(config.num_hidden_layers)]
    return ModelRotation(residual, tuple(Rotation(factors, each) for each in signs))


def rotation_sites(family: Family, model_type: str) -> RotationSites:
    """What a rotation changes; raises ``UnsupportedModelError`` where it would make another model of it."""
    if isinstance(family.rotation, str):
        raise UnsupportedModelError(
            f"model type {model_type!r} cannot be rotated: {family.rotation}; do without --rotate"
        )
    return family.rotation


def rotated_tensors(sites: RotationSites, blocks: Sequence[Block]) -> frozenset[str]:
    """Names of all parameters that a rotation changes; a bias among them may not exist in this model."""
    names = {f"{path}.weight" for path in (sites.embedding, sites.final_norm, sites.head)}
    for block in blocks:
        inside = sites_inside(sites, block.module)
        readers = [path for _, paths in inside.norms for path in paths]
        changed = [*(norm for norm, _ in inside.norms), *readers, *inside.writers, inside.outputs]
        names |= {f"{block.name}.{path}.weight" for path in changed}
        names |= {f"{block.name}.{path}.bias" for path in (*inside.writers, inside.values)}
    return frozenset(names)


def sites_inside(sites: RotationSites, block: nn.Module) -> RotationSites:
    """The sites that a block has, those of experts one by one."""
    norms = tuple((norm, expand_paths(block, paths)) for norm, paths in sites.norms)
    return replace(sites, norms=norms, writers=expand_paths(block, sites.writers))


@torch.no_grad()
def rotate_model(residency: Residency, family: Family, blocks: Sequence[Block], seed: int) -> float:
    """Rotate a model in place and check that it still computes the same.

    Args:
        residency: of a causal language model in eval mode. A head that is tied to the embedding gets a tensor of its
            own, because the final norm's weights move into the head alone. Blocks that are not in memory are rotated
            whenever they are filled.
        family: of the model.
        blocks: all its blocks in order.
        seed: of the rotation.

    Returns:
        The relative change of the logits, root mean square, on random tokens.

    Raises:
        UnsupportedModelError: the family has no exact rotation, parts of the model share a tensor that the rotation
            changes, or the logits changed by more than rounding explains.
    """
    model = residency.network
    sites = rotation_sites(family, model.config.model_type)
    _untie_head(model, sites)
    _check_shared(model, rotated_tensors(sites, blocks))
    tokens = torch.randint(
        model.config.vocab_size, (1, _CHECKED_TOKENS), generator=torch.Generator().manual_seed(seed)
    ).to(model.device)
    before = _logits(residency, blocks, tokens)
    rotation = make_rotation(model.config, seed)
    rotate_ends(model, sites, rotation.residual)

    def rotate(index: int, block: Block) -> None:
        rotate_block(block.module, sites, rotation.residual, rotation.heads[index])

    residency.change(blocks, rotate)
    after = _logits(residency, blocks, tokens)
    change = float((after - before).norm() / before.norm())
    if not change <= _TOLERANCES[model.dtype]:
        raise UnsupportedModelError(
            f"rotated, this {model.config.model_type} model computes something else: its logits change by {change:.1e} "
            f"where rounding to {str(model.dtype).removeprefix('torch.')} explains {_TOLERANCES[model.dtype]:.0e}; "
            "do without --rotate"
        )
    return change


def _logits(residency: Residency, blocks: Sequence[Block], tokens: Tensor) -> Tensor:
    """float64 ``[1, seqlen, vocabulary]``, one block in memory at a time."""
    inputs = capture_inputs(residency.network, blocks, tokens)
    hidden = inputs.hidden[0]
    for block, arguments in zip(blocks, inputs.arguments, strict=True):
        with residency.present(block):
            hidden = run_block(block, hidden, arguments)
    head = output_head(residency.network, blocks)
    return head(complete(residency.network, blocks, hidden)).double()


def rotate_ends(model: Any, sites: RotationSites, residual: Rotation) -> None:
    """Rotate the embedding and the head, which takes the final norm's weights; the head must not be tied."""
    embedding, head = model.get_submodule(sites.embedding), model.get_submodule(sites.head)
    norm = model.get_submodule(sites.final_norm)
    gain = _gain(norm, sites)
    for parameter, weights in ((embedding.weight, torch.ones_like(gain)), (head.weight, gain)):
        for rows in parameter.split(_ROWS_AT_A_TIME):
            rows.copy_(residual.apply(rows.double() * weights))
    norm.weight.fill_(sites.norm_unit)


def rotate_block(block: nn.Module, sites: RotationSites, residual: Rotation, heads: Rotation) -> None:
    """Rotate one block in place; every weight is rounded once.

    Args:
        block: the module, all its weights there.
        sites: of its family.
        residual: Q, the same for all blocks.
        heads: R of this block's value heads.
    """
    sites = sites_inside(sites, block)
    gains = {path: _gain(block.get_submodule(norm), sites) for norm, paths in sites.norms for path in paths}
    for path in dict.fromkeys((*gains, *sites.writers, sites.values, sites.outputs)):
        linear: Any = block.get_submodule(path)
        weight, bias = linear.weight.double(), getattr(linear, "bias", None)  # a router has none
        bias = None if bias is None else bias.double()
        if path in gains:
            weight = residual.apply(weight * gains[path])
        if path == sites.outputs:
            weight = _rotate_head_columns(weight, heads)
        if path in sites.writers:
            weight = residual.apply(weight.T).T
            bias = None if bias is None else residual.apply(bias)
        if path == sites.values:
            weight = _rotate_head_rows(weight, heads)
            bias = None if bias is None else _rotate_head_rows(bias.unsqueeze(1), heads).squeeze(1)
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    for norm, _ in sites.norms:
        unit: Any = block.get_submodule(norm)
        unit.weight.fill_(sites.norm_unit)


def _gain(norm: Any, sites: RotationSites) -> Tensor:
    """float64 ``[hidden]``, what an RMSNorm multiplies its channels with."""
    gain: Tensor = norm.weight.double() + (1 - sites.norm_unit)
    return gain


def _rotate_head_columns(weight: Tensor, heads: Rotation) -> Tensor:
    """``W blockdiag(R)`` of ``[out, query heads * width]``: a query head mixes values of the head that it shares."""
    values, _, width = heads.signs.shape
    return heads.apply(weight.view(len(weight), values, -1, width)).reshape(weight.shape)


def _rotate_head_rows(weight: Tensor, heads: Rotation) -> Tensor:
    """``blockdiag(R)^T W`` of the last ``value heads * width`` rows; the others stay."""
    values, _, width = heads.signs.shape
    others, rows = weight[: -values * width], weight[-values * width :]
    rotated = heads.apply(rows.view(values, width, -1).transpose(1, 2)).transpose(1, 2)
    return torch.cat([others, rotated.reshape(rows.shape)])


def _untie_head(model: Any, sites: RotationSites) -> None:
    head = model.get_submodule(sites.head)
    if head.weight is model.get_submodule(sites.embedding).weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys()


def _check_shared(model: Any, rotated: frozenset[str]) -> None:
    """Refuse a tensor under two names, which would be rotated twice."""
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(parameter), name)
        if owner != name and rotated & {owner, name}:
            raise UnsupportedModelError(f"{owner} and {name} are one tensor, so they cannot be rotated apart")
