"""Layers that multiply the same input (q, k and v; gate and up) run as one call of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from matgptq import kernels


@dataclass
class _Ready:
    """Products that were computed ahead, and what shows that they belong to an input."""

    inputs: Tensor
    version: int | None
    copy: Tensor | None
    results: dict[tuple[int, int], Tensor]  # by layer and width

    def belongs_to(self, inputs: Tensor) -> bool:
        if inputs is not self.inputs:
            return False
        if self.copy is not None:
            return torch.equal(inputs, self.copy)
        return inputs._version == self.version


class Member(Protocol):
    """A layer of a group."""

    activations: kernels.Activations

    @property
    def bits(self) -> int:
        """The width in use."""

    @property
    def operand(self) -> kernels.Operand:
        """What it multiplies by at present."""


class SharedInput:
    """Computes the products of a group of layers when the first of them is asked, and hands out the others later.

    Each result is handed out once, and only for the very tensor it was computed from, unchanged since. Several
    threads may run the model at once: what one of them prepared is useless to the others, never wrong.

    Args:
        members: layers that multiply the same input by packed weights.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = tuple(members)
        self._ready: _Ready | None = None

    def product(self, member: Member, inputs: Tensor) -> Tensor | None:
        """The product of one layer, or None where the kernels take one weight at a time."""
        ready = self._ready
        if ready is not None and ready.belongs_to(inputs):
            result = ready.results.pop((id(member), member.bits), None)
            if result is not None:
                if not ready.results:
                    self._ready = None
                return result
        activations = member.activations
        rows = inputs.shape[:-1].numel()
        if not kernels.fuses(kernels.Product("native", inputs.device.type, inputs.dtype, rows, activations)):
            return None
        products = kernels.matmul_shared(inputs, [each.operand for each in self._members], activations=activations)
        results = {(id(each), each.bits): product for each, product in zip(self._members, products, strict=True)}
        result = results.pop((id(member), member.bits))
        # Inference tensors have no version counter; the few rows that are shared are cheap to compare.
        counted = not inputs.is_inference()
        self._ready = _Ready(inputs, inputs._version if counted else None, None if counted else inputs.clone(), results)
        return result
