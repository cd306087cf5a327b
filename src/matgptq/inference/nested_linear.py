"""A Linear layer that holds nested codes and multiplies by the slice it is set to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from matgptq import native
from matgptq.bit_stream import pack_rows, row_bytes, unpack_rows
from matgptq.checkpoints.format import CODES, SLICED_CODES, SLICED_SCALES, scales_name
from matgptq.core.finiteness import all_finite
from matgptq.errors import AllocationError, ConfigurationError
from matgptq.gpu.layout import PlaneWeight, unpack
from matgptq.kernels import dispatch, packed_weight
from matgptq.kernels.shared_input import SharedInput
from matgptq.nested_weight import NestedWeight, scale_source
from matgptq.sliced_weight import parent_of
from matgptq.slicing import PARENT_BITS, ZERO_POINT, check_bits, slice_codes


class NestedLinear(nn.Module):
    """Linear layer over a ``NestedWeight``; the width can be changed at any time and costs nothing to change.

    The codes can be *packed* for the kernels of their device (``pack``): as a resident parent, which serves every
    width, or as one slice, which takes only the memory of its width.

    Buffers:
        codes: uint8 ``[out_features, in_features]``; empty while the layer is packed.
        scales_8, ...: float16 ``[out_features, groups]``, one for each width with scales of its own.
        weight: empty. In a checkpoint it makes loaders that do not know the format fail on a size mismatch instead of
            starting with random weights; in memory it tells code that asks ``layer.weight`` for device and dtype.
        bias: parameter ``[out_features]`` or None.
    """

    codes: Tensor
    weight: Tensor
    # Another object after anything was assigned to any layer: who looks after many layers looks here first.
    latest_change: ClassVar[object] = object()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        group_size: int,
        scale_bits: tuple[int, ...] = (PARENT_BITS,),
        bits: int = PARENT_BITS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        scale_source(scale_bits)  # refuses a set without the parent's own
        self.scale_bits = tuple(sorted(scale_bits))
        groups = in_features // group_size
        self.register_buffer(CODES, torch.full((out_features, in_features), 128, dtype=torch.uint8, device=device))
        for own in self.scale_bits:
            # The dtype is fixed here because loaders keep a buffer's declared dtype; the values fit bfloat16 as well.
            scales = torch.ones(out_features, groups, dtype=torch.float16, device=device)
            self.register_buffer(scales_name(own), scales)
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.activations: native.Activations = "exact"
        self._packed: packed_weight.PackedWeight | None = None
        self._shared: SharedInput | None = None
        # How it was packed (all planes or a slice, with whom), while scales that were loaded forbid it.
        self._unpacked_from: tuple[bool, SharedInput | None] | None = None
        self._fixed = False
        self._bits: int
        self.set_bits(bits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NestedLinear:
        """Follow ``model.to(...)`` to another device, but keep the scales in the dtype that the format stores.

        Every dtype that a model is cast to on the way (bfloat16, float32) holds them exactly.
        """
        if self.leaves(fn):
            self.unpack()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for own in self.scale_bits:
            scales = getattr(self, scales_name(own))
            if scales.dtype != torch.float16:
                self.register_buffer(scales_name(own), scales.to(torch.float16))
        return self

    def leaves(self, fn: Callable[[Tensor], Tensor]) -> bool:
        """Whether what ``model.to(...)`` applies takes a packed layer away from where its kernels compute."""
        return self._packed is not None and fn(self.weight).device != self._packed.device

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        NestedLinear.latest_change = object()  # afterwards, so that who sees it sees the change

    def multiplies_by(
        self, weight: packed_weight.PackedWeight, bits: int, bias: Tensor | None, activations: native.Activations
    ) -> bool:
        """Whether these very objects are what inputs are multiplied by at present."""
        return self._packed is weight and self._bits == bits and self.bias is bias and self.activations == activations

    @property
    def bits(self) -> int:
        """The width in use."""
        return self._bits

    def set_bits(self, bits: int) -> None:
        """Multiply by the slice of ``bits`` bits from now on; raises as ``require_bits`` does."""
        self.require_bits(bits)
        self._bits = bits

    def require_bits(self, bits: int) -> None:
        """Refuse a width that cannot be set.

        Raises:
            AllocationError: the layer is packed as a slice of another width, or serves an allocation with scales of
                its own.
        """
        check_bits(bits)
        if self._fixed and bits != self._bits:
            raise AllocationError(
                "the model serves an allocation with scales of its own; load it again for other widths"
            )
        if self._packed is not None and bits not in self._packed.widths:
            raise AllocationError(
                f"only the slice of {self._packed.widths[0]} bits is in memory; "
                "load with resident=True to change widths"
            )

    def adopt_scales(self, scales: Tensor) -> None:
        """Serve the width in use with other scales, ``[out_features, groups]``, and no other width from now on."""
        own = scales.to(self.codes.device, torch.float16)
        self.register_buffer(scales_name(self.bits), own)
        self.scale_bits = tuple(sorted({*self.scale_bits, self.bits}))
        self._fixed = True

    @property
    def packed(self) -> packed_weight.PackedWeight | None:
        """The packed form, if there is one."""
        return self._packed

    @property
    def shared_input(self) -> SharedInput | None:
        """What multiplies this layer and those that share its input in one call, if the kernels do."""
        return self._shared

    def pack(self, arena: native.Arena | None = None, *, resident: bool = True) -> None:
        """Pack the codes for the kernels of their device and let go of them.

        Args:
            arena: memory to share with other layers (CPU).
            resident: keep all planes, so that any width can be served; otherwise only the slice in use.

        Raises:
            ConfigurationError: there are no kernels, or they do not take the layer's group size.
        """
        self._packed = packed_weight.pack(self.nested_weight, None if resident else self._bits, arena=arena)
        self.codes = self.codes.new_empty(0)

    def unpack(self) -> None:
        """Return to plain codes."""
        self.codes = self.nested_weight.codes
        self._packed = None
        self._shared = None

    @property
    def nested_weight(self) -> NestedWeight:
        """Codes and scales; codes that are packed are recovered.

        Raises:
            ConfigurationError: the layer is packed as one slice, from which the parent cannot be recovered.
        """
        scales = {own: getattr(self, scales_name(own)) for own in self.scale_bits}
        if self._packed is None:
            return NestedWeight(self.codes, scales)
        if not self.is_complete:
            raise ConfigurationError("only one slice is in memory; load with resident=True to get at the parent")
        if isinstance(self._packed, PlaneWeight):
            return NestedWeight(unpack(self._packed), scales)
        spread = scales[PARENT_BITS].float().repeat_interleave(self.group_size, 1)
        # Exact: a weight is a product of 8 by 8 significant bits.
        levels = native.dequantize_rows(self._packed, self._packed.widths[-1]).div_(spread).round_()
        return NestedWeight((levels + ZERO_POINT).to(torch.uint8), scales)

    @property
    def is_complete(self) -> bool:
        """Whether all that the files hold is still in memory."""
        return not self._fixed and (self._packed is None or self._packed.resident)

    @property
    def scale_fault(self) -> str | None:
        """What is wrong with its scales, None if nothing is: from a weight packed with zeros no codes are recovered."""
        for name in map(scales_name, self.scale_bits):
            scales = getattr(self, name)
            if scales.is_meta:
                continue
            if not all_finite(scales):
                return f"{name} holds NaN or Inf"
            if not bool(scales.all()):
                return f"{name} holds zeros"
        return None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[out_features, in_features]`` weights at the width in use."""
        return packed_weight.dequantize(self.operand.weight, self._bits, dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs @ w_r^T + bias`` in the dtype of ``inputs``."""
        if self._shared is not None and not torch.compiler.is_compiling():
            product = self._shared.product(self, inputs)
            if product is not None:
                return product
        return dispatch.matmul(inputs, *self.operand, activations=self.activations)

    @property
    def operand(self) -> dispatch.Operand:
        """What inputs are multiplied by at present."""
        packed = self._packed
        return dispatch.Operand(self.nested_weight if packed is None else packed, self._bits, self.bias)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._packed is not None:
            destination[prefix + CODES] = self.nested_weight.codes

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Codes and scales are loaded into an unpacked layer."""
        errors: list[str] = others[-1]
        plain = self._packed is None and self._unpacked_from is None
        if plain or not _holds(state_dict, prefix, (CODES, *map(scales_name, self.scale_bits))):
            super()._load_from_state_dict(state_dict, prefix, *others)
        elif not self.is_complete:
            errors.append(
                f"layer {prefix[:-1]}: only one slice of it is in memory; a model of all widths can be changed"
            )
        else:
            with self._unpacked(prefix, errors):
                super()._load_from_state_dict(state_dict, prefix, *others)

    @contextmanager
    def _unpacked(self, prefix: str, errors: list[str]) -> Iterator[None]:
        """Plain codes for a while; they are packed again, in memory of their own, unless the new scales forbid it."""
        if self._packed is not None:
            self._unpacked_from = self._packed.resident, self._shared
            self.unpack()
        yield
        if self._unpacked_from is None:
            return
        if (fault := self.scale_fault) is not None:
            errors.append(f"layer {prefix[:-1]}: {fault}")  # it is packed when it gets better ones
            return
        resident, shared = self._unpacked_from
        self._unpacked_from = None
        self.pack(resident=resident)
        self._shared = shared

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}, bits={self._bits}"
        )


class SlicedLinear(NestedLinear):
    """A nested layer of which only the slice of one width exists, as ``matgptq export --format matgptq-slice`` writes.

    In memory it is a parent whose codes have zeros below the slice; its width cannot be changed.

    Buffers while a file is being loaded, until ``take_slice``, and in ``state_dict``:
        sliced_codes: uint8 ``[out_features, row_bytes]``, see ``matgptq.bit_stream``.
        sliced_scales: float16 ``[out_features, groups]``, in units of the parent's grid.
    """

    sliced_codes: Tensor
    sliced_scales: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        group_size: int,
        bits: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._only_bits = check_bits(bits)
        super().__init__(in_features, out_features, bias, group_size, (PARENT_BITS,), bits, device, dtype)
        for name in (CODES, scales_name(PARENT_BITS)):
            self.register_buffer(name, getattr(self, name).new_empty(0), persistent=False)
        self.register_buffer(
            SLICED_CODES, torch.zeros(out_features, row_bytes(in_features, bits), dtype=torch.uint8, device=device)
        )
        scales = torch.ones(out_features, in_features // group_size, dtype=torch.float16, device=device)
        self.register_buffer(SLICED_SCALES, scales)

    def take_slice(self) -> None:
        """Unpack what has been loaded."""
        self.codes = parent_of(unpack_rows(self.sliced_codes, self._only_bits, self.in_features), self._only_bits)
        self.scales_8 = self.sliced_scales
        del self.sliced_codes, self.sliced_scales

    def require_bits(self, bits: int) -> None:
        """Accept the one width that exists.

        Raises:
            AllocationError: any other width.
        """
        if check_bits(bits) != self._only_bits:
            raise AllocationError(
                f"these files hold only the slice of {self._only_bits} bits, not that of {bits}; "
                "load the checkpoint that it was exported from, or export another slice"
            )
        super().require_bits(bits)

    def pack(self, arena: native.Arena | None = None, *, resident: bool = True) -> None:
        """Pack the slice for the native kernels; there are no other planes that could stay resident."""
        super().pack(arena, resident=False)

    @property
    def is_complete(self) -> bool:
        """Always: a slice is all that the files hold."""
        return True

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if SLICED_CODES not in self._buffers:
            destination.pop(prefix + CODES, None)
            destination[prefix + SLICED_CODES], destination[prefix + SLICED_SCALES] = self._stored()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Into what the buffers were while the file was loaded."""
        if SLICED_CODES in self._buffers or not _holds(state_dict, prefix, (SLICED_CODES, SLICED_SCALES)):
            super()._load_from_state_dict(state_dict, prefix, *others)
            return
        with self._unpacked(prefix, others[-1]):
            for name, stored in zip((SLICED_CODES, SLICED_SCALES), self._stored(), strict=True):
                self.register_buffer(name, stored)
            super()._load_from_state_dict(state_dict, prefix, *others)
            self.take_slice()

    def _stored(self) -> tuple[Tensor, Tensor]:
        """Codes and scales as files hold them."""
        weight = self.nested_weight
        return pack_rows(slice_codes(weight.codes, self._only_bits), self._only_bits), weight.scales[PARENT_BITS]


def _holds(state_dict: Mapping[str, Any], prefix: str, names: Iterable[str]) -> bool:
    return any(prefix + name in state_dict for name in names)


def nested_layers(model: nn.Module) -> dict[str, NestedLinear]:
    """All nested layers of a model by their full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NestedLinear)}


def pack_layers(
    model: nn.Module,
    *,
    resident: bool = True,
    activations: native.Activations = "exact",
    shared: Iterable[Sequence[str]] = (),
) -> int:
    """Pack all nested layers of a model, on a CPU into one arena; returns how many.

    Layers whose group size the kernels do not take stay as they are and run on the reference kernel.

    Args:
        model: has nested layers, all on one device.
        resident: keep all planes of the parent.
        activations: see ``matgptq.load``.
        shared: names of layers that multiply the same input, group by group; each group runs as one call.
    """
    layers = nested_layers(model)
    arena = packed_weight.new_arena(next(iter(layers.values())).codes.device) if layers else None
    packed = {}
    for name, layer in layers.items():
        if packed_weight.group_obstacle(layer.group_size, layer.in_features) is not None:
            continue
        layer.pack(arena, resident=resident)
        layer.activations = activations
        packed[name] = layer
    if arena is None:  # only the native library takes several weights in one call
        return len(packed)
    groups = [[packed[name] for name in group if name in packed] for group in shared]
    together = {id(member) for members in groups for member in members}
    groups += [[layer] for layer in packed.values() if id(layer) not in together]
    for members in groups:
        inputs = SharedInput(members) if members else None
        for member in members:
            member._shared = inputs
    return len(packed)


def set_bits(model: nn.Module, bits: int | Mapping[str, int]) -> None:
    """Set the width of all layers, or of the layers that an allocation names.

    Raises:
        AllocationError: the model has no such layer, or none at all, or a layer that cannot serve its width.
        ConfigurationError: a width outside 2..8. Nothing is changed in any case.
    """
    layers = nested_layers(model)
    if not layers:
        raise AllocationError("the model has no nested layers; load it with matgptq.load")
    widths = dict(bits) if isinstance(bits, Mapping) else dict.fromkeys(layers, bits)
    unknown = sorted(set(widths) - set(layers))
    if unknown:
        raise AllocationError(f"the model has no nested layer {unknown[0]}")
    for name, width in widths.items():
        try:
            layers[name].require_bits(width)
        except (AllocationError, ConfigurationError) as error:
            raise type(error)(f"layer {name}: {error}") from None
    for name, width in widths.items():
        layers[name].set_bits(width)
