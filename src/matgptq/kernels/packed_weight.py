"""Weights as the kernels read them: which form a device calls for, packing, what can be done with either form.

codes    a ``NestedWeight``: a byte a weight, as files hold it; for PyTorch
native   bit planes in tiles, for the native library
planes   bit planes in the order of tensor cores, for Triton
"""

from __future__ import annotations

import os
import weakref
from typing import Literal

import torch
from torch import Tensor

from matgptq import native
from matgptq.errors import ConfigurationError
from matgptq.gpu import layout as gpu_layout
from matgptq.gpu import support as gpu_support
from matgptq.gpu.layout import PlaneWeight
from matgptq.nested_weight import NestedWeight
from matgptq.slicing import WIDTHS

PackedWeight = native.Weight | PlaneWeight
AnyWeight = NestedWeight | PackedWeight
Form = Literal["codes", "native", "planes"]

GROUP_UNIT = 32


def form_of(weight: AnyWeight) -> Form:
    """How a weight lies in memory."""
    if isinstance(weight, NestedWeight):
        return "codes"
    return "native" if isinstance(weight, native.Weight) else "planes"


def dequantize(weight: AnyWeight, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights ``[out, in]`` of one slice, whatever form the weight has."""
    if isinstance(weight, native.Weight):
        return native.dequantize_rows(weight, bits).to(dtype)
    if isinstance(weight, PlaneWeight):
        return gpu_layout.dequantize(weight, bits, dtype)
    return weight.dequantize(bits, dtype)


def packed_form(device: torch.device) -> Literal["native", "planes"]:
    """The form for which weights on a device are packed: on a CPU ``native``, unless a Triton kernel is forced."""
    forced = os.environ.get("MATGPTQ_KERNEL", "").startswith("triton-")
    return "planes" if device.type != "cpu" or forced else "native"


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why weights on a device cannot be packed for activations of a dtype; None if they can."""
    if packed_form(device) == "planes":
        return gpu_support.obstacle(device.type)
    if dtype not in native.DTYPES:
        return f"the native kernels compute in float32 and bfloat16, not in {dtype}"
    return None if native.available() else native.reason()


def group_obstacle(group_size: int, in_features: int) -> str | None:
    """Why weights with groups of this size cannot be packed; None if they can."""
    if group_size % GROUP_UNIT == 0 or group_size == in_features:
        return None
    return f"the kernels take groups that are multiples of {GROUP_UNIT}, or one per row, not groups of {group_size}"


def new_arena(device: torch.device) -> native.Arena | None:
    """Memory for the packed weights of a model on a device, where their form uses one."""
    return native.Arena() if packed_form(device) == "native" else None


def pack(weight: NestedWeight, bits: int | None = None, *, arena: native.Arena | None = None) -> PackedWeight:
    """Pack a weight in the form that its device calls for.

    Args:
        weight: codes and scales.
        bits: pack this slice only; None keeps the whole parent.
        arena: memory for the native form.

    Raises:
        ConfigurationError: no kernels for that device, or the group size is none that they take.
    """
    scales = {width: weight.scales_for(width) for width in (WIDTHS if bits is None else (bits,))}
    if packed_form(weight.codes.device) == "planes":
        half = {id(scale): scale.half() for scale in scales.values()}
        placed = {width: half[id(scale)] for width, scale in scales.items()}
        if bits is None:
            return remember(gpu_layout.pack_parent(weight.codes, placed))
        return remember(gpu_layout.pack_slice(weight.codes, placed[bits], bits))
    if bits is None:
        return remember(native.pack_parent(weight.codes, scales, arena=arena))
    return remember(native.pack_slice(weight.codes, scales[bits], bits, arena=arena))


_packed: weakref.WeakValueDictionary[int, PackedWeight] = weakref.WeakValueDictionary()


def remember(weight: PackedWeight) -> PackedWeight:
    """Make a packed weight known to compiled graphs, which can hold its key but not the object."""
    _packed[weight.key] = weight
    return weight


def remembered(key: int) -> PackedWeight:
    """The packed weight of a key; raises ``ConfigurationError`` if it is gone."""
    weight = _packed.get(key)
    if weight is None:
        raise ConfigurationError("the packed weight that a recorded product reads is gone, and its model with it")
    return weight
