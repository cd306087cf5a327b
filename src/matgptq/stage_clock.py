"""Wall time by stage."""

from __future__ import annotations

import time


class StageClock:
    """Attributes: ``laps``, ``{stage: seconds}`` of the stages that are over."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """A stage is over; the next begins."""
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 3)
        self._last = now
