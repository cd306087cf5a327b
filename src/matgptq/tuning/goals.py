"""What is tuned: the scales of a width, or those of an allocation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from matgptq.checkpoints.allocation_scales import find_scales, widths_scales
from matgptq.checkpoints.allocation_store import find_allocation, stored_allocations
from matgptq.checkpoints.checkpoint import Checkpoint, open_checkpoint
from matgptq.errors import ConfigurationError
from matgptq.slicing import check_widths

DEFAULT_WIDTHS = (2, 3)


def default_learning_rate(bits: int) -> float:
    """Largest relative change of a scale in one step. The finer the slice, the less its scales may move."""
    return 2.0**-bits * 0.016


@dataclass(frozen=True)
class Goal:
    """What is tuned: the scales of a width, or those of an allocation.

    Attributes:
        widths: the width, or that of each layer.
        allocation: the name of the latter.
    """

    widths: int | Mapping[str, int]
    allocation: str | None = None

    @property
    def key(self) -> str:
        """For file names; widths have digits and allocations a prefix."""
        return str(self.widths) if self.allocation is None else f"allocation-{self.allocation}"

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.widths} bits" if self.allocation is None else self.allocation

    @property
    def rate(self) -> float:
        """Default learning rate: that of its smallest width."""
        return default_learning_rate(self.widths if isinstance(self.widths, int) else min(self.widths.values()))

    def pace(self, bits: int) -> float:
        """The rate of layers of a width as a share of ``rate``."""
        return default_learning_rate(bits) / self.rate


def choose_goals(checkpoint: Checkpoint, bits: Iterable[int] | int | None, allocation: str | None) -> list[Goal]:
    """What a call asks for.

    Raises:
        ConfigurationError: both, or an allocation that does not lie with the checkpoint.
    """
    if allocation is None:
        return [Goal(width) for width in check_widths(DEFAULT_WIDTHS if bits is None else bits)]
    if bits is not None:
        raise ConfigurationError("tune either widths or an allocation")
    widths = find_allocation(checkpoint, allocation)
    if allocation not in stored_allocations(checkpoint):
        raise ConfigurationError(
            f"{allocation}: only an allocation that matgptq search saved with the checkpoint can have scales of its own"
        )
    return [Goal(widths, allocation)]


def by_layer(checkpoint: Checkpoint, flat: Tensor) -> dict[str, Tensor]:
    """Cut one vector of all scales into ``{layer: [out, groups]}``."""
    shapes = [(info.out_features, info.in_features // info.group_size) for info in checkpoint.layers.values()]
    pieces = torch.split(flat, [rows * groups for rows, groups in shapes])
    return {name: piece.view(shape) for name, piece, shape in zip(checkpoint.layers, pieces, shapes, strict=True)}


def stored_scales(path: Path, goal: Goal) -> Tensor:
    """All scales that a width or an allocation reads, float32, as one vector in the checkpoint's order of layers."""
    checkpoint = open_checkpoint(path)
    widths = checkpoint.widths(goal.widths)
    scales = find_scales(checkpoint, goal.allocation, widths) or widths_scales(checkpoint, widths)
    return torch.cat([scales[layer].float().flatten() for layer in checkpoint.layers])
