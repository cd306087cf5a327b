"""The output head, the largest matrix of a small model and read whole for every token: exact or at a few bits."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from matgptq import native
from matgptq.core.grid import resolve_group_size
from matgptq.core.solver import solve
from matgptq.errors import ConfigurationError
from matgptq.immutable import Immutable
from matgptq.kernels import dispatch, packed_weight
from matgptq.kernels.kernel_choice import asks_for_reference
from matgptq.nested_weight import NestedWeight
from matgptq.recipe import make_recipe
from matgptq.slicing import PARENT_BITS, check_bits

GROUP_SIZE = 64
# Up to so many rows of these activations PyTorch's products are slower.
DENSE_ROWS = {torch.float32: 16, torch.bfloat16: 4}
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


class _CopiedHead(nn.Linear):
    """The model's own head, whose products run on a copy of its weight.

    The weight itself stays: it may be the embedding table as well, and saving the model writes it. Once it is another
    one (resized, edited, moved to another device; a cast does not count), or is to be trained, products are those of a
    plain Linear; ``pack_model`` makes a copy of it as it is then.

    Args:
        head: the head it takes the place of; weight and bias are shared with it.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight, self.bias = head.weight, head.bias
        self._copied_from: _Origin | None = _Origin.of(self.weight)

    @property
    def is_current(self) -> bool:
        """Whether the copy is one of the weight as it is."""
        origin = self._copied_from
        if torch.compiler.is_compiling():  # a graph can tell no more
            return origin is not None and self.weight.shape == origin.shape
        if origin is None or not origin.matches(self.weight):
            return False
        if origin.dtype != self.weight.dtype:
            self._copied_from = _Origin.of(self.weight)
        return True

    @property
    def is_trained(self) -> bool:
        """Whether a gradient of the weight may be asked for."""
        return self.weight.requires_grad and torch.is_grad_enabled()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        _ = self.is_current  # takes note of a cast; of two at once it could not tell
        return result

    def __getstate__(self) -> dict[str, Any]:
        """For copies, whose weight lies elsewhere."""
        return {**super().__getstate__(), "_copied_from": self.is_current}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._copied_from = _Origin.of(self.weight) if state["_copied_from"] else None


class PackedHead(_CopiedHead):
    """A head whose copy is rounded to nearest and packed.

    Args:
        head: the head it takes the place of.
        bits: width of the packed copy, 2..8.
        activations: of the products, as in ``matgptq.load``.

    Raises:
        UnsupportedModelError: the hidden size is a multiple of none of the group sizes.
    """

    def __init__(self, head: nn.Linear, bits: int, activations: native.Activations = "exact") -> None:
        super().__init__(head)
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

    @property
    def bytes_read(self) -> int:
        """Of weights, by a product with one row."""
        return self.packed.bytes_read(self.bits)

    @property
    def bytes_added(self) -> int:
        """What the copy takes beside the weight."""
        return self.packed.nbytes

    def forward(self, input: Tensor) -> Tensor:
        """Logits, in the dtype of ``input``."""
        if not self.is_current or self.is_trained:
            return super().forward(input)
        return dispatch.matmul(input, self.packed, self.bits, self.bias, activations=self.activations)


class DenseHead(_CopiedHead):
    """An exact head on the CPU, multiplied by a few rows at the speed of its bytes, with float32 sums.

    A float32 weight whose values bfloat16 or float16 holds, which is what most checkpoints store, is read from a copy
    in that dtype.
    """

    multiplies_by_weight = True  # for ``matgptq.models.logits``: a part of its rows gives a part of the logits

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head)
        self._copy = _Rows.of(head.weight.detach())

    @property
    def rows(self) -> Tensor:
        """What is multiplied by: the copy, or the weight."""
        copy = self._copy
        return copy.tensor if copy is not None and self.is_current and copy.resembles(self.weight) else self.weight

    @property
    def bytes_read(self) -> int:
        """Of weights, by a product with one row."""
        return self.rows.nbytes

    @property
    def bytes_added(self) -> int:
        """What the copy takes beside the weight."""
        return 0 if self._copy is None else self._copy.tensor.nbytes

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        if not self.is_current:
            self._copy = None
        return result

    def forward(self, input: Tensor) -> Tensor:
        """Logits, in the dtype of ``input``."""
        if torch.compiler.is_compiling() or self.is_trained or not self._takes(input):
            return super().forward(input)
        return native.linear(input, self.rows.detach(), self.bias)

    def _takes(self, input: Tensor) -> bool:
        weight = self.weight
        return (
            input.is_cpu
            and weight.is_cpu
            and weight.dtype in native.DTYPES
            and weight.stride(1) == 1
            and input.shape[:-1].numel() <= DENSE_ROWS.get(input.dtype, 0)
            and dispatch.is_plain(input, self.bias)
            and not asks_for_reference()
        )


@dataclass(frozen=True)
class _Rows(Immutable):
    """A copy of a float32 weight in 16 bits, the same for all copies of a model."""

    tensor: Tensor
    sample: Tensor

    @staticmethod
    def of(weight: Tensor) -> _Rows | None:
        """None where it would not be exact, or is not needed."""
        if weight.dtype != torch.float32 or weight.is_inference():  # whose changes nothing counts
            return None
        copy = _exact_copy(weight, torch.bfloat16)
        if copy is None:
            copy = _exact_copy(weight, torch.float16)
        return None if copy is None else _Rows(copy, _sample(copy).clone())

    def resembles(self, weight: Tensor) -> bool:
        """Whether some elements are the copied ones: PyTorch does not count changes through ``weight.data``.

        Merging an adapter is one of them, and changes nearly all elements; a change of a few rows stays unseen.
        """
        part = _sample(weight.detach())
        return torch.equal(part, self.sample.to(part.dtype))


def _exact_copy(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A copy in another dtype; None if it does not hold the values."""
    sample = _sample(weight)
    if not torch.equal(sample.to(dtype).float(), sample):  # before memory is taken for all of it
        return None
    copy = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    for start in range(0, len(weight), _ROWS):
        piece = weight[start : start + _ROWS]
        if not torch.equal(copy[start : start + _ROWS].copy_(piece).float(), piece):
            return None
    return copy


def _sample(weight: Tensor) -> Tensor:
    """A hundred elements or so, spread over a matrix."""
    rows, columns = weight.shape
    return weight[:: max(1, rows // 16), :: max(1, columns // 8)]


def pack_head(model: Any, bits: int, activations: native.Activations = "exact") -> None:
    """Serve the model's output head at ``bits`` bits from now on.

    Raises:
        ConfigurationError: the model has no Linear head, or its output is not a plain product.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigurationError(f"head_bits: {type(model).__name__} has no Linear output head")
    model.set_output_embeddings(PackedHead(head, bits, activations))


def quicken_head(model: Any) -> None:
    """Multiply by the output head as fast as it can be read, where it is a plain Linear on a CPU; exactly as before."""
    head = model.get_output_embeddings()
    if type(head) in (nn.Linear, DenseHead) and head.weight.is_cpu and head.weight.dtype in native.DTYPES:
        model.set_output_embeddings(DenseHead(head))
