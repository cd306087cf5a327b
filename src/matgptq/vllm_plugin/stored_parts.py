"""What a checkpoint stores of a layer, as vLLM's layers need to know it. No vLLM in here."""

from __future__ import annotations

from torch import Tensor

from matgptq.bit_stream import unpack_rows
from matgptq.checkpoints.format import CODES, SLICED_CODES, SLICED_SCALES, Settings, scales_name
from matgptq.core.finiteness import all_finite
from matgptq.errors import CheckpointError
from matgptq.nested_weight import scale_source
from matgptq.sliced_weight import parent_of


def codes_name(settings: Settings) -> str:
    """Name of the codes inside a layer."""
    return SLICED_CODES if settings.is_slice else CODES


def all_scales(settings: Settings) -> list[str]:
    """Names of all sets of scales inside a layer."""
    return [SLICED_SCALES] if settings.is_slice else [*map(scales_name, settings.scale_bits)]


def scales_of(settings: Settings, bits: int) -> str:
    """Name of the scales that a width reads."""
    return SLICED_SCALES if settings.is_slice else scales_name(scale_source(settings.scale_bits)[bits])


def unpack_slice(packed: Tensor, in_features: int) -> Tensor:
    """Parent codes with zeros below the slice, uint8 ``[out, in]``, of a slice's packed rows."""
    bits = packed.shape[1] * 8 // in_features  # a row is padded by less than a byte
    return parent_of(unpack_rows(packed, bits, in_features), bits)


def check_scales(name: str, scales: Tensor) -> None:
    """Refuse scales that are no numbers or zero; memory for them starts as NaN, so that what was not filled is found.

    Raises:
        CheckpointError: names them.
    """
    if not all_finite(scales):
        raise CheckpointError(f"{name} holds NaN or Inf, or is not all there")
    if bool((scales == 0).any()):
        raise CheckpointError(f"{name} holds a scale of zero")


def check_guard(name: str, stored: Tensor) -> None:
    """Refuse anything but the empty tensor that lies beside codes.

    Raises:
        CheckpointError: names it.
    """
    if stored.numel():
        raise CheckpointError(f"{name} {list(stored.shape)} stands beside codes, where it must be empty")
