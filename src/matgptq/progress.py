"""How long work tells what it is doing, which the command line draws and the library keeps silent, and its time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Receives the stages of a run. Implementations must be cheap to call."""

    def start(self, stage: str, total: int) -> None:
        """A stage of ``total`` equal steps begins; it ends the one before."""

    def advance(self, steps: int = 1) -> None:
        """Some steps of the present stage are done."""

    def note(self, message: str) -> None:
        """Something the user should know: a smaller default, a fallback."""


class Silent:
    """No output."""

    def start(self, stage: str, total: int) -> None: ...

    def advance(self, steps: int = 1) -> None: ...

    def note(self, message: str) -> None: ...


# Receives how much of something is done, and how much there is.
Counted = Callable[[int, int], None]


def counting_steps(progress: Progress, steps: int) -> Counted:
    """Receives (done, in all) in any unit, and advances a stage of so many steps by as much."""
    reached = 0

    def report(done: int, total: int) -> None:
        nonlocal reached
        now = done * steps // total if total else reached
        progress.advance(now - reached)
        reached = now

    return report


class StageClock:
    """Wall time by stage. Attributes: ``laps``, ``{stage: seconds}`` of the stages that are over."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """A stage is over; the next begins."""
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 3)
        self._last = now
