"""The one test of whether numbers are numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """Whether nothing in it is NaN or infinite: smallest and largest tell, in one pass that writes nothing."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all()) if values.numel() else True
