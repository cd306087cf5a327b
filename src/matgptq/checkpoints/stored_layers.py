"""The stored tensors of a quantized layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from matgptq.checkpoints.format import CODES, GUARD, Parts, scales_name
from matgptq.files.stored_tensors import TensorInfo, read_tensor
from matgptq.nested_weight import NestedWeight


def layer_tensors(layer: str, weight: NestedWeight) -> dict[str, Tensor]:
    """What a checkpoint holds of a quantized layer: codes, scales and the guard that stock loaders stumble over."""
    return {
        f"{layer}.{CODES}": weight.codes,
        **{f"{layer}.{scales_name(bits)}": scales.to(torch.float16) for bits, scales in sorted(weight.scales.items())},
        f"{layer}.{GUARD}": torch.empty(0, dtype=torch.float16),
    }


def read_layer(layer: str, tensors: Mapping[str, TensorInfo], scale_bits: Sequence[int]) -> NestedWeight:
    """Codes and scales of a layer from the file that holds them."""
    scales = {bits: read_tensor(tensors[f"{layer}.{scales_name(bits)}"]) for bits in scale_bits}
    return NestedWeight(read_tensor(tensors[f"{layer}.{CODES}"]), scales)


def parts_of_layers(tensors: Mapping[str, TensorInfo]) -> dict[str, Parts]:
    """``{module: {name of a tensor inside it: (safetensors dtype, shape)}}`` of all stored tensors."""
    found: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        found.setdefault(module, {})[leaf] = (info.dtype, info.shape)
    return {**found}
