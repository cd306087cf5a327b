"""One slice of a weight matrix, in the terms of every other format: a symmetric integer weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matgptq.errors import ConfigurationError
from matgptq.nested_weight import NestedWeight
from matgptq.slicing import PARENT_BITS, slice_codes


@dataclass(frozen=True)
class SlicedWeight:
    """``w = scale * (u - 2^(bits-1))``.

    Attributes:
        codes: u, ``torch.uint8`` ``[out, in]``, values below ``2^bits``.
        scales: float32 ``[out, groups]``, ``s * 2^(8-bits)`` with the scale s of the parent's grid: 8 significant
            bits, magnitude from 2^-24 to 65280, of either sign; exact in float16 and in bfloat16.
        bits: width.
    """

    codes: Tensor
    scales: Tensor
    bits: int

    @property
    def zero_point(self) -> int:
        """The code that stands for a weight of zero."""
        return 1 << (self.bits - 1)

    @property
    def group_size(self) -> int:
        """Input columns that share a scale."""
        return int(self.codes.shape[1]) // int(self.scales.shape[1])

    def regroup(self, group_size: int) -> SlicedWeight:
        """The same weight in smaller groups: each scale is repeated.

        Raises:
            ConfigurationError: ``group_size`` does not divide the present one.
        """
        times, remainder = divmod(self.group_size, group_size)
        if remainder:
            raise ConfigurationError(f"groups of {self.group_size} cannot be cut into groups of {group_size}")
        return SlicedWeight(self.codes, self.scales.repeat_interleave(times, 1), self.bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[out, in]`` weights; the product is formed in float32, where it is exact, and rounded once."""
        levels = self.codes.to(torch.float32).sub_(self.zero_point).view(*self.scales.shape, -1)
        return levels.mul_(self.scales.unsqueeze(-1)).view(self.codes.shape).to(dtype)


def cut(weight: NestedWeight, bits: int) -> SlicedWeight:
    """The slice of ``bits`` bits of a parent."""
    scales = weight.scales_for(bits).to(torch.float32) * (1 << (PARENT_BITS - bits))
    return SlicedWeight(slice_codes(weight.codes, bits), scales, bits)


def parent_of(codes: Tensor, bits: int) -> Tensor:
    """Parent codes whose slice of ``bits`` bits is ``codes``: ``u << (8 - bits)``, so that their low bits are zero.

    Read at 8 bits with the slice's scale they are the same weights.
    """
    return codes << (PARENT_BITS - bits)
