"""One model at several widths at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from matgptq.inference.nested_linear import set_bits


def copy_at(model: Any, bits: int | Mapping[str, int]) -> Any:
    """Another model with the weights of this one, at widths of its own.

    It shares every tensor and all packed codes, so it takes next to no memory; what is changed in place in one of them
    is changed in both.

    Args:
        model: of ``matgptq.load`` or ``from_pretrained``.
        bits: width of all layers, or of those that an allocation names; the others keep theirs.

    Raises:
        AllocationError, ConfigurationError: as ``matgptq.inference.nested_linear.set_bits``.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    set_bits(twin, bits)
    return twin
