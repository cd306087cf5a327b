"""The one definition of slicing.

A parent code ``q`` has 8 bits. Its slice of ``bits`` = r bits keeps the r most significant ones, rounded half up
and saturated (MatQuant, arXiv 2502.06786, eq. 6; MatGPTQ, arXiv 2602.03537, sec. 3):

    u_r(q) = min((q + 2^(7-r)) >> (8-r), 2^r - 1)   for r < 8,        u_8(q) = q

and stands for the level ``v_r(q) = u_r(q) * 2^(8-r)`` of the parent's own grid, so that with a group scale ``s``
a weight reads ``w_r = s * (v_r(q) - 128)``. A slice is therefore an ordinary symmetric integer weight with scale
``s * 2^(8-r)`` and zero point ``2^(r-1)``.

Two consequences that callers rely on: the top r+1 bits of q decide the slice, and slices do not compose
(slice 3 of slice 4 is not slice 3), so everything is always cut from the parent.

Quantizer, kernels and exporters are all tested against this file for every code and width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from matgptq.errors import ConfigurationError

PARENT_BITS = 8
MIN_BITS = 2
WIDTHS: tuple[int, ...] = tuple(range(MIN_BITS, PARENT_BITS + 1))
NUM_CODES = 1 << PARENT_BITS
ZERO_POINT = NUM_CODES // 2


def check_bits(bits: int) -> int:
    """Return ``bits`` if it is a width that a parent can serve (2..8); raise ``ConfigurationError`` otherwise."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in WIDTHS:
        raise ConfigurationError(f"bits must be an integer from {MIN_BITS} to {PARENT_BITS}, not {bits!r}")
    return bits


def check_widths(widths: Iterable[int] | int) -> tuple[int, ...]:
    """Return the widths sorted and without repeats; raise ``ConfigurationError`` for an empty or unservable set."""
    widths = (widths,) if isinstance(widths, int) else widths
    checked = tuple(sorted({check_bits(bits) for bits in widths}))
    if not checked:
        raise ConfigurationError(f"give at least one width from {MIN_BITS} to {PARENT_BITS}")
    return checked


def slice_codes(codes: Tensor, bits: int) -> Tensor:
    """Cut the ``bits`` most significant bits of parent codes, rounded: ``u_r(q)``.

    Args:
        codes: parent codes, ``torch.uint8``, any shape.
        bits: width r, 2..8.

    Returns:
        ``torch.uint8`` tensor of the same shape with values in ``0 .. 2^bits - 1``.
    """
    check_bits(bits)
    if codes.dtype != torch.uint8:
        raise ConfigurationError(f"codes must be torch.uint8, not {codes.dtype}")
    if bits == PARENT_BITS:
        return codes.clone()
    dropped = PARENT_BITS - bits
    # (q >> d) + rounding bit stays inside uint8; q + 2^(d-1) would not.
    rounded = (codes >> dropped) + ((codes >> (dropped - 1)) & 1)
    return rounded.clamp_(max=(1 << bits) - 1)


def slice_levels(codes: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Centred levels ``v_r(q) - 128`` of parent codes: integers in -128..127, held as ``dtype``.

    ``dtype`` must hold integers up to 128 exactly (float32, float16, bfloat16, int16 all do).
    """
    sliced = slice_codes(codes, bits)
    # 2^(8-r) * (u - 2^(r-1)): both factors are exact in every float type used here.
    return (sliced.to(dtype) - (1 << (bits - 1))) * (1 << (PARENT_BITS - bits))


@functools.cache
def _level_table(bits: int) -> Tensor:
    return slice_levels(torch.arange(NUM_CODES, dtype=torch.uint8), bits)


def level_table(bits: int) -> Tensor:
    """``[256]`` float32 table of ``v_r(q) - 128`` for every parent code (a copy that the caller may keep)."""
    return _level_table(check_bits(bits)).clone()


def dequantize(codes: Tensor, scales: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights of one slice: ``w_r = s * (v_r(q) - 128)``.

    Args:
        codes: parent codes, ``torch.uint8`` ``[out, in]``.
        scales: group scales in units of the parent's grid, floating ``[out, groups]``; ``in`` is a multiple of
            ``groups`` and each scale serves ``in / groups`` neighbouring input columns.
        bits: width, 2..8.
        dtype: of the result. The product is formed in float32 (exact: 8 significant bits times 8) and rounded once.

    Returns:
        ``[out, in]`` tensor of ``dtype``.
    """
    out_features, in_features = codes.shape
    groups = scales.shape[1]
    if scales.shape[0] != out_features or groups == 0 or in_features % groups:
        raise ConfigurationError(f"scales {tuple(scales.shape)} do not fit codes {tuple(codes.shape)}")
    levels = slice_levels(codes, bits).view(out_features, groups, -1)  # [out, groups, group_size]
    return levels.mul_(scales.to(torch.float32).unsqueeze(-1)).view(out_features, in_features).to(dtype)
