"""Where ``libmatgptq`` is, whether it can be used, and what its C interface looks like (``csrc/matgptq.h``).

Nothing is loaded on import; the library is loaded at the first call.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from matgptq.errors import ConfigurationError, MatGPTQError

Activations = Literal["exact", "int8"]
Gate = Literal["silu", "gelu_tanh"]
SweepMode = Literal["residual", "change", "mean"]

_ABI_VERSION = 12
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS = {"exact": 0, "int8": 1}
GATES = {"silu": 0, "gelu_tanh": 1}
SWEEP_MODES = {"residual": 0, "change": 1, "mean": 2}
BLOCK_NORMS = ("first", "second", "query", "key", "attention", "mlp")
GROUP_UNIT = 32
_lent = False

_pointer, _int, _int64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class NativeUnavailableError(MatGPTQError, RuntimeError):
    """A native kernel was called but the library is missing or unusable; the message is that of ``reason()``."""


class Product(ctypes.Structure):
    _fields_ = (
        ("weight", _pointer),
        ("bits", _int),
        ("bias", _pointer),
        ("y", _pointer),
        ("y_stride", _int64),
    )


class Block(ctypes.Structure):
    _fields_ = (
        ("dtype", _int),
        ("activations", _int),
        ("gate", _int),
        ("norms_from_one", _int),
        ("hidden", _int64),
        ("size", _int64),
        ("scale", ctypes.c_float),
        *((f"{name}_eps", ctypes.c_float) for name in BLOCK_NORMS),
        *((f"{name}_norm", _pointer) for name in BLOCK_NORMS),
        ("products", Product * 7),
    )


class SweepJob(ctypes.Structure):
    _fields_ = (
        ("rows", _int64),
        ("in_features", _int64),
        ("num_groups", _int64),
        ("num_widths", _int),
        ("widths", _pointer),
        ("weights", _pointer),
        ("base", _pointer),
        ("trail", _pointer),
        ("coupling", _pointer),
        ("scales", _pointer),
        ("group_of", _pointer),
        ("codes", _pointer),
        ("mode", _int),
        ("num_threads", _int),
    )


class SearchJob(ctypes.Structure):
    _fields_ = (
        ("rows", _int64),
        ("in_features", _int64),
        ("group_size", _int64),
        ("num_candidates", _int),
        ("num_pieces", _int),
        ("weight", _pointer),
        ("importance", _pointer),
        ("candidates", _pointer),
        ("breakpoints", _pointer),
        ("mean_level", _pointer),
        ("spread", _pointer),
        ("best", _pointer),
        ("num_threads", _int),
    )


class RefitJob(ctypes.Structure):
    _fields_ = (
        ("rows", _int64),
        ("in_features", _int64),
        ("group_size", _int64),
        ("difference", _pointer),
        ("current", _pointer),
        ("hessian", _pointer),
        ("system", _pointer),
        ("slope", _pointer),
        ("errors", _pointer),
        ("num_threads", _int),
    )


_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "abi_version": (_int, ()),
    "message": (ctypes.c_char_p, (_int,)),
    "isa": (ctypes.c_char_p, ()),
    "set_isa": (_int, (ctypes.c_char_p,)),
    "cpu_vendor": (ctypes.c_char_p, ()),
    "set_team": (None, (_pointer,)),
    "arena_create": (_pointer, (_int64,)),
    "arena_free": (None, (_pointer,)),
    "arena_bytes": (_int64, (_pointer,)),
    "pack": (
        _int,
        (_pointer, _int64, _int64, _int64, _int64, _int, _int, _pointer, _pointer, _pointer, _int, _pointer),
    ),
    "weight_free": (None, (_pointer,)),
    "weight_bytes": (_int64, (_pointer,)),
    "weight_bytes_read": (_int64, (_pointer, _int)),
    "matmul": (_int, (_pointer, _int, _int64, _int64, _int64, _pointer, _int, _int, _int, _int)),
    "dequantize": (_int, (_pointer, _int, _int64, _int64, _pointer, _int, _int64, _int)),
    "dense": (
        _int,
        (
            *(_pointer, _int, _int64, _int64, _int64),
            *(_pointer, _int, _int64, _int64),
            *(_pointer, _pointer, _int, _int64, _int),
        ),
    ),
    "read": (ctypes.c_uint64, (_pointer, _int64, _int)),
    "sweep": (_int, (_pointer,)),
    "search_scales": (_int, (_pointer,)),
    "refit": (_int, (_pointer,)),
    "block_start": (_int, (_pointer, _pointer, _int64, _pointer, _pointer, _pointer, _int)),
    "block_finish": (_int, (_pointer, _pointer, _int64, _pointer, _int, _pointer, _int64, _pointer, _int)),
    "blocks": (_int, (_pointer, _int, _pointer, _int64, _pointer, _pointer, _pointer, _pointer, _int)),
}


def _library_files() -> list[Path]:
    forced = os.environ.get("MATGPTQ_NATIVE_LIBRARY")
    if forced:
        return [Path(forced)]
    # An editable install keeps the library beside the installed copy of the package, not beside this file.
    places = [Path(place) / "_native" for place in importlib.import_module("matgptq").__path__]
    return [file for place in places for pattern in ("libmatgptq.*", "matgptq.dll") for file in place.glob(pattern)]


@functools.cache
def load_library() -> tuple[ctypes.CDLL | None, str]:
    files = _library_files()
    if not files:
        return None, "libmatgptq is not installed: the package was built without a C++ compiler; reinstall with one"
    try:
        library = ctypes.CDLL(str(files[0]))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"matgptq_{name}")
            function.restype = result
            function.argtypes = arguments
    except (OSError, AttributeError) as error:
        return None, f"libmatgptq cannot be loaded: {error}"
    version = library.matgptq_abi_version()
    if version != _ABI_VERSION:
        return None, f"libmatgptq has interface {version}, this package needs {_ABI_VERSION}; reinstall matgptq"
    _lend(library, _torch_team())
    return library, ""


def _torch_team() -> int | None:
    """Address of the function that hands work to torch's own threads; None where torch has no OpenMP.

    A pool of our own beside torch's would cost more than it brings: OpenMP's threads spin for milliseconds after each
    of torch's operations, and ours would wait for the processors they spin on.
    """
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Searches what libtorch_cpu was linked with, so that it is the runtime that torch uses, if there are several.
        return ctypes.cast(ctypes.CDLL(str(torch_library)).GOMP_parallel, _pointer).value
    except (OSError, AttributeError):
        return None


def _lend(library: ctypes.CDLL, team: int | None) -> None:
    global _lent
    library.matgptq_set_team(team)
    _lent = team is not None


def share_threads(share: bool) -> None:
    """Compute on torch's threads (the default where they are OpenMP's), or on a pool of the library's own."""
    _lend(require_library(), _torch_team() if share else None)


def shares_threads() -> bool:
    """Whether the library computes on torch's threads."""
    require_library()
    return _lent


def available() -> bool:
    """Whether the native library is there and usable."""
    return load_library()[0] is not None


def reason() -> str:
    """Why the native library is not available; empty when it is."""
    return load_library()[1]


def require_library() -> ctypes.CDLL:
    library, why = load_library()
    if library is None:
        raise NativeUnavailableError(why)
    return library


def isa() -> str:
    """The instruction set in use: ``amx``, ``avx512``, ``avx_vnni``, ``avx2``, ``neon_dot``, ``neon`` or ``scalar``."""
    name: bytes = require_library().matgptq_isa()
    return name.decode()


def cpu_vendor() -> str:
    """Who made this CPU: ``"intel"``, ``"amd"`` or ``"other"``."""
    name: bytes = require_library().matgptq_cpu_vendor()
    return name.decode()


def set_isa(name: str) -> None:
    """Force an instruction set, for tests and measurements; raise ``ConfigurationError`` if this CPU lacks it."""
    check_status(require_library().matgptq_set_isa(name.encode()))


def check_status(status: int) -> None:
    if status == 0:
        return
    text = require_library().matgptq_message(status).decode()
    if status == -5:
        raise MemoryError(f"matgptq kernels: {text}")
    raise ConfigurationError(f"matgptq kernels: {text}")


def thread_count(num_threads: int | None) -> int:
    if num_threads is None:
        return torch.get_num_threads()
    if num_threads < 1:
        raise ConfigurationError(f"num_threads must be at least 1, not {num_threads}")
    return num_threads


def expect_tensor(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor, contiguous, if it is on the CPU and of that dtype and shape."""
    if tensor.device.type != "cpu":
        raise ConfigurationError(f"{name} must be on the CPU, not on {tensor.device}")
    if tensor.dtype != dtype:
        raise ConfigurationError(f"{name} must be {dtype}, not {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ConfigurationError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
    return tensor.contiguous()
