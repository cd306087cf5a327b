"""What a long command did, line by line, for programs: a JSON-lines file always, Weights & Biases when asked for."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from matgptq.errors import CheckpointError, ConfigurationError

LOG_NAME = "log.jsonl"


class RunLog:
    """Events of one run, appended to a file as they happen.

    Args:
        file: to append to; its directory is created.
        wandb_project: also log to this project of Weights & Biases, which is imported only then.
        config: settings of the run, the first line.

    Raises:
        ConfigurationError: wandb is asked for and not installed.
        CheckpointError: the file cannot be written.
    """

    def __init__(self, file: Path, config: Mapping[str, Any], *, wandb_project: str | None = None) -> None:
        self._file = file
        self._run: Any = None
        if wandb_project is not None:
            check_wandb(wandb_project)
            import wandb

            self._run = wandb.init(project=wandb_project, config=dict(config))
        self.write("start", **config)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.write("end", error=None if error is None else f"{type(error).__name__}: {error}")
        if self._run is not None:
            self._run.finish(exit_code=0 if error is None else 1)

    def write(self, event: str, **values: Any) -> None:
        """Add one line: the event, the time in seconds since the epoch, and the values (JSON-ready)."""
        # JSON has no infinity; readers in other languages stop at Python's word for it.
        known = {key: None if _unwritable(value) else value for key, value in values.items()}
        line = json.dumps({"event": event, "time": round(time.time(), 3), **known}, ensure_ascii=False)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as handle:
                handle.write(line + "\n")
        except OSError as error:
            raise CheckpointError(f"{self._file}: cannot be written: {error}") from error
        if self._run is not None:
            numbers = {key: value for key, value in known.items() if isinstance(value, int | float)}
            self._run.log({f"{event}/{key}": value for key, value in numbers.items()})


def check_wandb(project: str | None) -> None:
    """Refuse a wish for Weights & Biases where it is not installed; nothing is imported."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigurationError('--wandb needs Weights & Biases: pip install "matgptq[wandb]"')


def _unwritable(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
