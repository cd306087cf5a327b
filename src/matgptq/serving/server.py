"""A server of a checkpoint's widths: what it needs, where it listens, how it runs."""

from __future__ import annotations

import socket

from matgptq.errors import ConfigurationError
from matgptq.serving.served_models import ServedModels

_TRANSFORMERS = (5, 25)  # the first whose handlers of requests ask an engine for texts


def require_packages() -> None:
    """Refuse to serve where a package for it is missing or old; raises ``ConfigurationError``."""
    import transformers
    from packaging.version import Version
    from transformers.utils.import_utils import is_serve_available

    if Version(transformers.__version__).release[:2] < _TRANSFORMERS:
        oldest = ".".join(map(str, _TRANSFORMERS))
        raise ConfigurationError(
            f"serving needs transformers {oldest} or newer, and this is {transformers.__version__}: "
            'pip install --upgrade "matgptq[serve]"'
        )
    if not is_serve_available():
        raise ConfigurationError('serving needs FastAPI, Uvicorn and the OpenAI client: pip install "matgptq[serve]"')


def listen(host: str, port: int) -> socket.socket:
    """A socket that requests will come to; port 0 takes a free one.

    Raises:
        ConfigurationError: the address is taken, or not one of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error}") from error


def serve(models: ServedModels, listener: socket.socket, parallel: int, cache_bytes: int) -> None:
    """Answer requests until the process is told to stop; ``parallel`` and ``cache_bytes`` as for ``make_app``."""
    import uvicorn

    from matgptq.serving.app import make_app

    uvicorn.Server(uvicorn.Config(make_app(models, parallel, cache_bytes), log_level="info")).run([listener])
