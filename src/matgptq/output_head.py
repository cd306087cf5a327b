"""The output head at a few bits: the largest matrix of a small model, read whole for every token."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from matgptq import kernels, native, packed_weight
from matgptq.errors import ConfigurationError
from matgptq.grid import resolve_group_size
from matgptq.nested_weight import NestedWeight
from matgptq.recipe import make_recipe
from matgptq.slicing import PARENT_BITS, check_bits
from matgptq.solver import solve

GROUP_SIZE = 64
_ROWS = 8192  # rounded at a time, to bound the temporaries


@dataclass(frozen=True)
class _Origin:
    """What tells whether a weight is still the one that was packed."""

    parameter: weakref.ref[Tensor] = field(compare=False)  # not its id, which another one can get
    shape: torch.Size
    device: torch.device
    version: int
    dtype: torch.dtype
    address: int

    @staticmethod
    def of(weight: Tensor) -> _Origin:
        version = -1 if weight.is_inference() else weight._version
        return _Origin(weakref.ref(weight), weight.shape, weight.device, version, weight.dtype, weight.data_ptr())

    def matches(self, weight: Tensor) -> bool:
        """A cast puts other memory under the same parameter, and is no other weight."""
        if self.parameter() is not weight:
            return False
        now = _Origin.of(weight)
        return now == self or (now.dtype != self.dtype and replace(now, dtype=self.dtype, address=self.address) == self)


class PackedHead(nn.Linear):
    """The model's own head, whose products run on a packed copy rounded to nearest.

    The full-precision weight stays: it may be the embedding table as well, and saving the model writes it. Once it is
    another one (resized, edited, moved to another device; a cast does not count), or is to be trained, products are
    those of a plain Linear; ``pack_head`` makes a packed copy of it as it is then.

    Args:
        head: the head it takes the place of; weight and bias are shared with it.
        bits: width of the packed copy, 2..8.
        activations: of the products, as in ``matgptq.load``.

    Raises:
        UnsupportedModelError: the hidden size is a multiple of none of the group sizes.
    """

    def __init__(self, head: nn.Linear, bits: int, activations: native.Activations = "exact") -> None:
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight, self.bias = head.weight, head.bias
        self.bits = check_bits(bits)
        self.activations: native.Activations = activations
        group_size = resolve_group_size("lm_head", head.in_features, GROUP_SIZE)
        recipe = make_recipe("gptq", [bits], grid="absmax", signed_scales=True, compensation="none")
        weight = head.weight.detach()
        starts = range(0, len(weight), _ROWS)
        pieces = [solve(weight[start : start + _ROWS], None, recipe, group_size).weight for start in starts]
        codes = torch.cat([piece.codes for piece in pieces])
        scales = torch.cat([piece.scales_for(bits) for piece in pieces])
        rounded = NestedWeight(codes, {PARENT_BITS: scales})
        self.packed = packed_weight.pack(rounded, bits, arena=packed_weight.new_arena(codes.device))
        self._packed_from: _Origin | None = _Origin.of(self.weight)

    @property
    def is_packed(self) -> bool:
        """Whether the packed copy is one of the weight as it is."""
        origin = self._packed_from
        if torch.compiler.is_compiling():  # a graph can tell no more
            return origin is not None and self.weight.shape == origin.shape
        if origin is None or not origin.matches(self.weight):
            return False
        if origin.dtype != self.weight.dtype:
            self._packed_from = _Origin.of(self.weight)
        return True

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        _ = self.is_packed  # takes note of a cast; of two at once it could not tell
        return result

    def __getstate__(self) -> dict[str, Any]:
        """For copies, whose weight lies elsewhere."""
        return {**super().__getstate__(), "_packed_from": self.is_packed}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._packed_from = _Origin.of(self.weight) if state["_packed_from"] else None

    def forward(self, input: Tensor) -> Tensor:
        """Logits, in the dtype of ``input``."""
        if not self.is_packed or (self.weight.requires_grad and torch.is_grad_enabled()):
            return super().forward(input)
        return kernels.matmul(input, self.packed, self.bits, self.bias, activations=self.activations)


def pack_head(model: Any, bits: int, activations: native.Activations = "exact") -> None:
    """Serve the model's output head at ``bits`` bits from now on.

    Raises:
        ConfigurationError: the model has no Linear head, or its output is not a plain product.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigurationError(f"head_bits: {type(model).__name__} has no Linear output head")
    model.set_output_embeddings(PackedHead(head, bits, activations))
