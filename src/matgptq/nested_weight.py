"""One quantized weight matrix: the parent's codes and the group scales that its slices use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from matgptq.errors import ConfigurationError
from matgptq.slicing import PARENT_BITS, WIDTHS, check_bits, dequantize

SCALE_BITS = 16  # of a scale as it is stored and served


def layer_bits(out_features: int, in_features: int, group_size: int, bits: int) -> int:
    """Bits that serving reads of one layer: its codes at ``bits`` each, and one scale per row and group."""
    return out_features * in_features * bits + out_features * (in_features // group_size) * SCALE_BITS


def scale_source(scale_bits: Iterable[int]) -> dict[int, int]:
    """Which stored scales each width reads: its own, or else those of the next larger width that has some.

    ``scale_bits`` must contain 8, so that the rule always ends. Returns ``{width: width whose scales it uses}``
    for every width 2..8.
    """
    stored = sorted(set(scale_bits))
    if PARENT_BITS not in stored:
        raise ConfigurationError(f"the parent's own scales (8 bits) are missing among {stored}")
    return {bits: next(own for own in stored if own >= bits) for bits in WIDTHS}


@dataclass(frozen=True)
class NestedWeight:
    """A weight matrix from which every width can be cut.

    Attributes:
        codes: parent codes ``q``, ``torch.uint8`` ``[out, in]``, columns in the model's own order.
        scales: ``{width: [out, groups]}`` floating; width 8 is always there. A scale is in units of the parent's grid
            for every width (``w_r = s_r * (v_r(q) - 128)``), may be negative, and is exactly representable in both
            float16 and bfloat16. Group g serves columns ``g * group_size .. (g + 1) * group_size - 1``.
    """

    codes: Tensor
    scales: Mapping[int, Tensor]

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.codes.dim() != 2:
            raise ConfigurationError(f"codes must be uint8 [out, in], not {self.codes.dtype} {tuple(self.codes.shape)}")
        scale_source(self.scales)
        shapes = {tuple(s.shape) for s in self.scales.values()}
        if len(shapes) != 1:
            raise ConfigurationError(f"the scales of all widths must have one shape, not {sorted(shapes)}")
        rows, groups = next(iter(shapes))
        if rows != self.codes.shape[0] or groups == 0 or self.codes.shape[1] % groups:
            raise ConfigurationError(f"scales [{rows}, {groups}] do not fit codes {tuple(self.codes.shape)}")

    @property
    def group_size(self) -> int:
        """Input columns that share a scale."""
        return int(self.codes.shape[1]) // int(self.scales[PARENT_BITS].shape[1])

    def scales_for(self, bits: int) -> Tensor:
        """The ``[out, groups]`` scales that the slice of ``bits`` bits reads."""
        return self.scales[scale_source(self.scales)[check_bits(bits)]]

    def dequantize(self, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weights ``[out, in]`` of one slice; see ``slicing.dequantize``."""
        return dequantize(self.codes, self.scales_for(bits), bits, dtype)

    def split_rows(self, sizes: list[int]) -> list[NestedWeight]:
        """Cut a stack of layers that were solved as one matrix apart again, by numbers of output rows."""
        scales = {bits: torch.split(s, sizes) for bits, s in self.scales.items()}
        return [
            NestedWeight(codes, {bits: parts[i] for bits, parts in scales.items()})
            for i, codes in enumerate(torch.split(self.codes, sizes))
        ]
