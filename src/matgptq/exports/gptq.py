"""GPTQ, version 1 of its file format: GPTQModel, ExLlama, SGLang and vLLM load it.

For each layer, with codes u packed along the *input* into little-endian 32-bit words without gaps (at 3 bits a code
may lie across two words): ``qweight`` int32 ``[in * bits / 32, out]``; ``scales`` float16 ``[groups, out]``;
``qzeros`` int32 ``[groups, out * bits / 32]``, zero points packed along the output; ``g_idx`` int32 ``[in]``, the group
of each input column. Version 1 stores every zero point less one: readers add it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from matgptq.bit_stream import pack_rows
from matgptq.errors import ExportError
from matgptq.exports.target import (
    WHOLE_ROW,
    SafetensorsExport,
    Target,
    check_fused,
    check_packable,
    check_untied,
    kernel_group_size,
)
from matgptq.sliced_weight import SlicedWeight

WIDTHS = (2, 3, 4, 8)
_FUSED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj") | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)


class GPTQ(SafetensorsExport):
    """One of the widths 2, 3, 4, 8 for all layers, and one group size, to which larger groups are cut.

    Raises:
        ExportError: the checkpoint or its slice is not of that kind.
    """

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        bits = target.uniform_bits
        if bits not in WIDTHS:
            shown = "several widths" if bits is None else f"{bits} bits"
            raise ExportError(
                f"gptq holds 2, 3, 4 or 8 bits, the same for all layers, not {shown}; export compressed-tensors"
            )
        self.bits = bits
        check_fused(target)
        check_packable(target, rows=True)
        check_untied(target)
        layers = target.checkpoint.layers.values()
        self.group_size = WHOLE_ROW
        if any(info.group_size != info.in_features for info in layers):
            self.group_size = kernel_group_size("all layers together", (info.group_size for info in layers))
        if bits in (2, 3):
            self.notes.append(f"{bits} bits: GPTQModel reads it; vLLM reads gptq at 4 and 8 bits only")

    def layer_tensors(self, layer: str, weight: SlicedWeight) -> dict[str, Tensor]:
        """See the module's text."""
        if self.group_size != WHOLE_ROW:
            weight = weight.regroup(self.group_size)
        out_features, in_features = weight.codes.shape
        zeros = torch.full((weight.scales.shape[1], out_features), weight.zero_point - 1, dtype=torch.uint8)
        return {
            "qweight": _words(weight.codes, weight.bits).t().contiguous(),
            "qzeros": _words(zeros, weight.bits),
            "scales": weight.scales.t().contiguous().to(torch.float16),
            "g_idx": torch.arange(in_features, dtype=torch.int32) // weight.group_size,
        }

    def quantization_config(self) -> dict[str, Any]:
        """As GPTQModel writes it."""
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": False,
            "sym": True,
            "lm_head": "lm_head" in self.target.checkpoint.layers,
            "dynamic": self._skipped(),
        }

    def _skipped(self) -> dict[str, Any]:
        """Linears and routers in the blocks that are not quantized; readers take all of them for quantized otherwise.

        vLLM asks for the name of the fused matrix, GPTQModel for the layer's own.
        """
        kept = [name.split(".") for name in self.target.kept_layers if name != "lm_head"]
        return {
            "-:^" + r"\.".join([*path, f"({leaf}|{_FUSED[leaf]})" if leaf in _FUSED else leaf]) + "$": {}
            for *path, leaf in kept
        }


def _words(codes: Tensor, bits: int) -> Tensor:
    return pack_rows(codes, bits).view(torch.int32)
