"""The one place that decides how a product with a slice is computed.

    reference      PyTorch: dequantize the slice, multiply. Defines the result; runs anywhere
    native-fused   native library, few rows: codes are unpacked in registers, so a product costs the bytes of its width
    native-tiled   native library, many rows: stretches of rows are dequantized into cache and multiplied by PyTorch

A kernel says what it refuses and why; the first that refuses nothing runs. ``MATGPTQ_KERNEL=name`` forces one.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from matgptq import native
from matgptq.errors import ConfigurationError
from matgptq.nested_weight import NestedWeight

Activations = Literal["exact", "int8"]
AnyWeight = NestedWeight | native.Weight

# Above this many rows PyTorch's matrix product on dequantized tiles wins; see benchmarks/results/cpu_kernels.json.
# A float32 product has no matrix unit to run on and loses later than a bfloat16 one.
FUSED_ROWS = {torch.float32: 32, torch.bfloat16: 16}
_TILE_BYTES = 1 << 20  # a dequantized tile has to stay in the second-level cache until it has been multiplied


@dataclass(frozen=True)
class Product:
    """What is to be computed, as far as the choice of a kernel depends on it."""

    packed: bool
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


def matmul(
    x: Tensor, weight: AnyWeight, bits: int, bias: Tensor | None = None, *, activations: Activations = "exact"
) -> Tensor:
    """``x @ w_r^T + bias`` for the slice of ``bits`` bits.

    Args:
        x: floating ``[..., in]``, any leading shape, also empty.
        weight: codes and scales, or their packed form (CPU).
        bits: width, 2..8; a packed slice holds only one.
        bias: floating ``[out]`` or None.
        activations: ``exact``, or ``int8`` to round x to 8 bits per row and stretch of columns (packed weights only).

    Returns:
        ``[..., out]`` in the dtype of ``x``.

    Raises:
        ConfigurationError: the kernel that ``MATGPTQ_KERNEL`` names refuses the product.
    """
    if isinstance(weight, native.Weight) and torch.compiler.is_compiling():
        result: Tensor = _packed_matmul(x, weight.key, bits, bias, activations)
        return result
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    product = Product(isinstance(weight, native.Weight), x.device.type, x.dtype, len(rows), activations)
    result = choose(product).run(rows, weight, bits, bias, activations)
    return result.view(*x.shape[:-1], result.shape[1])


class Operand(NamedTuple):
    """What an input is multiplied by: a weight, the width to use, a bias ``[out]`` or None."""

    weight: AnyWeight
    bits: int
    bias: Tensor | None


def matmul_shared(x: Tensor, operands: Sequence[Operand], *, activations: Activations = "exact") -> list[Tensor]:
    """``matmul`` of one input with several operands, as one call where the kernel that would run can.

    Takes and raises what ``matmul`` does; widths may differ.
    """
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    packed = all(isinstance(operand.weight, native.Weight) for operand in operands)
    if not packed or not fuses(Product(True, x.device.type, x.dtype, len(rows), activations)):
        return [matmul(x, *operand, activations=activations) for operand in operands]
    results = native.matmul_many(
        rows,
        [operand.weight for operand in operands],  # type: ignore[misc]
        [operand.bits for operand in operands],
        [None if operand.bias is None else operand.bias.float() for operand in operands],
        activations=activations,
    )
    return [result.view(*x.shape[:-1], result.shape[1]) for result in results]


def fuses(product: Product) -> bool:
    """Whether a product runs on the fused kernel, which takes several weights in one call."""
    return choose(product).run is _run_fused


@functools.lru_cache(maxsize=1024)
def _choose(product: Product, forced: str) -> Kernel:
    candidates = [kernel for kernel in KERNELS if forced in ("", kernel.name)]
    if not candidates:
        names = ", ".join(kernel.name for kernel in KERNELS)
        raise ConfigurationError(f"MATGPTQ_KERNEL: no kernel {forced!r}; there are {names}")
    refusals = {}
    for kernel in candidates:
        refusals[kernel.name] = kernel.refusal(product) or (None if forced else kernel.drawback(product))
        if refusals[kernel.name] is None:
            return kernel
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    raise ConfigurationError(f"no kernel computes this product ({reasons})")


def choose(product: Product) -> Kernel:
    """The kernel that will compute a product."""
    return _choose(product, os.environ.get("MATGPTQ_KERNEL", ""))


def _run_reference(x: Tensor, weight: AnyWeight, bits: int, bias: Tensor | None, activations: Activations) -> Tensor:
    if isinstance(weight, native.Weight):
        dense = native.dequantize_rows(weight, bits).to(x.dtype)
    else:
        dense = weight.dequantize(bits, x.dtype)
    return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))


def _refuses_natively(product: Product) -> str | None:
    if not product.packed:
        return "the weight is not packed (matgptq.load packs it)"
    if product.device != "cpu":
        return f"the activations are on {product.device}"
    if product.dtype not in FUSED_ROWS:
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
    result = x.new_empty(len(x), out_features)
    step = max(16, _TILE_BYTES // (weight.in_features * x.element_size()) // 16 * 16)
    tile = torch.empty(min(step, out_features), weight.in_features, dtype=x.dtype)
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        rows = native.dequantize_rows(weight, bits, start, stop, dtype=x.dtype, out=tile[: stop - start])
        torch.mm(x, rows.T, out=result[:, start:stop])
    return result if bias is None else result.add_(bias.to(x.dtype))


def _refuses_reference(product: Product) -> str | None:
    return None if product.activations == "exact" else "multiplies exact activations only"


def _many_rows(product: Product) -> str | None:
    if product.activations == "exact" and product.rows > FUSED_ROWS[product.dtype]:
        return f"tiles are faster for {product.rows} rows"
    return None


def _no_drawback(product: Product) -> None:
    return None


KERNELS: tuple[Kernel, ...] = (
    Kernel("native-fused", _refuses_natively, _many_rows, _run_fused),
    Kernel("native-tiled", _refuses_tiled, _no_drawback, _run_tiled),
    Kernel("reference", _refuses_reference, _no_drawback, _run_reference),
)

_packed: weakref.WeakValueDictionary[int, native.Weight] = weakref.WeakValueDictionary()


def remember(weight: native.Weight) -> native.Weight:
    """Make a packed weight known to compiled graphs, which can hold its key but not the object."""
    _packed[weight.key] = weight
    return weight


@torch.library.custom_op("matgptq::packed_matmul", mutates_args=())
def _packed_matmul(x: Tensor, key: int, bits: int, bias: Tensor | None, activations: str) -> Tensor:
    return matmul(x, _packed[key], bits, bias, activations=activations)  # type: ignore[arg-type]


@_packed_matmul.register_fake
def _(x: Tensor, key: int, bits: int, bias: Tensor | None, activations: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], _packed[key].out_features)
