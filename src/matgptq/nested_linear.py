"""A Linear layer that holds nested codes and multiplies by the slice it is set to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from matgptq import kernels, native
from matgptq.errors import AllocationError, ConfigurationError
from matgptq.format import CODES, scales_name
from matgptq.nested_weight import NestedWeight, scale_source
from matgptq.shared_input import SharedInput
from matgptq.slicing import PARENT_BITS, ZERO_POINT, check_bits
from matgptq.triton_layout import PlaneWeight, unpack


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
        self.activations: kernels.Activations = "exact"
        self._packed: kernels.PackedWeight | None = None
        self._shared: SharedInput | None = None
        self.set_bits(bits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NestedLinear:
        """Follow ``model.to(...)`` to another device, but keep the scales in the dtype that the format stores.

        Every dtype that a model is cast to on the way (bfloat16, float32) holds them exactly.
        """
        if self._packed is not None and fn(self.weight).device != self._packed.device:
            self.unpack()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for own in self.scale_bits:
            scales = getattr(self, scales_name(own))
            if scales.dtype != torch.float16:
                self.register_buffer(scales_name(own), scales.to(torch.float16))
        return self

    @property
    def bits(self) -> int:
        """The width in use."""
        return self._bits

    def set_bits(self, bits: int) -> None:
        """Multiply by the slice of ``bits`` bits from now on.

        Raises:
            AllocationError: the layer is packed as a slice of another width.
        """
        check_bits(bits)
        if self._packed is not None and bits not in self._packed.widths:
            raise AllocationError(
                f"only the slice of {self._packed.widths[0]} bits is in memory; "
                "load with resident=True to change widths"
            )
        self._bits = bits

    @property
    def packed(self) -> kernels.PackedWeight | None:
        """The packed form, if there is one."""
        return self._packed

    def pack(self, arena: native.Arena | None = None, *, resident: bool = True) -> None:
        """Pack the codes for the kernels of their device and let go of them.

        Args:
            arena: memory to share with other layers (CPU).
            resident: keep all planes, so that any width can be served; otherwise only the slice in use.

        Raises:
            ConfigurationError: there are no kernels, or they do not take the layer's group size.
        """
        self._packed = kernels.pack(self.nested_weight, None if resident else self._bits, arena=arena)
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
        if not self._packed.resident:
            raise ConfigurationError("only one slice is in memory; load with resident=True to get at the parent")
        if isinstance(self._packed, PlaneWeight):
            return NestedWeight(unpack(self._packed), scales)
        spread = scales[PARENT_BITS].float().repeat_interleave(self.group_size, 1)
        # Exact: a weight of the parent is a product of 8 by 8 significant bits.
        levels = native.dequantize_rows(self._packed, PARENT_BITS).div_(spread).round_()
        return NestedWeight((levels + ZERO_POINT).to(torch.uint8), scales)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[out_features, in_features]`` weights at the width in use."""
        return kernels.dequantize(self.operand.weight, self._bits, dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs @ w_r^T + bias`` in the dtype of ``inputs``."""
        if self._shared is not None and not torch.compiler.is_compiling():
            product = self._shared.product(self, inputs)
            if product is not None:
                return product
        return kernels.matmul(inputs, *self.operand, activations=self.activations)

    @property
    def operand(self) -> kernels.Operand:
        """What inputs are multiplied by at present."""
        weight = self._packed if self._packed is not None else self.nested_weight
        return kernels.Operand(weight, self._bits, self.bias)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._packed is not None:
            destination[prefix + CODES] = self.nested_weight.codes

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}, bits={self._bits}"
        )


def nested_layers(model: nn.Module) -> dict[str, NestedLinear]:
    """All nested layers of a model by their full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NestedLinear)}


def pack_layers(
    model: nn.Module,
    *,
    resident: bool = True,
    activations: kernels.Activations = "exact",
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
    arena = kernels.new_arena(next(iter(layers.values())).codes.device) if layers else None
    packed = {}
    for name, layer in layers.items():
        if layer.group_size % 32 and layer.group_size != layer.in_features:
            continue
        layer.pack(arena, resident=resident)
        layer.activations = activations
        packed[name] = layer
    for group in shared if arena is not None else ():  # only the native library takes several weights in one call
        members = [packed[name] for name in group if name in packed]
        if len(members) > 1:
            together = SharedInput(members)
            for member in members:
                member._shared = together
    return len(packed)


def set_bits(model: nn.Module, bits: int | Mapping[str, int]) -> None:
    """Set the width of all layers, or of the layers that an allocation names.

    Raises:
        AllocationError: the model has no such layer, or none at all.
        ConfigurationError: a width outside 2..8. Nothing is changed in either case.
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
            check_bits(width)
        except ConfigurationError as error:
            raise ConfigurationError(f"layer {name}: {error}") from None
    for name, width in widths.items():
        layers[name].set_bits(width)
