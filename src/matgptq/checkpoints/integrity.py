"""Whether a checkpoint on disk still is what was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from matgptq.checkpoints.allocation_scales import damage_of
from matgptq.checkpoints.allocation_store import ALLOCATIONS
from matgptq.checkpoints.checkpoint import Checkpoint, is_checkpoint, open_checkpoint
from matgptq.checkpoints.format import EXPORT_NAME, is_scales
from matgptq.errors import CheckpointError, SourceError
from matgptq.files.checksums import read_checksum, read_checksums
from matgptq.files.stored_tensors import TensorInfo, data_starts, read_headers, read_tensor
from matgptq.progress import Progress, Silent

_STEP = 1 << 20  # bytes of one step of the progress bar


@dataclass(frozen=True)
class Damage:
    """One tensor that is not as it was written.

    Attributes:
        file: that holds it.
        tensor: its name.
        problem: what is wrong, as the rest of a sentence.
    """

    file: str
    tensor: str
    problem: str


@dataclass(frozen=True)
class Integrity:
    """What a check of the files found.

    Attributes:
        directory: checked.
        kind: ``checkpoint``, ``slice`` or ``export``.
        files: number of safetensors files.
        tensors: number of tensors in them.
        bytes: of those.
        checked: tensors whose checksum is right; None if there are no checksums to check against.
        damage: everything that is wrong.
    """

    directory: Path
    kind: str
    files: int
    tensors: int
    bytes: int
    checked: int | None
    damage: tuple[Damage, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong, as far as could be checked."""
        return not self.damage

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **vars(self),
            "directory": str(self.directory),
            "damage": [asdict(damage) for damage in self.damage],
            "passed": self.passed,
        }


def check_integrity(directory: str | Path, *, progress: Progress | None = None) -> Integrity:
    """Check structure, scales and the checksum of every tensor; a few megabytes are in memory at a time.

    Args:
        directory: a checkpoint, a slice, or an export to safetensors files.
        progress: receives stages.

    Raises:
        CheckpointError: neither, or files that cannot be read as what they are; the message names the file or layer.
    """
    progress = progress or Silent()
    directory = Path(directory)
    kind, tensors, checkpoint = _open(directory)
    known = read_checksums(directory)
    damage = []
    files = {info.file for info in tensors.values()}
    starts = {file: data_starts(file) for file in files}
    progress.start("check", max(1, sum(info.bytes for info in tensors.values()) // _STEP))
    steps = _Steps(progress)
    checked = 0
    for name, info in tensors.items():
        found = None
        if known is not None:
            try:
                found = read_checksum(name, info, starts[info.file][info.name], steps.take)
            except SourceError as error:
                raise CheckpointError(str(error)) from error
        else:
            steps.take(info.bytes)
        if known is not None and name not in known:
            damage.append(Damage(str(info.file), name, "is not among the checksums: it was added or renamed"))
        elif known is not None and found != known[name]:
            damage.append(Damage(str(info.file), name, "is not what was written: its checksum differs"))
        elif kind != "export" and is_scales(name.rpartition(".")[2]) and not _is_usable(name, info):
            damage.append(Damage(str(info.file), name, "holds NaN, Inf or zero"))
        else:
            checked += 1
    for name in sorted(set(known or ()) - set(tensors)):
        damage.append(Damage(str(directory), name, "is missing: no file holds it"))
    if checkpoint is not None:
        damage += _damaged_allocations(checkpoint)
    size = sum(info.bytes for info in tensors.values())
    return Integrity(directory, kind, len(files), len(tensors), size, None if known is None else checked, tuple(damage))


def _damaged_allocations(checkpoint: Checkpoint) -> Iterator[Damage]:
    for file in sorted((checkpoint.path / ALLOCATIONS).glob("*.json")):
        problem = damage_of(checkpoint, file)
        if problem is not None:
            yield Damage(str(file), file.stem, f"is damaged, or scales of its own are: {problem}")


def _open(directory: Path) -> tuple[str, Mapping[str, TensorInfo], Checkpoint | None]:
    if is_checkpoint(directory) or not (directory / EXPORT_NAME).is_file():
        checkpoint = open_checkpoint(directory, slices=True)
        return "slice" if checkpoint.settings.is_slice else "checkpoint", checkpoint.tensors, checkpoint
    try:
        return "export", read_headers(directory), None
    except SourceError as error:
        raise CheckpointError(f"{error}; an export of another kind can be compared: --against OUT") from error


def _is_usable(name: str, info: TensorInfo) -> bool:
    scales = read_tensor(info)
    return bool((torch.isfinite(scales) & (scales != 0)).all())


class _Steps:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bytes = 0

    def take(self, count: int) -> None:
        before = self._bytes // _STEP
        self._bytes += count
        if self._bytes // _STEP > before:
            self._progress.advance(self._bytes // _STEP - before)
