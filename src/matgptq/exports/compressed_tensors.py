"""compressed-tensors, ``pack-quantized``: stock vLLM (0.26 or newer) and stock transformers load it.

For each layer: ``weight_packed`` int32 ``[out, in * bits / 32]``, the codes of a row as one little-endian stream of
bits (the dense packing of compressed-tensors 0.18 and newer; older releases left gaps at 3, 5, 6 and 7 bits);
``weight_scale`` ``[out, groups]`` in the model's dtype; ``weight_shape`` int64 ``[2]``. The stored code is u itself:
the signed integer of the format plus 2^(bits-1).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from matgptq.bit_stream import pack_rows
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


class CompressedTensors(SafetensorsExport):
    """Any width or mixture of widths; fused layers alike; groups of 32, 64, 128 columns or whole rows.

    Raises:
        ExportError: the checkpoint is not of that kind.
    """

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        check_fused(target)
        check_packable(target)
        check_untied(target)
        self.group_sizes = {
            name: WHOLE_ROW if info.group_size == info.in_features else kernel_group_size(name, [info.group_size])
            for name, info in target.checkpoint.layers.items()
        }
        for group in target.expert_groups:  # one kernel runs all experts of a block, and knows one group size
            if len({self.group_sizes.get(name) for name in group}) > 1:
                sizes = (target.checkpoint.layers[name].group_size for name in group)
                self.group_sizes.update(dict.fromkeys(group, kernel_group_size(group[0], sizes)))
        widths = set(target.widths.values())
        if widths & {3, 5, 6, 7}:
            self.notes.append("3, 5, 6 and 7 bits: transformers needs compressed-tensors 0.18 or newer")
        if widths - {4}:
            self.notes.append("vLLM's CPU kernels serve 4 bits only")

    def layer_tensors(self, layer: str, weight: SlicedWeight) -> dict[str, Tensor]:
        """See the module's text."""
        if self.group_sizes[layer] != WHOLE_ROW:
            weight = weight.regroup(self.group_sizes[layer])
        return {
            "weight_packed": pack_rows(weight.codes, weight.bits).view(torch.int32),
            "weight_scale": weight.scales.to(self.target.dtype),
            "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
        }

    def quantization_config(self) -> dict[str, Any]:
        """A group of layers, by their exact names, for each width and group size."""
        groups: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name, bits in self.target.widths.items():
            groups[bits, self.group_sizes[name]].append(name)
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": self.target.kept_layers,
            "config_groups": {
                f"group_{number}": {
                    "targets": names,
                    "format": "pack-quantized",
                    "input_activations": None,
                    "output_activations": None,
                    "weights": {
                        "num_bits": bits,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "channel" if group_size == WHOLE_ROW else "group",
                        "group_size": None if group_size == WHOLE_ROW else group_size,
                        "dynamic": False,
                        "actorder": None,
                        "block_structure": None,
                        "observer": "minmax",
                    },
                }
                for number, ((bits, group_size), names) in enumerate(sorted(groups.items()))
            },
        }
