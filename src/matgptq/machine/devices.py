"""Choice of device and dtype from what the user said and what there is."""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from matgptq import native
from matgptq.errors import ConfigurationError
from matgptq.machine.tiled_attention import TiledAttention

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """``auto`` is CUDA when there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigurationError(f"unknown device {device!r}: use auto, cpu or cuda") from error
    if resolved.type == "meta":
        raise ConfigurationError("nothing can be computed on the device meta: use auto, cpu or cuda")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device cuda was asked for, but PyTorch sees no CUDA device")
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device, stored: str | None) -> torch.dtype:
    """``auto`` is float32 on the CPU, where it costs little, and the model's own dtype on a GPU.

    Args:
        dtype: ``auto``, a name or a torch dtype.
        device: where the model will run.
        stored: the dtype that ``config.json`` names, if any.
    """
    if isinstance(dtype, torch.dtype):
        name = str(dtype).removeprefix("torch.")
    elif dtype == "auto":
        name = "float32" if device.type == "cpu" else (stored or "bfloat16")
    else:
        name = dtype
    if name not in _DTYPES:
        raise ConfigurationError(f"dtype must be auto, float32, bfloat16 or float16, not {dtype!r}")
    return _DTYPES[name]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are faster than float32 ones there."""
    if device.type == "cpu":
        if platform.machine().lower() in ("aarch64", "arm64"):  # of which torch.cpu says nothing, but oneDNN does
            supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
            return supported is not None and bool(supported())
        # Without these instructions bfloat16 is slower than float32.
        return _supports("_is_amx_tile_supported") or _supports("_is_avx512_bf16_supported")
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _supports(name: str) -> bool:
    """What ``torch.cpu`` says; its names have an underscore, but there are no others."""
    check = getattr(torch.cpu, name, None)
    return check is not None and bool(check())


class _MediumPrecision:
    """PyTorch's precision of float32 products, which is one for all threads, while any of them wants it lower.

    They multiply in bfloat16 where that is faster; sums stay float32.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = ""

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("medium")
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                torch.set_float32_matmul_precision(self._before)


MEDIUM_PRECISION = _MediumPrecision()


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Let a float32 model on a CPU that multiplies bfloat16 do so; sums, and what is added up, stay float32.

    For what averages over thousands of tokens (Hessians, gradients that weigh tokens, activations that go from block to
    block while a model is quantized), not for measuring a model. Elsewhere nothing changes: a model on a GPU is run in
    the dtype that it was loaded in. May be entered in several threads.
    """
    if device.type != "cpu" or not multiplies_bfloat16(device):
        yield
        return
    with MEDIUM_PRECISION, torch.autocast("cpu", torch.bfloat16), fast_attention(device):
        yield


def exact_products(device: torch.device) -> AbstractContextManager[object]:
    """Inside, float32 products on a CPU are made by the faster of PyTorch's two libraries that keep them float32.

    PyTorch asks MKL, whose AVX-512 code is for Intel's processors only, unless products may be of bfloat16 factors:
    then it asks oneDNN, which rounds factors where there are matrix tiles for them and nowhere else. On one core of a
    Zen 5 the former reaches 90 GFLOP/s, the latter 200. May be entered in several threads.
    """
    return MEDIUM_PRECISION if device.type == "cpu" and _onednn_is_faster_and_exact() else nullcontext()


def _onednn_is_faster_and_exact() -> bool:
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not _supports("_is_amx_tile_supported")
        and native.available()
        and native.cpu_vendor() == "amd"
    )


def fast_attention(device: torch.device) -> AbstractContextManager[object]:
    """Inside, this thread's causal attention is in bfloat16 and in tiles where PyTorch's own kernel is slow."""
    tiles = _supports("_is_amx_tile_supported")
    return TiledAttention() if device.type == "cpu" and multiplies_bfloat16(device) and not tiles else nullcontext()


@contextmanager
def fast_sums(device: torch.device) -> Iterator[None]:
    """``fast_products`` for products whose result must be float32."""
    if device.type != "cpu" or not multiplies_bfloat16(device):
        yield
        return
    with MEDIUM_PRECISION:
        yield
