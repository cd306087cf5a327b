"""What a run that tunes scales leaves beside the checkpoint until it is done, and how it goes on from there.

    .OUT.refine/
        lock                   held while a process works here
        run.json               what the run is, and a digest of the scales that each width started from
        teacher.safetensors    what the full model says about the windows
        state-<width or allocation>.safetensors

``.OUT.refine-checkpoint`` is the checkpoint with new scales, while it is put together.

Each file is replaced as a whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from matgptq.checkpoints.checkpoint import Checkpoint
from matgptq.errors import CheckpointError, SourceError
from matgptq.files.atomic import json_text, save_tensors, write_text
from matgptq.files.directories import disk_errors, lock_directory
from matgptq.files.json_files import read_json
from matgptq.progress import Progress
from matgptq.tuning.goals import Goal, stored_scales
from matgptq.tuning.scales import TuningState

_RUN = "run.json"


def digest_of(tensor: Tensor) -> str:
    """Of the values as stored; scales in float32 are exact in float16."""
    values = tensor.detach().cpu().contiguous()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


class TuningWorkspace:
    """The directory of one checkpoint.

    Use as a context manager. Leaving it with an exception keeps what is there, leaving it normally leaves nothing.

    Raises:
        CheckpointError: another process tunes this checkpoint, or the directory cannot be written.
    """

    def __init__(self, checkpoint: Checkpoint, progress: Progress) -> None:
        self._checkpoint = checkpoint.path.resolve()
        self._progress = progress
        self.directory = self._checkpoint.with_name(f".{self._checkpoint.name}.refine")
        self._lock: IO[str] | None = None

    def __enter__(self) -> TuningWorkspace:
        with disk_errors(self._checkpoint):
            self.directory.mkdir(exist_ok=True)
            self._lock = lock_directory(self.directory, f"another process is tuning {self._checkpoint}")
            shutil.rmtree(self.staging, ignore_errors=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not (self.directory / _RUN).is_file():
            shutil.rmtree(self.directory, ignore_errors=True)
        if self._lock is not None:  # last, so that nobody begins in a directory that is about to go
            self._lock.close()
        if kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit) and self.directory.exists():
            self._progress.note(f"what is done is kept in {self.directory}; the same command goes on from there")

    @property
    def staging(self) -> Path:
        """Where the checkpoint is put together with new scales: as deep as it lies itself, for links in it."""
        return self.directory.with_name(f"{self.directory.name}-checkpoint")

    def begin(self, goals: Sequence[Goal], options: Mapping[str, Any]) -> None:
        """Go on with what is there, or begin anew where it is of another run, or the checkpoint has other scales.

        Args:
            goals: what is to be tuned.
            options: JSON-ready; everything else that the result depends on.
        """
        present = [(goal, digest_of(stored_scales(self._checkpoint, goal))) for goal in goals]
        if (self.directory / _RUN).exists():
            changed = self._changed(options, present)
            if not changed:
                self._progress.note(f"going on with what {self.directory} holds")
                return
            self._progress.note(f"{self.directory} cannot be gone on with ({', '.join(changed)}): beginning anew")
            for file in self.directory.glob("*.safetensors"):
                file.unlink()
        start = {goal.key: digest for goal, digest in present}
        write_text(self.directory / _RUN, json_text({**options, "start": start}))

    def _changed(self, options: Mapping[str, Any], present: Iterable[tuple[Goal, str]]) -> list[str]:
        try:
            run = read_json(self.directory / _RUN)
        except SourceError:
            return [f"{_RUN} cannot be read"]
        # Through JSON, which has no tuples.
        wanted = json.loads(json.dumps(options))
        changed = [f"{name} changed" for name, value in wanted.items() if run.get(name) != value]
        if changed:
            return changed
        try:
            self.teacher_states()
            states = [self.state(goal) for goal, _ in present]
        except CheckpointError as error:
            return [str(error)]
        for (goal, digest), state in zip(present, states, strict=True):
            made = digest_of(state.best) if state is not None and state.finished else None
            if digest not in (run["start"].get(goal.key), made):
                changed.append(f"scales of {goal.name} changed")
        return changed

    def keep_teacher_states(self, hidden: Tensor) -> None:
        """Keep what the full model says; ``hidden`` as ``Teacher`` has it."""
        save_tensors(self.directory / "teacher.safetensors", {"hidden": hidden})

    def teacher_states(self) -> Tensor | None:
        """What the full model said, if that is known."""
        kept = self._kept("teacher.safetensors")
        return None if kept is None else kept["hidden"]

    def keep_state(self, goal: Goal, state: TuningState) -> None:
        """Keep how far the tuning of a goal is."""
        save_tensors(self.directory / _state_name(goal), state.to_tensors())

    def state(self, goal: Goal) -> TuningState | None:
        """How far the tuning of a goal is, if it has begun."""
        kept = self._kept(_state_name(goal))
        return None if kept is None else TuningState.from_tensors(kept)

    def _kept(self, name: str) -> dict[str, Tensor] | None:
        file = self.directory / name
        try:
            return load_file(file) if file.is_file() else None
        except SafetensorError as error:
            raise CheckpointError(f"{file}: damaged ({error})") from error


def _state_name(goal: Goal) -> str:
    return f"state-{goal.key}.safetensors"
