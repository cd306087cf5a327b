"""Where things are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``MATGPTQ_CACHE``, or ``matgptq`` in the user's cache directory; it need not exist."""
    if root := os.environ.get("MATGPTQ_CACHE"):
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "matgptq"
