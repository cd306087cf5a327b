"""Checksums of stored tensors, and the file of a checkpoint that holds them: ``docs/format.md``, section 12.

SHA-256, because processors have instructions for it: with them it is the fastest hash in Python's standard library that
nobody can forge.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matgptq.errors import CheckpointError, SourceError
from matgptq.files.atomic import write_text
from matgptq.files.json_files import read_json
from matgptq.files.stored_tensors import TensorInfo, data_starts, read_headers

if TYPE_CHECKING:
    from hashlib import _Hash

CHECKSUMS_NAME = "checksums.json"
ALGORITHM = "sha256"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_AT_A_TIME = 1 << 22


def begin_checksum(name: str, dtype: str, shape: Sequence[int]) -> _Hash:
    """A hash that has taken a tensor's description; its bytes, as they are stored, are to follow.

    Args:
        name: of the tensor in the checkpoint.
        dtype: safetensors' name of it.
        shape: of the tensor.
    """
    return hashlib.sha256(f"{name} {dtype} {tuple(shape)}\n".encode())


def read_checksum(name: str, info: TensorInfo, start: int, advance: Callable[[int], None] = lambda _: None) -> str:
    """The checksum of a tensor as its file has it now; never holds more than a few megabytes.

    Args:
        name: of the tensor.
        info: its header.
        start: where in the file its bytes begin.
        advance: is called with every number of bytes read.

    Raises:
        SourceError: the file ends before the tensor does, or cannot be read.
    """
    digest = begin_checksum(name, info.dtype, info.shape)
    left = info.bytes
    try:
        with info.file.open("rb", buffering=0) as handle:
            handle.seek(start)
            while left:
                piece = handle.read(min(left, _AT_A_TIME))
                if not piece:
                    raise SourceError(f"{info.file}: ends inside tensor {name}")
                digest.update(piece)
                left -= len(piece)
                advance(len(piece))
    except OSError as error:
        raise SourceError(f"{info.file}: cannot be read: {error}") from error
    return digest.hexdigest()


def checksums_text(checksums: Mapping[str, str]) -> str:
    """The file's content."""
    return json.dumps({"algorithm": ALGORITHM, "tensors": dict(sorted(checksums.items()))}, indent=2) + "\n"


def read_checksums(directory: Path) -> dict[str, str] | None:
    """``{tensor: checksum}`` of a checkpoint, or None if it has none, as those of earlier releases.

    Raises:
        CheckpointError: the file is damaged, or of another algorithm; named.
    """
    file = directory / CHECKSUMS_NAME
    if not file.exists():
        return None
    try:
        record = read_json(file)
    except SourceError as error:
        raise CheckpointError(str(error)) from error
    if record.get("algorithm") != ALGORITHM:
        raise CheckpointError(f"{file}: algorithm {record.get('algorithm')!r}; this release knows {ALGORITHM}")
    tensors = record.get("tensors")
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{file}: no usable tensors in it")
    for name, digest in tensors.items():
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise CheckpointError(f"{file}: the checksum of {name} is not {ALGORITHM} in hexadecimal digits")
    return tensors


def stored_checksums(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Checksums of tensors as they lie in their files.

    Args:
        tensors: ``{name: header}``.
    """
    starts = {file: data_starts(file) for file in {info.file for info in tensors.values()}}
    return {name: read_checksum(name, info, starts[info.file][info.name]) for name, info in tensors.items()}


def write_checksums(directory: Path) -> None:
    """Give a directory of safetensors files that another program wrote the checksums of what lies there now.

    Raises:
        SourceError: its files are damaged.
        CheckpointError: it cannot be written.
    """
    write_text(directory / CHECKSUMS_NAME, checksums_text(stored_checksums(read_headers(directory))))
