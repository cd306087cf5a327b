"""Layers that multiply the same input (q, k and v; gate and up) run as one call of the kernels.

A single row, which is what decoding multiplies, takes less time than Python needs to describe the call, so the call is
kept for as long as weights and widths stay the same. A layer that shares its input with none is a group of its own.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from matgptq import native
from matgptq.kernels import dispatch, kernel_choice


@dataclass
class _Ready:
    """Products that were computed ahead, and what shows that they belong to an input."""

    inputs: Tensor
    version: int | None
    copy: Tensor | None
    results: dict[tuple[object, ...], Tensor]  # by layer and what it multiplied by
    kept: Sequence[dispatch.Operand]  # so that no other weight can get the id of one of them

    def belongs_to(self, inputs: Tensor) -> bool:
        if inputs is not self.inputs:
            return False
        if self.copy is not None:
            return torch.equal(inputs, self.copy)
        return inputs._version == self.version


@dataclass
class _Prepared:
    """A call that is made again and again for as long as its state is the same."""

    state: list[tuple[object, ...]]
    joined: native.Joined
    kept: list[Tensor]  # memory of the biases, so that no other one can get the address of one of them


class Member(Protocol):
    """A layer of a group."""

    activations: native.Activations

    @property
    def operand(self) -> dispatch.Operand:
        """What it multiplies by at present."""


class SharedInput:
    """Computes the products of a group of layers when the first of them is asked, and hands out the others later.

    Each result is handed out once, and only for the very tensor it was computed from, unchanged since. Several
    threads may run the model at once: what one of them prepared is useless to the others, never wrong.

    Args:
        members: layers that multiply the same input by packed weights. They keep this object, not it them; when one of
            them is gone, the others are on their own.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = tuple(map(weakref.ref, members))
        self._ready: _Ready | None = None
        self._prepared: _Prepared | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInput:
        """That of the members' copies; what was computed or prepared belongs to the layers of the original."""
        twin = memo[id(self)] = SharedInput(())  # before the members, which refer to it
        twin._members = tuple(weakref.ref(copy.deepcopy(each, memo)) for each in self._present())
        return twin

    def _present(self) -> list[Member]:
        """The members, or none if one of them is gone."""
        members = [reference() for reference in self._members]
        return [] if None in members else members  # type: ignore[return-value]

    def product(self, member: Member, inputs: Tensor) -> Tensor | None:
        """The product of one layer, or None where the kernels take one weight at a time or a gradient is due."""
        operand, activations = member.operand, member.activations  # read once: another thread may set another width
        if not dispatch.is_plain(inputs, operand.bias):
            return None
        ready = self._ready
        if ready is not None and ready.belongs_to(inputs):
            result = ready.results.pop((id(member), *_state(operand, activations)), None)
            if result is not None:
                if not ready.results:
                    self._ready = None
                return result
        rows = inputs.shape[:-1].numel()
        members = self._present()
        if not members or not kernel_choice.fuses(
            kernel_choice.Product("native", inputs.device.type, inputs.dtype, rows, activations)
        ):
            return None
        operands = [operand if each is member else each.operand for each in members]
        if torch.is_grad_enabled() and any(bias is not None and bias.requires_grad for _, _, bias in operands):
            return None
        states = [_state(each, activations) for each in operands]  # as they are before anything is computed
        if rows == 1:
            products = self._multiply_row(inputs, operands, activations)
        else:
            products = dispatch.matmul_shared(inputs, operands, activations=activations)
        result, results = None, {}
        for each, state, product in zip(members, states, products, strict=True):
            if each is member:
                result = product
            else:
                results[id(each), *state] = product
        if results:
            # Inference tensors have no version counter; the few rows that are shared are cheap to compare.
            counted = not inputs.is_inference()
            version, twin = (inputs._version, None) if counted else (None, inputs.clone())
            self._ready = _Ready(inputs, version, twin, results, operands)
        return result

    def _multiply_row(
        self, inputs: Tensor, operands: Sequence[dispatch.Operand], activations: native.Activations
    ) -> list[Tensor]:
        joined = self._join(operands, activations)
        if joined is None:
            return dispatch.matmul_shared(inputs, operands, activations=activations)
        pieces = torch.split(joined(inputs.reshape(1, inputs.shape[-1])), joined.sizes, 1)
        return [piece.view(*inputs.shape[:-1], piece.shape[1]) for piece in pieces]

    def _join(self, operands: Sequence[dispatch.Operand], activations: native.Activations) -> native.Joined | None:
        # The prepared call keeps the weights alive, so that no other one can get the id of one of them.
        state = [_state(operand, activations) for operand in operands]
        prepared = self._prepared
        if prepared is not None and prepared.state == state:
            return prepared.joined
        joined = dispatch.join(operands, activations)
        if joined is not None:
            kept = [bias.detach() for _, _, bias in operands if bias is not None]
            self._prepared = _Prepared(state, joined, kept)
        return joined


def _state(operand: dispatch.Operand, activations: native.Activations) -> tuple[object, ...]:
    """What a product depends on beside its input; equal only where nothing has changed."""
    weight, bits, bias = operand
    if bias is None:
        return id(weight), bits, activations
    return id(weight), bits, activations, memory_state(bias)


def memory_state(tensor: Tensor) -> tuple[int, int]:
    """What a tensor's values depend on; equal only where nothing has changed, as long as its memory is kept."""
    # Inference tensors do not count their changes, and cannot be changed outside.
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
