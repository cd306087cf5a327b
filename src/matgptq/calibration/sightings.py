"""What layers see while a block is run, noted by hooks for later; windows may be run in several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from matgptq.core.hessian import hessian_rows


@dataclass(frozen=True)
class Sighting:
    """What one layer saw of some windows.

    Attributes:
        total: full name of the layer whose Hessian it belongs to.
        inputs: ``[..., in]``, or what gives them where they would be too many to keep.
        row_weights: one for each row, or None for ones.
        count: of the rows.
    """

    total: str
    inputs: Tensor | Callable[[], Tensor]
    count: int
    row_weights: Tensor | None = None

    def rows(self) -> Tensor:
        """float32 ``[rows, in]`` whose ``X^T X`` belongs to the Hessian."""
        inputs = self.inputs if isinstance(self.inputs, Tensor) else self.inputs()
        return hessian_rows(inputs, self.row_weights)

    def ready(self) -> Sighting:
        """The same with its rows made."""
        return replace(self, inputs=self.rows(), row_weights=None)


@dataclass
class Notes:
    """What one thread's hooks noted of some windows.

    Attributes:
        sightings: in the order of the run.
        expert_tokens: how many tokens the router gave to each expert that is watched.
    """

    sightings: list[Sighting] = field(default_factory=list)
    expert_tokens: dict[int, int] = field(default_factory=dict)


class Watch(threading.local):
    """Where hooks note what layers see; each thread has notes of its own.

    Attributes:
        windows: which are being run; a layer may see them flattened.
        notes: of these windows.
        row_weights: of the tokens of the expert that runs.
    """

    windows: slice
    notes: Notes
    row_weights: Tensor | None

    def begin(self, windows: slice) -> Notes:
        """This thread runs these windows from now on."""
        self.windows, self.notes = windows, Notes()
        return self.notes
