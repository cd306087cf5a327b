"""Which releases of vLLM the plugin works with."""

from __future__ import annotations

import re

from matgptq.errors import ConfigurationError

OLDEST = (0, 26)


def check_version(version: str | None = None) -> None:
    """Refuse a vLLM that is too old.

    Args:
        version: of vLLM; by default the one that is installed.

    Raises:
        ConfigurationError: it is older than the oldest whose interfaces the plugin uses.
    """
    if version is None:
        from vllm.version import __version__

        version = str(__version__)
    numbers = re.match(r"(\d+)\.(\d+)", version)
    # A build from source may be called "dev": it knows what it does.
    if numbers is not None and tuple(map(int, numbers.groups())) < OLDEST:
        raise ConfigurationError(
            f"vLLM {version} is too old for matgptq, which needs {'.'.join(map(str, OLDEST))} or later; "
            "update it, or serve an export: matgptq export OUT --bits 4 --format compressed-tensors -o DIR"
        )
