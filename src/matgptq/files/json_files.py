"""JSON files that others may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matgptq.errors import SourceError

_MAX_JSON_BYTES = 1 << 28


def read_json(file: Path) -> dict[str, Any]:
    """Parse a JSON object; raises ``SourceError`` naming the file.

    Only a regular file (or a link to one) is opened, and no larger one than any model has: a pipe would wait for ever,
    a device never end.
    """
    try:
        if file.exists() and not file.is_file():
            raise SourceError(f"{file}: not a file")
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise SourceError(f"{file}: too large for JSON ({file.stat().st_size:,} bytes)")
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise SourceError(f"{file}: not a JSON object")
    return value
