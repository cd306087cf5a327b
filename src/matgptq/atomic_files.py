"""Small files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from matgptq.errors import CheckpointError


def write_text(file: Path, text: str) -> None:
    """Write beside the destination, flush to disk, rename; the directory is created.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written: {error}") from error
