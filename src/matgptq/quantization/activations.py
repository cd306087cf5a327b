"""Calibration activations between two blocks: in memory, or in files where they do not fit.

Both are lists of tensors to whoever uses them. Files are read when a tensor is asked for and replaced as a whole when
one is set; their pages are the system's to drop, so that memory holds no more than what is being worked on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, MutableSequence
from pathlib import Path
from typing import Any, Literal, get_args, overload

from safetensors.torch import load_file
from torch import Tensor

from matgptq.errors import CheckpointError, ConfigurationError
from matgptq.files.atomic import save_tensors

Placement = Literal["auto", "memory", "disk"]
_NAME = "states"


def check_placement(placement: str) -> Placement:
    """Refuse what is not a place for activations."""
    if placement not in get_args(Placement):
        raise ConfigurationError(f"activations are kept in memory, on disk or auto, not {placement!r}")
    return placement  # type: ignore[return-value]


class FileTensors(MutableSequence[Tensor]):
    """A list of tensors of which each is a file.

    Args:
        directory: theirs alone; made if it does not exist, and what is in it belongs to the list.
        tensors: to append at once.

    Raises:
        CheckpointError: the disk is full, or the directory cannot be written.
    """

    def __init__(self, directory: Path, tensors: Iterable[Tensor] = ()) -> None:
        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{directory}: cannot be written: {error}") from error
        self._count = len(list(directory.glob("*.safetensors")))
        self.extend(tensors)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> MutableSequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(self._count))]
        return load_file(self._file(self._place(index)))[_NAME]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._write(self._place(index), value)

    def __delitem__(self, index: Any) -> None:
        raise TypeError("states are replaced, never removed")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(self._count))

    def insert(self, index: int, value: Tensor) -> None:
        """Append; states have an order, the windows'."""
        if index != self._count:
            raise TypeError("states can only be appended")
        self._write(index, value)
        self._count += 1

    def _place(self, index: int) -> int:
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return index % self._count

    def _file(self, index: int) -> Path:
        return self._directory / f"{index:06d}.safetensors"

    def _write(self, index: int, tensor: Tensor) -> None:
        save_tensors(self._file(index), {_NAME: tensor}, durable=False)


class Boundaries:
    """The states that enter each block, kept in files from one block to the next.

    They are what an interrupted run goes on from. A set of files counts once a mark says that it is whole; the one
    before it is removed then.

    Args:
        directory: theirs alone.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def keep(self, block: int, streams: Iterable[Iterable[Tensor]]) -> list[FileTensors]:
        """Write the states that enter block number ``block``, one list for each stream of windows."""
        place = self._directory / f"{block:06d}"
        shutil.rmtree(place, ignore_errors=True)
        written = [FileTensors(place / str(number), stream) for number, stream in enumerate(streams)]
        self.finish(block)
        return written

    def begin(self, block: int, streams: int) -> list[FileTensors]:
        """Empty lists for the states that enter a block; ``finish`` says that they are whole."""
        place = self._directory / f"{block:06d}"
        shutil.rmtree(place, ignore_errors=True)
        return [FileTensors(place / str(number)) for number in range(streams)]

    def finish(self, block: int) -> None:
        """The states that enter this block are whole; those of other blocks are not needed any more."""
        try:
            (self._directory / f"{block:06d}" / "whole").touch()
        except OSError as error:
            raise CheckpointError(f"{self._directory}: cannot be written: {error}") from error
        for place in self._directory.iterdir():
            if place.name != f"{block:06d}":
                shutil.rmtree(place, ignore_errors=True)

    def latest(self, most: int) -> tuple[int, list[FileTensors]] | None:
        """The last block up to ``most`` whose states are there whole, and the states; None if there is none."""
        if not self._directory.is_dir():
            return None
        for place in sorted(self._directory.iterdir(), reverse=True):
            if int(place.name) <= most and (place / "whole").exists():
                streams = sorted((each for each in place.iterdir() if each.is_dir()), key=lambda each: int(each.name))
                return int(place.name), [FileTensors(each) for each in streams]
        return None
