"""What an unfinished quantization leaves beside its destination, and how the same command goes on from it.

    .OUT.unfinished/
        run.json                 what the run is: model, text, arguments, version
        lock                     held while a process works here
        windows.safetensors      calibration token ids; written_windows.safetensors if the model wrote them itself
        outputs-00000.safetensors  output Hessians of a block
        token_weights.safetensors  written after all of these
        block-00000.safetensors  codes, scales and everything else of a block, with
        block-00000.json         what happened to its layers; written last, it says that the block is finished
        states-1-of-1/           the activations that enter the next block (``activations.Boundaries``), of each process
        log.jsonl
        checkpoint/              the output while it is put together
        committed                which checkpoint was put in its place; what is left to do is to tune it, or to clean up

Every file is replaced as a whole and flushed before the next depends on it, so that whatever kills the process, what is
there is either a finished block or nothing. The directory goes when the output stands.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from matgptq.checkpoints.format import REPORT_NAME
from matgptq.errors import CheckpointError, ConfigurationError, SourceError
from matgptq.files.atomic import replacing, write_text
from matgptq.files.directories import disk_errors, lock_directory
from matgptq.files.json_files import read_json
from matgptq.machine.distributed import ALONE, Processes

# What takes minutes to find, and is kept though no block is finished yet.
TOKEN_WEIGHTS, WRITTEN_WINDOWS = "token_weights.safetensors", "written_windows.safetensors"
_RUN = "run.json"
_COMMITTED = "committed"


class WorkDirectory:
    """The work directory of one destination.

    Use as a context manager. Leaving it with an exception keeps what is finished, if anything that takes long is;
    leaving it normally leaves nothing.

    Args:
        destination: the checkpoint that will be made.
        identity: JSON-ready; everything that the result depends on.
        resume: go on with what is there; otherwise it is thrown away.
        processes: that work on the same run. Only the first writes; the others read what it wrote.

    Raises:
        ConfigurationError: what is there belongs to a run with other arguments or inputs; names them.
        CheckpointError: another process works there, or it cannot be written.
    """

    def __init__(
        self, destination: Path, identity: Mapping[str, Any], *, resume: bool = True, processes: Processes = ALONE
    ) -> None:
        destination = Path(os.path.abspath(destination))
        self.path = work_path(destination)
        self._destination = destination
        self._identity = json.loads(json.dumps(identity))  # as it will be read: no tuples, keys are text
        self._resume = resume
        self._processes = processes
        self.is_same = False
        self._lock: IO[str] | None = None

    def __enter__(self) -> WorkDirectory:
        if self._processes.is_first:
            try:
                self._open()
            except BaseException:
                if self._lock is not None:  # or it would be held for as long as the error is kept
                    self._lock.close()
                raise
        self._processes.wait()
        return self

    def _open(self) -> None:
        with disk_errors(self._destination):
            existed = self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_directory(self.path, f"another process is working on {self._destination}")
        self.is_same = existed and self._resume and self._check_same()
        if not self.is_same:
            self._empty()
        shutil.rmtree(self.staging, ignore_errors=True)
        write_text(self.path / _RUN, json.dumps(self._identity, indent=2) + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is None:
            return
        shutil.rmtree(self.staging, ignore_errors=True)
        if kind is None or not (self._has_found or self.finished_blocks or (self.path / _COMMITTED).exists()):
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()  # last, so that nobody begins in a directory that is about to go

    @staticmethod
    def is_committed(destination: Path) -> bool:
        """Whether what stands at the destination was put there by a run that has not cleaned up, or not ended, yet."""
        try:
            mark = (work_path(Path(os.path.abspath(destination))) / _COMMITTED).read_text(encoding="ascii")
            return mark == _mark(destination)
        except (OSError, SourceError):
            return False

    def mark_commit(self) -> None:
        """Note which checkpoint is about to be moved to the destination."""
        write_text(self.path / _COMMITTED, _mark(self.staging))

    def drop_blocks(self) -> None:
        """Let go of everything that the checkpoint has now."""
        for each in self.path.iterdir():
            if each.is_dir():
                shutil.rmtree(each, ignore_errors=True)
            elif each.name not in ("lock", _RUN, _COMMITTED):
                each.unlink()

    @property
    def staging(self) -> Path:
        """Where the output is put together."""
        return self.path / "checkpoint"

    @property
    def finished_blocks(self) -> int:
        """How many blocks are done; they are done in order."""
        count = 0
        while self._record(count).is_file():
            count += 1
        return count

    def block_file(self, index: int) -> Path:
        """The tensors of a block."""
        return self.path / f"block-{index:05d}.safetensors"

    def finish_block(self, index: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Keep a block for good.

        Args:
            index: number of the block.
            tensors: all that the output will have of it.
            record: JSON-ready; what happened to its layers.
        """
        if not self._processes.is_first:
            return
        self.keep(self.block_file(index).name, tensors)
        write_text(self._record(index), json.dumps(record) + "\n")

    def block_record(self, index: int) -> dict[str, Any]:
        """What was kept with a finished block."""
        record: dict[str, Any] = json.loads(self._record(index).read_text(encoding="utf-8"))
        return record

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a file of tensors, whole or not at all."""
        with disk_errors(self._destination, self.kept), replacing(self.path / name) as beside:
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, beside)

    @contextmanager
    def scratch(self, name: str, count: int) -> Iterator[Tensor]:
        """Inside, float32 zeros ``[count]`` in a file that is mapped into memory and is gone afterwards."""
        file = self.path / name
        try:
            with disk_errors(self._destination, self.kept), file.open("wb") as handle:
                handle.truncate(4 * count)
                if hasattr(os, "posix_fallocate"):  # what lacks a place on the disk would kill the process later
                    os.posix_fallocate(handle.fileno(), 0, 4 * count)
            yield torch.from_file(str(file), shared=True, size=count)
        finally:
            file.unlink(missing_ok=True)

    def kept_or_made(
        self, name: str, make: Callable[[], Mapping[str, Tensor]], *, together: bool = False
    ) -> dict[str, Tensor]:
        """Tensors that were kept under a name, or else made now and kept.

        Args:
            name: of the file.
            make: makes them; called by the first process, or by all.
            together: all processes make them.
        """
        file = self.path / name
        missing = not file.is_file()
        self._processes.wait()  # all have looked before one writes
        if missing and (together or self._processes.is_first):
            made = make()
            if self._processes.is_first:
                self.keep(name, made)
        self._processes.wait()
        try:
            tensors: dict[str, Tensor] = load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: damaged ({error}); --no-resume begins anew") from error
        return tensors

    @property
    def kept(self) -> str:
        """What a message says about the state of the work."""
        count = self.finished_blocks
        if not count and not self._has_found:
            return "nothing was left behind"
        finished = f"{count} finished blocks are" if count else "what was found out before the first block is"
        return f"{finished} kept in {self.path}; the same command goes on from there"

    @property
    def _has_found(self) -> bool:
        return any((self.path / name).is_file() for name in (TOKEN_WEIGHTS, WRITTEN_WINDOWS))

    def _record(self, index: int) -> Path:
        return self.path / f"block-{index:05d}.json"

    def _check_same(self) -> bool:
        """Whether what is there belongs to this run; refuses to throw away finished blocks of another one."""
        try:
            before = json.loads((self.path / _RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = None
        if not isinstance(before, dict):  # killed before anything was known
            return False
        changed = [*_differences(before, self._identity)]
        if changed and (self.finished_blocks or self.is_committed(self._destination)):
            raise ConfigurationError(
                f"{self.path} holds an unfinished run with other inputs ({'; '.join(changed)}): "
                "repeat that command to finish it, or begin anew with --no-resume"
            )
        return not changed

    def _empty(self) -> None:
        for each in self.path.iterdir():
            if each.is_dir():
                shutil.rmtree(each, ignore_errors=True)
            elif each.name != "lock":
                each.unlink()


def _mark(checkpoint: Path) -> str:
    """What tells a checkpoint from others, of the same inputs too: its report has times in it.

    Scales that are tuned later change nothing but the report's part about them.
    """
    report = {name: value for name, value in read_json(checkpoint / REPORT_NAME).items() if name != "refinement"}
    return hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()


def kept_bytes(destination: Path) -> int:
    """Size of what an unfinished run has left, or this one has written."""
    files = work_path(Path(os.path.abspath(destination))).rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def work_path(destination: Path) -> Path:
    """The work directory of a destination."""
    return destination.with_name(f".{destination.name}.unfinished")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What two nested records differ in: ``group_size: 64, was 128``."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {_short(new)}, was {_short(old)}")
    return found


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
