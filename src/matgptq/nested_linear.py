"""A Linear layer that holds nested codes and multiplies by the slice it is set to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from matgptq.errors import AllocationError, ConfigurationError
from matgptq.format import CODES, scales_name
from matgptq.nested_weight import NestedWeight, scale_source
from matgptq.slicing import PARENT_BITS, check_bits


class NestedLinear(nn.Module):
    """Linear layer over a ``NestedWeight``; the width can be changed at any time and costs nothing to change.

    Buffers:
        codes: uint8 ``[out_features, in_features]``.
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
        self._scale_source = scale_source(scale_bits)
        self.scale_bits = tuple(sorted(scale_bits))
        groups = in_features // group_size
        self.register_buffer(CODES, torch.full((out_features, in_features), 128, dtype=torch.uint8, device=device))
        for own in self.scale_bits:
            # The dtype is fixed here because loaders keep a buffer's declared dtype; the values fit bfloat16 as well.
            scales = torch.ones(out_features, groups, dtype=torch.float16, device=device)
            self.register_buffer(scales_name(own), scales)
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.set_bits(bits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NestedLinear:
        """Follow ``model.to(...)`` to another device, but keep the scales in the dtype that the format stores.

        Every dtype that a model is cast to on the way (bfloat16, float32) holds them exactly.
        """
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
        """Multiply by the slice of ``bits`` bits from now on."""
        self._bits = check_bits(bits)

    @property
    def nested_weight(self) -> NestedWeight:
        """Codes and scales, sharing storage with the buffers."""
        return NestedWeight(self.codes, {own: getattr(self, scales_name(own)) for own in self.scale_bits})

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[out_features, in_features]`` weights at the width in use."""
        return self.nested_weight.dequantize(self._bits, dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs @ w_r^T + bias`` in the dtype of ``inputs``."""
        return nn.functional.linear(inputs, self.dequantize(inputs.dtype), self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}, bits={self._bits}"
        )


def nested_layers(model: nn.Module) -> dict[str, NestedLinear]:
    """All nested layers of a model by their full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NestedLinear)}


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
