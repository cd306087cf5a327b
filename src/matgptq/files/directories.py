"""Directories that change as a whole: made beside their place, flushed to disk, swapped in."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO

from safetensors import SafetensorError

from matgptq.errors import CheckpointError

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]


class disk_errors:
    """Turn a full disk or a read-only directory into an error that says so."""

    def __init__(self, destination: Path, left: str = "nothing was left behind") -> None:
        self.destination = destination
        self.left = left

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(f"{self.destination}: cannot be written: {error}; {self.left}") from error


def directory_beside(destination: Path, role: str) -> Path:
    """A name that no other run takes, on the same file system and hidden."""
    return destination.with_name(f".{destination.name}.{role}-{secrets.token_hex(4)}")


def sync(path: Path) -> None:
    """Make a file or directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> None:
    """Swap two directories, in one step where the system can."""
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 and renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0:
        return
    aside = directory_beside(second, "replaced")
    os.rename(second, aside)
    try:
        os.rename(first, second)
    except BaseException:
        os.rename(aside, second)
        raise
    os.rename(aside, first)


def remove_whole(path: Path) -> None:
    """Remove a directory, or only the link where it is one."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def link_or_copy(source: str, target: str) -> None:
    """A hard link, or a copy where there are none; for ``shutil.copytree``."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def lock_directory(directory: Path, message: str) -> IO[str]:
    """Take the lock of a directory that one process may work in; it is held until the file is closed.

    Raises:
        CheckpointError: another process has it; with the message.
    """
    lock = (directory / "lock").open("w")
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise CheckpointError(f"{directory}: {message}") from error
    return lock
