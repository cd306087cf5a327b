"""Our own format with one width of each layer, so that nothing else takes room: ``docs/format.md``, section 10."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from matgptq.bit_stream import pack_rows
from matgptq.checkpoints.format import GUARD, SLICED_CODES, SLICED_SCALES, slice_settings
from matgptq.exports.target import SafetensorsExport
from matgptq.sliced_weight import SlicedWeight
from matgptq.slicing import PARENT_BITS


class MatGPTQSlice(SafetensorsExport):
    """Any slice."""

    def layer_tensors(self, layer: str, weight: SlicedWeight) -> dict[str, Tensor]:
        """Codes at their width, scales in units of the parent's grid, and the guard."""
        return {
            SLICED_CODES: pack_rows(weight.codes, weight.bits),
            SLICED_SCALES: (weight.scales / (1 << (PARENT_BITS - weight.bits))).to(torch.float16),
            GUARD: torch.empty(0, dtype=torch.float16),
        }

    def quantization_config(self) -> dict[str, Any]:
        """Settings of the slice; the records of the parent go along."""
        group_sizes = {name: info.group_size for name, info in self.target.checkpoint.layers.items()}
        return slice_settings(self.target.checkpoint.settings, self.target.widths, group_sizes).to_dict()
