"""The weight of one of vLLM's Linear layers: one or several of the checkpoint's layers, stacked. Knows nothing of vLLM.

vLLM stacks the layers that share an input (q, k and v; gate and up) into one. Each keeps its own width here; neighbours
of the same width are packed as one matrix, and the product of all of them is one call.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from matgptq import native
from matgptq.errors import ConfigurationError
from matgptq.kernels import dispatch, packed_weight
from matgptq.nested_weight import NestedWeight
from matgptq.slicing import PARENT_BITS


@dataclass(frozen=True)
class Part:
    """One of the stacked layers.

    Attributes:
        codes: parent codes, uint8 ``[out, in]`` of this rank.
        scales: floating ``[out, groups]`` that its width reads, in units of the parent's grid.
        bits: its width.
    """

    codes: Tensor
    scales: Tensor
    bits: int


class FusedLinear:
    """Multiplies by the slices of its parts, side by side.

    Args:
        name: of the layer in the model that is served. Compiled graphs find the weight by it: it is the same in the
            next process, which may read the graph from a cache, and an address would not be.
        parts: in the order of the output features; all have the same ``in`` and number of groups.
        dtype: of the activations.
        activations: as in ``matgptq.load``.

    Attributes:
        obstacle: why no kernel serves it, so that PyTorch dequantizes the slice for every product; None if one does.

    Raises:
        ConfigurationError: int8 activations where no kernel multiplies them.
    """

    def __init__(
        self, name: str, parts: Sequence[Part], dtype: torch.dtype, activations: native.Activations = "exact"
    ) -> None:
        merged = merge_equal_widths(parts)
        device = merged[0].codes.device
        in_features = merged[0].codes.shape[1]
        obstacle = packed_weight.obstacle(device, dtype) or packed_weight.group_obstacle(
            in_features // merged[0].scales.shape[1], in_features
        )
        if obstacle is not None and activations != "exact":
            raise ConfigurationError(f"layer {name}: activations={activations!r}: {obstacle}")
        self.obstacle = obstacle
        self._arena = _arena(device) if obstacle is None else None
        self.out_features = sum(len(part.codes) for part in merged)
        self.activations = activations
        self._rows = [len(part.codes) for part in merged]
        self._weights: list[tuple[packed_weight.AnyWeight, int]] = []
        for part in merged:
            weight = NestedWeight(part.codes, {PARENT_BITS: part.scales})
            packed = packed_weight.pack(weight, part.bits, arena=self._arena) if obstacle is None else weight
            self._weights.append((packed, part.bits))
        self._bias: Tensor | None = None
        self._product = self._prepare(None)
        self.key = name
        copies = 1
        while self.key in _known:  # a draft model beside its target
            copies += 1
            self.key = f"{name}#{copies}"
        _known[self.key] = self

    @property
    def bits(self) -> list[int]:
        """Width of each matrix that is packed as one."""
        return [bits for _, bits in self._weights]

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``[..., out]`` in the dtype of ``x``; ``bias`` is ``[out]`` or None."""
        if torch.compiler.is_compiling():
            result: Tensor = torch.ops.matgptq.fused_linear(x, bias, self.key, self.out_features)
            return result
        return self.multiply(x, bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``product``, outside of a graph."""
        if bias is not self._bias:  # the same one for as long as the model lives
            self._product = self._prepare(bias)
            self._bias = bias
        return self._product(x)

    def _prepare(self, bias: Tensor | None) -> dispatch.JoinedProduct:
        biases = [None] * len(self._rows) if bias is None else torch.split(bias, self._rows)
        operands = [dispatch.Operand(*pair, part) for pair, part in zip(self._weights, biases, strict=True)]
        return dispatch.JoinedProduct(operands, activations=self.activations)


def merge_equal_widths(parts: Sequence[Part]) -> list[Part]:
    """Stack neighbours of the same width."""
    merged: list[list[Part]] = []
    for part in parts:
        if merged and merged[-1][0].bits == part.bits:
            merged[-1].append(part)
        else:
            merged.append([part])
    return [
        Part(torch.cat([part.codes for part in run]), torch.cat([part.scales for part in run]), run[0].bits)
        if len(run) > 1
        else run[0]
        for run in merged
    ]


_known: weakref.WeakValueDictionary[str, FusedLinear] = weakref.WeakValueDictionary()
_arenas: weakref.WeakValueDictionary[str, native.Arena] = weakref.WeakValueDictionary()


def _arena(device: torch.device) -> native.Arena | None:
    """Memory that all layers of the process share; it goes when the last of them does."""
    arena = _arenas.get(str(device)) or packed_weight.new_arena(device)
    if arena is not None:
        _spread_threads()
        _arenas[str(device)] = arena
    return arena


@functools.cache
def _spread_threads() -> None:
    """Once for each process, before anything else starts the native threads: vLLM binds the calling thread."""
    native.spread_threads()


def _multiply(x: Tensor, bias: Tensor | None, layer: str, out_features: int) -> Tensor:
    return _known[layer].multiply(x, bias)


def _fake(x: Tensor, bias: Tensor | None, layer: str, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


# Defined like this and not with torch.library.custom_op, which costs several times as much per call.
_library = torch.library.Library("matgptq", "FRAGMENT")  # type: ignore[no-untyped-call]
_SCHEMA = "fused_linear(Tensor x, Tensor? bias, str layer, int out_features) -> Tensor"
_library.define(_SCHEMA)  # type: ignore[no-untyped-call]
_library.impl("fused_linear", _multiply, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("matgptq::fused_linear", _fake)
