"""All kernels, and which of them computes a product.

    reference      PyTorch: dequantize the slice, multiply. Defines the result; runs anywhere
    native-fused   native library, few rows: codes are unpacked in registers, so a product costs the bytes of its width
    native-tiled   native library, many rows: stretches of rows are dequantized into cache and multiplied by PyTorch
    triton-fused   GPU, few rows: as native-fused, on tensor cores
    triton-tiled   GPU, many rows: as native-tiled

A kernel says what it refuses and why; the first that refuses nothing runs. ``MATGPTQ_KERNEL=name`` forces one.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from matgptq import native
from matgptq.errors import ConfigurationError
from matgptq.gpu import layout as gpu_layout
from matgptq.gpu import support as gpu_support
from matgptq.gpu.layout import PlaneWeight
from matgptq.kernels.packed_weight import AnyWeight, Form, dequantize
from matgptq.machine.devices import multiplies_bfloat16
from matgptq.native import Activations

# Above so many rows PyTorch's matrix product on dequantized tiles wins (benchmarks/cpu_crossover.py), by the dtype in
# which tiles are multiplied. Matrix units multiply our digits as well as PyTorch's bfloat16, of which one product is
# cheaper than three of digits. For float32 the library that PyTorch calls has AVX-512 code, but for Intel's only: on
# others it never wins against ours.
_FUSED_ROWS = {torch.float32: 32, torch.bfloat16: 16}
_FUSED_ROWS_AMX = {torch.float32: sys.maxsize, torch.bfloat16: 128}
_FUSED_ROWS_AVX512 = {torch.float32: 128, torch.bfloat16: 32}
_FUSED_ROWS_AVX512_ELSEWHERE = {torch.float32: sys.maxsize, torch.bfloat16: 40}
# AVX2 has neither dot products nor registers for many sums.
_FUSED_ROWS_AVX2 = {torch.float32: 12}
_FUSED_ROWS_AVX_VNNI = {torch.float32: 48}
# A dequantized tile should stay in a cache until it has been multiplied, and x is read again for each of them.
_TILE_BYTES = 4 << 20
# The same on a GPU. By reasoning, not yet by measurement: unpacking once for every 32 rows against writing and reading
# the weights once in 16 bits.
TRITON_FUSED_ROWS = 128
_TRITON_TILE_BYTES = 64 << 20  # bounds the memory that a product takes beside its result
_TENSOR_CORE_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Product:
    """What is to be computed, as far as the choice of a kernel depends on it."""

    form: Form
    device: str
    dtype: torch.dtype
    rows: int
    activations: str


@dataclass(frozen=True)
class Kernel:
    """One way to compute ``x @ w_r^T + bias``.

    Attributes:
        name: as ``MATGPTQ_KERNEL`` takes it.
        refusal: why it cannot compute a product, or None if it can.
        drawback: why another kernel would be faster, or None; not asked when this one is forced.
        run: ``(x [rows, in], weight, bits, bias, activations) -> [rows, out]``.
    """

    name: str
    refusal: Callable[[Product], str | None]
    drawback: Callable[[Product], str | None]
    run: Callable[[Tensor, Any, int, Tensor | None, Activations], Tensor]


def _candidates(forced: str) -> list[Kernel]:
    candidates = [kernel for kernel in KERNELS if forced in ("", kernel.name)]
    if not candidates:
        names = ", ".join(kernel.name for kernel in KERNELS)
        raise ConfigurationError(f"MATGPTQ_KERNEL: no kernel {forced!r}; there are {names}")
    return candidates


def forced_kernel() -> str:
    """The kernel that ``MATGPTQ_KERNEL`` names, empty if it names none."""
    return os.environ.get("MATGPTQ_KERNEL", "")


def check_forced() -> None:
    """Refuse a ``MATGPTQ_KERNEL`` that there is not, before anything is loaded; raises ``ConfigurationError``."""
    _candidates(forced_kernel())


def asks_for_reference() -> bool:
    """Whether ``MATGPTQ_KERNEL`` wants PyTorch's own products."""
    return forced_kernel() == "reference"


@functools.lru_cache(maxsize=1024)
def _choose(product: Product, forced: str) -> Kernel:
    refusals = {}
    for kernel in _candidates(forced):
        refusals[kernel.name] = kernel.refusal(product) or (None if forced else kernel.drawback(product))
        if refusals[kernel.name] is None:
            return kernel
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    raise ConfigurationError(f"no kernel computes this product ({reasons})")


def choose(product: Product) -> Kernel:
    """The kernel that will compute a product."""
    return _choose(product, forced_kernel())


def fuses(product: Product) -> bool:
    """Whether a product runs on the fused kernel, which takes several weights in one call."""
    return choose(product).run is _run_fused


def _run_reference(x: Tensor, weight: AnyWeight, bits: int, bias: Tensor | None, activations: Activations) -> Tensor:
    return torch.nn.functional.linear(x, dequantize(weight, bits, x.dtype), None if bias is None else bias.to(x.dtype))


def _tile_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which tiles are multiplied: a processor without products of bfloat16 takes four times as long for them."""
    return dtype if multiplies_bfloat16(torch.device("cpu")) else torch.float32


def fused_rows(dtype: torch.dtype) -> int:
    """How many rows of exact activations the fused native kernel is the fastest for, on this machine."""
    isa = native.isa()
    by_dtype = _FUSED_ROWS
    if isa == "amx":
        by_dtype = _FUSED_ROWS_AMX
    elif isa == "avx2":
        by_dtype = _FUSED_ROWS_AVX2
    elif isa == "avx_vnni":
        by_dtype = _FUSED_ROWS_AVX_VNNI
    elif isa == "avx512":
        by_dtype = _FUSED_ROWS_AVX512 if native.cpu_vendor() == "intel" else _FUSED_ROWS_AVX512_ELSEWHERE
    return by_dtype.get(_tile_dtype(dtype), by_dtype[torch.float32])


def _refuses_natively(product: Product) -> str | None:
    if product.form != "native":
        return "the weight is not packed for it (matgptq.load packs it on a CPU)"
    if product.device != "cpu":
        return f"the activations are on {product.device}"
    if product.dtype not in native.DTYPES:
        return f"activations of {product.dtype}; float32 and bfloat16 are supported"
    return None


def _run_fused(x: Tensor, weight: native.Weight, bits: int, bias: Tensor | None, activations: Activations) -> Tensor:
    return native.matmul(x, weight, bits, None if bias is None else bias.float(), activations=activations)


def _refuses_tiled(product: Product) -> str | None:
    if product.activations != "exact":
        return "multiplies exact activations only"
    return _refuses_natively(product)


def _run_tiled(x: Tensor, weight: native.Weight, bits: int, bias: Tensor | None, activations: Activations) -> Tensor:
    out_features = weight.out_features
    values = x.to(_tile_dtype(x.dtype))
    result = values.new_empty(len(x), out_features)
    step = max(16, _TILE_BYTES // (weight.in_features * values.element_size()) // 16 * 16)
    tile = values.new_empty(min(step, out_features), weight.in_features)
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        rows = native.dequantize_rows(weight, bits, start, stop, dtype=values.dtype, out=tile[: stop - start])
        torch.mm(values, rows.T, out=result[:, start:stop])
    return (result if bias is None else result.add_(bias.to(values.dtype))).to(x.dtype)


def _refuses_on_gpu(product: Product) -> str | None:
    if product.form != "planes":
        return "the weight is not packed for it (matgptq.load packs it on a GPU)"
    if product.activations != "exact":
        return "multiplies exact activations only"
    return gpu_support.obstacle(product.device)


def _refuses_on_tensor_cores(product: Product) -> str | None:
    if product.dtype not in _TENSOR_CORE_DTYPES:
        return f"activations of {product.dtype}; float16 and bfloat16 are supported"
    return _refuses_on_gpu(product)


def _many_rows_on_gpu(product: Product) -> str | None:
    return f"tiles are faster for {product.rows} rows" if product.rows > TRITON_FUSED_ROWS else None


def _run_triton_fused(x: Tensor, weight: PlaneWeight, bits: int, bias: Tensor | None, _: Activations) -> Tensor:
    from matgptq.gpu import products as gpu_products

    return gpu_products.matmul(x, weight, bits, bias)


def _run_triton_tiled(x: Tensor, weight: PlaneWeight, bits: int, bias: Tensor | None, _: Activations) -> Tensor:
    from matgptq.gpu import products as gpu_products

    result = x.new_empty(len(x), weight.out_features)
    block = gpu_layout.BLOCK_ROWS
    step = max(block, _TRITON_TILE_BYTES // (weight.in_features * x.element_size()) // block * block)
    tile = x.new_empty(min(step, weight.out_features), weight.in_features)
    for start in range(0, weight.out_features, step):
        rows = tile[: weight.out_features - start]
        gpu_products.dequantize_blocks(weight, bits, start // block, rows)
        torch.mm(x, rows.T, out=result[:, start : start + len(rows)])
    return result if bias is None else result.add_(bias.to(x.dtype))


def _refuses_reference(product: Product) -> str | None:
    return None if product.activations == "exact" else "multiplies exact activations only"


def _many_rows(product: Product) -> str | None:
    if product.activations == "exact" and product.rows > fused_rows(product.dtype):
        return f"tiles are faster for {product.rows} rows"
    return None


def _no_drawback(product: Product) -> None:
    return None


KERNELS: tuple[Kernel, ...] = (
    Kernel("native-fused", _refuses_natively, _many_rows, _run_fused),
    Kernel("native-tiled", _refuses_tiled, _no_drawback, _run_tiled),
    Kernel("triton-fused", _refuses_on_tensor_cores, _many_rows_on_gpu, _run_triton_fused),
    Kernel("triton-tiled", _refuses_on_gpu, _no_drawback, _run_triton_tiled),
    Kernel("reference", _refuses_reference, _no_drawback, _run_reference),
)
