"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from matgptq.errors import CheckpointError


@contextmanager
def replacing(file: Path, *, durable: bool = True) -> Iterator[Path]:
    """A path beside a file, to be written inside; on leaving, it takes the file's place, or after an error goes away.

    A hard link to the old file keeps what it had. The file's permissions are what the umask says, whoever writes it:
    safetensors makes files that nobody but their owner can read.

    Args:
        file: to be replaced, or made; its directory must be there.
        durable: flush to disk first, so that a power cut leaves either content and not a part of one.
    """
    beside = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        beside.touch()
        permissions = beside.stat().st_mode
        yield beside
        beside.chmod(permissions)
        if durable:
            with beside.open("rb") as handle:
                os.fsync(handle.fileno())
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a text file; its directory is created.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as beside:
            beside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written: {error}") from error


def save_tensors(file: Path, tensors: Mapping[str, Tensor], *, durable: bool = True) -> None:
    """Write a safetensors file.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    try:
        with replacing(file, durable=durable) as beside:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be written: {error}") from error


def json_text(value: Mapping[str, Any]) -> str:
    """JSON as it is written to files."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
