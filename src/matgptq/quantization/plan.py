"""What a run is going to do, decided and checked before the first calibration token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matgptq.core.grid import resolve_group_size
from matgptq.core.output_hessian import matrix_bytes
from matgptq.errors import ConfigurationError
from matgptq.models.blocks import Block, find_blocks
from matgptq.models.families import find_family
from matgptq.models.model_config import check_window, longest_window
from matgptq.nested_weight import SCALE_BITS
from matgptq.recipe import PER_CHANNEL, Recipe
from matgptq.text.self_text import CPU_SELF_SEQLEN
from matgptq.text.windows import takes_self

DEFAULT_NSAMPLES = 128
DEFAULT_SEQLEN = 2048
# A CPU sees about a thousandth of a GPU's tokens per second; this keeps a small model to minutes.
CPU_NSAMPLES = 16
_OUTPUT_HESSIAN_BYTES = 1 << 31  # of all blocks; of larger models a quarter of their layers in 16 bits


@dataclass(frozen=True)
class CalibrationRequest:
    """What the user said about calibration; None stands for a default that depends on the device."""

    dataset: str | Path | Tensor
    nsamples: int | None
    seqlen: int | None


@dataclass(frozen=True)
class LayerPlan:
    """One layer that will be quantized."""

    name: str
    out_features: int
    in_features: int
    group_size: int


@dataclass(frozen=True)
class Plan:
    """A run in which everything that can be refused has been.

    Attributes:
        blocks: the blocks in order, holding only the layers that will be quantized.
        layers: those layers by full name, in the order of the forward pass.
        kept: Linear layers that stay at full precision.
        group_size: as asked for.
        nsamples: calibration windows; 0 when the recipe needs none.
        seqlen: tokens in each.
        rows_together: at most in a block of an output Hessian; 0 when the recipe solves each row alone.
        expert_share: of a block's experts, those that a token is given to; 1 without experts.
        notes: reduced defaults and layers that fell back to smaller groups, for the user.
    """

    blocks: tuple[Block, ...]
    layers: Mapping[str, LayerPlan]
    kept: tuple[str, ...]
    group_size: int
    nsamples: int
    seqlen: int
    rows_together: int
    expert_share: float
    notes: tuple[str, ...]

    def stored_bytes(self, recipe: Recipe) -> int:
        """Bytes that codes and scales will take in the checkpoint."""
        sets = len(recipe.scale_bits)
        return sum(
            layer.out_features * (layer.in_features + sets * layer.in_features // layer.group_size * SCALE_BITS // 8)
            for layer in self.layers.values()
        )


def make_plan(
    network: Any, recipe: Recipe, request: CalibrationRequest, ignore: tuple[str, ...], device: torch.device
) -> Plan:
    """Decide what will be quantized and how, or refuse.

    Args:
        network: the model; may be without weights.
        recipe: method and ingredients.
        request: calibration text and its amount.
        ignore: names or ``*`` patterns of Linear layers to leave alone.
        device: where the model will run.

    Raises:
        UnsupportedModelError: unknown architecture, or a layer that no group size fits.
        ConfigurationError: nothing is left to quantize, or windows are longer than the model allows.
    """
    family = find_family(network.config.model_type)
    _check_ignored(network, ignore)
    blocks = tuple(_without(block, ignore) for block in find_blocks(network, family))
    layers: dict[str, LayerPlan] = {}
    for block in blocks:
        for name, linear in block.layers():
            group_size = resolve_group_size(name, linear.in_features, recipe.group_size)
            layers[name] = LayerPlan(name, linear.out_features, linear.in_features, group_size)
    if not layers:
        raise ConfigurationError(f"--ignore {','.join(ignore)} leaves no layer to quantize")
    kept = tuple(
        name for name, module in network.named_modules() if isinstance(module, nn.Linear) and name not in layers
    )
    nsamples, seqlen, notes = _calibration_size(network, recipe, request, device)
    together = _rows_together(blocks, recipe)
    if together < recipe.rows_together and recipe.joins_rows:
        notes += [f"at most {together:,} rows are solved together, or their matrices would be large beside the layers"]
    every_note = (*notes, *_group_notes(layers, recipe))
    share = _expert_share(network, blocks)
    return Plan(blocks, layers, kept, recipe.group_size, nsamples, seqlen, together, share, every_note)


def output_hessian_bytes(blocks: Sequence[Block], most: int) -> int:
    """What the output Hessians of all blocks take, with at most so many rows together."""
    return sum(matrix_bytes([*rows.values()], most) for block in blocks for rows in block.joined_rows())


def _rows_together(blocks: Sequence[Block], recipe: Recipe) -> int:
    """Rows that are solved together: fewer than asked for where their matrices would be large beside the layers.

    By the model alone: what a run makes must not depend on the machine.
    """
    if not recipe.joins_rows:
        return 0
    weights = sum(layer.weight.numel() for block in blocks for group in block.ordinary_inputs() for _, layer in group)
    most, room = recipe.rows_together, max(_OUTPUT_HESSIAN_BYTES, weights // 2)
    while most > 1 and output_hessian_bytes(blocks, most) > room:
        most //= 2
    return most


def _expert_share(network: Any, blocks: Sequence[Block]) -> float:
    for block in blocks:
        if block.experts is not None:
            experts: Any = block.module.get_submodule(block.experts)
            return float(network.config.num_experts_per_tok / len(experts))
    return 1.0


def _check_ignored(network: Any, ignore: tuple[str, ...]) -> None:
    """Refuse a pattern that no Linear has the name of: what it was meant for would be quantized."""
    linears = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    for pattern in ignore:
        # The head is never quantized, and some models call it otherwise.
        if pattern != "lm_head" and not any(_is_named(name, pattern) for name in linears):
            raise ConfigurationError(f"--ignore {pattern}: no Linear layer has this name, the first is {linears[0]}")


def _is_named(name: str, pattern: str) -> bool:
    """Whether a pattern is for a layer: its full name, the end of it, or either with ``*``."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _without(block: Block, ignore: tuple[str, ...]) -> Block:
    inputs = tuple(
        tuple(
            (path, layer)
            for path, layer in group
            if not any(_is_named(f"{block.name}.{path}", pattern) for pattern in ignore)
        )
        for group in block.inputs
    )
    return replace(block, inputs=tuple(group for group in inputs if group))


def _calibration_size(
    network: Any, recipe: Recipe, request: CalibrationRequest, device: torch.device
) -> tuple[int, int, list[str]]:
    if not recipe.needs_calibration:
        return 0, 0, []
    if isinstance(request.dataset, Tensor):
        if request.dataset.dim() != 2:
            raise ConfigurationError(f"calibration token ids must be [n, seqlen], not {tuple(request.dataset.shape)}")
        windows, tokens = request.dataset.shape
        windows = windows if request.nsamples is None else request.nsamples
        tokens = tokens if request.seqlen is None else request.seqlen
        _check_size(network, windows, tokens)
        return windows, tokens, []
    notes = []
    on_cpu = device.type == "cpu"
    nsamples, seqlen = request.nsamples, request.seqlen
    if nsamples is None:
        nsamples = CPU_NSAMPLES if on_cpu else DEFAULT_NSAMPLES
        if on_cpu:
            notes.append(f"no GPU: calibrating on {nsamples} windows instead of {DEFAULT_NSAMPLES} (--nsamples)")
    longest = longest_window(network.config)
    if seqlen is None:
        wanted = CPU_SELF_SEQLEN if on_cpu and takes_self(request.dataset) else DEFAULT_SEQLEN
        seqlen = min(wanted, longest or wanted)
        if seqlen < DEFAULT_SEQLEN:
            reason = "no GPU" if seqlen == wanted else "the model's context ends there"
            notes.append(f"{reason}: windows of {seqlen} tokens instead of {DEFAULT_SEQLEN} (--seqlen)")
    _check_size(network, nsamples, seqlen)
    return nsamples, seqlen, notes


def _check_size(network: Any, nsamples: int, seqlen: int) -> None:
    if nsamples < 1 or seqlen < 2:
        raise ConfigurationError(f"calibration needs at least 1 window of 2 tokens, not {nsamples} of {seqlen}")
    check_window(network.config, seqlen)


def _group_notes(layers: Mapping[str, LayerPlan], recipe: Recipe) -> list[str]:
    if recipe.group_size == PER_CHANNEL:
        return []
    by_size: dict[tuple[int, int], list[str]] = {}
    for layer in layers.values():
        if layer.group_size != recipe.group_size:
            by_size.setdefault((layer.group_size, layer.in_features), []).append(layer.name)
    return [
        f"group size {size} for {len(names)} layers such as {names[0]}: "
        f"{recipe.group_size} does not divide {in_features} input features"
        for (size, in_features), names in by_size.items()
    ]
