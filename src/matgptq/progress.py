"""How long work tells what it is doing: an interface that the command line draws and the library keeps silent."""

from __future__ import annotations

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
