"""Ordinary safetensors: the weights of the slice as numbers, which every engine loads.

float32 holds every slice exactly. bfloat16 and float16 round each weight once, as any engine that computes in
that dtype would.
"""

from __future__ import annotations

from torch import Tensor

from matgptq.core.finiteness import all_finite
from matgptq.errors import ExportError
from matgptq.exports.target import SafetensorsExport, Target, check_untied
from matgptq.sliced_weight import SlicedWeight


class Dense(SafetensorsExport):
    """Any slice."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        check_untied(target)

    def layer_tensors(self, layer: str, weight: SlicedWeight) -> dict[str, Tensor]:
        """``{"weight": [out, in]}``; raises ``ExportError`` where float16 ends."""
        dense = weight.dequantize(self.target.dtype)
        if not all_finite(dense):
            raise ExportError(f"layer {layer}: a weight is too large for {self.target.dtype}; use --dtype bfloat16")
        return {"weight": dense}

    def quantization_config(self) -> None:
        """There is none."""
