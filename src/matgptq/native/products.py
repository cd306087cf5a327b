"""Products with packed weights, and rows of them dequantized."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from matgptq.errors import ConfigurationError
from matgptq.native.library import (
    ACTIVATIONS,
    DTYPES,
    Activations,
    Product,
    check_status,
    expect_tensor,
    require_library,
    shares_threads,
    thread_count,
)
from matgptq.native.weights import Weight, pack_slice


def spread_threads(num_threads: int | None = None) -> None:
    """Start the library's threads and let them run wherever OpenMP's threads of this process do.

    Does nothing where the library computes on OpenMP's threads anyway (``share_threads``). Servers bind each OpenMP
    thread, the calling one among them, to a processor of its own (``GOMP_CPU_AFFINITY``, ``KMP_AFFINITY``; vLLM does).
    A new thread inherits the caller's binding, so without this all of ours would share that one processor. Does
    nothing where threads cannot be bound.

    Args:
        num_threads: default ``torch.get_num_threads()``.
    """
    tasks = Path("/proc/self/task")
    if thread_count(num_threads) == 1 or shares_threads() or not tasks.exists():
        return
    own = len(os.sched_getaffinity(0))
    torch.empty(1 << 20).fill_(0)  # starts OpenMP's threads, if nothing has
    masks = [os.sched_getaffinity(int(task.name)) for task in tasks.iterdir()]
    processors = set().union(*(mask for mask in masks if len(mask) <= own))
    before = {task.name for task in tasks.iterdir()}
    rows = 256 * thread_count(num_threads)
    weight = pack_slice(torch.zeros(rows, 32, dtype=torch.uint8), torch.ones(rows, 1), 8)
    matmul(torch.zeros(1, 32), weight, num_threads=num_threads)
    for name in {task.name for task in tasks.iterdir()} - before:
        os.sched_setaffinity(int(name), processors)


def matmul(
    x: Tensor,
    weight: Weight,
    bits: int | None = None,
    bias: Tensor | None = None,
    *,
    activations: Activations = "exact",
    num_threads: int | None = None,
) -> Tensor:
    """``x @ W_bits.T + bias``.

    Args:
        x: activations, ``torch.float32`` or ``torch.bfloat16``, ``[..., in]``; any number of rows, also none. Made
            for up to about 16 rows; beyond, ``dequantize_rows`` and ``torch.matmul`` are faster.
        weight: a packed weight.
        bits: width; may be left out for a weight that serves only one.
        bias: ``torch.float32`` ``[out]``.
        activations: ``"exact"`` keeps 23 bits of x per row and block of a group (at most 128) columns, no less than
            sums in float32 keep. ``"int8"`` rounds x to int8, symmetric, per row and block. Results of either are the
            same to the bit on every CPU.
        num_threads: default ``torch.get_num_threads()``.

    Returns:
        ``[..., out]`` tensor of x's dtype. Non-finite activations propagate.
    """
    return matmul_many(x, [weight], [bits], [bias], activations=activations, num_threads=num_threads)[0]


def matmul_many(
    x: Tensor,
    weights: Sequence[Weight],
    bits: Sequence[int | None] | int | None = None,
    biases: Sequence[Tensor | None] | None = None,
    *,
    activations: Activations = "exact",
    num_threads: int | None = None,
) -> list[Tensor]:
    """``matmul`` of one x with several weights in one call (q, k, v; gate, up), each with a width of its own.

    Args:
        x: activations as for ``matmul``; all weights have its ``in``.
        weights: packed weights.
        bits: one width for all, or one per weight.
        biases: one per weight; entries may be None.
        activations, num_threads: as for ``matmul``.

    Returns:
        One ``[..., out]`` tensor of x's dtype per weight.
    """
    rows = _rows_of(x, activations)
    results = [x.new_empty((len(rows), weight.out_features)) for weight in weights]
    _multiply(rows, weights, bits, biases, results, activations, num_threads)
    if x.ndim == 2:
        return results
    return [y.view(*x.shape[:-1], y.shape[1]) for y in results]


class Joined:
    """``matmul_many`` with its results side by side, for weights and biases that do not change: prepared once, called
    often. For a small layer the preparations take longer than the product.

    Args:
        weights: packed weights with one ``in``.
        bits: one width per weight.
        biases: ``torch.float32`` ``[out]`` per weight, or None.
        activations: as for ``matmul``.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        bits: Sequence[int],
        biases: Sequence[Tensor | None],
        *,
        activations: Activations = "exact",
    ) -> None:
        self._multiply = require_library().matgptq_matmul
        self._activations = ACTIVATIONS[activations]
        self.in_features = weights[0].in_features
        self.sizes = [weight.out_features for weight in weights]
        self.out_features = sum(self.sizes)
        self._products = (Product * len(weights))()
        self._offsets = []
        self._alive: list[object] = [*weights]
        start = 0
        for product, weight, width, bias in zip(self._products, weights, bits, biases, strict=True):
            if weight.in_features != self.in_features:
                raise ConfigurationError(f"weights of {self.in_features} and {weight.in_features} features together")
            product.weight = weight._handle
            product.bits = weight.served_bits(width)
            product.y_stride = self.out_features
            if bias is not None:
                bias = expect_tensor(bias, "bias", torch.float32, (weight.out_features,))
                self._alive.append(bias)
                product.bias = bias.data_ptr()
            self._offsets.append(start)
            start += weight.out_features

    def __call__(self, x: Tensor) -> Tensor:
        """``[rows, sum of out]`` in the dtype of ``x``, float32 or bfloat16 ``[rows, in]`` on the CPU."""
        return self.bound(x)()

    def bound(self, x: Tensor) -> Callable[[], Tensor]:
        """The product with ``x`` as a call without arguments, into the same memory each time."""
        dtype = DTYPES.get(x.dtype)
        if dtype is None or x.ndim != 2 or x.shape[1] != self.in_features or x.device.type != "cpu":
            raise ConfigurationError(f"x must be float32 or bfloat16 [rows, {self.in_features}] on the CPU")
        rows = x if x.stride(1) == 1 else x.contiguous()
        batch = rows.shape[0]
        joined = rows.new_empty((batch, self.out_features))
        start, size = joined.data_ptr(), joined.element_size()
        products = type(self._products).from_buffer_copy(self._products)  # other threads may be here, too
        for product, offset in zip(products, self._offsets, strict=True):
            product.y = start + offset * size

        def multiply() -> Tensor:
            status = self._multiply(
                rows.data_ptr(),
                dtype,
                rows.stride(0),
                batch,
                self.in_features,
                products,
                len(products),
                dtype,
                self._activations,
                torch.get_num_threads(),
            )
            if status:
                check_status(status)
            return joined

        return multiply


def _rows_of(x: Tensor, activations: Activations) -> Tensor:
    """``x`` as ``[rows, in]`` with adjacent columns, if the library can multiply it."""
    if x.device.type != "cpu":
        raise ConfigurationError(f"x must be on the CPU, not on {x.device}")
    if x.dtype not in DTYPES:
        raise ConfigurationError(f"x must be torch.float32 or torch.bfloat16, not {x.dtype}")
    if activations not in ACTIVATIONS:
        raise ConfigurationError(f"activations must be 'exact' or 'int8', not {activations!r}")
    if x.ndim == 0:
        raise ConfigurationError("x must have at least one dimension")
    rows = x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _multiply(
    rows: Tensor,
    weights: Sequence[Weight],
    bits: Sequence[int | None] | int | None,
    biases: Sequence[Tensor | None] | None,
    results: Sequence[Tensor],
    activations: Activations,
    num_threads: int | None,
) -> None:
    """Fill ``results``, one ``[rows, out]`` per weight with adjacent columns."""
    widths = [bits] * len(weights) if bits is None or isinstance(bits, int) else list(bits)
    added = [None] * len(weights) if biases is None else list(biases)
    if len(widths) != len(weights) or len(added) != len(weights):
        raise ConfigurationError(f"{len(weights)} weights need as many bits and biases")
    batch, in_features = rows.shape
    products = (Product * len(weights))()
    alive: list[Tensor] = []
    for product, weight, width, bias, y in zip(products, weights, widths, added, results, strict=True):
        if weight.in_features != in_features:
            raise ConfigurationError(f"x has {in_features} features, the weight takes {weight.in_features}")
        product.weight = weight._handle
        product.bits = weight.served_bits(width)
        if bias is not None:
            bias = expect_tensor(bias, "bias", torch.float32, (weight.out_features,))
            alive.append(bias)
            product.bias = bias.data_ptr()
        product.y = y.data_ptr()
        product.y_stride = y.stride(0)
    dtype = DTYPES[rows.dtype]
    check_status(
        require_library().matgptq_matmul(
            rows.data_ptr(),
            dtype,
            rows.stride(0),
            batch,
            in_features,
            products,
            len(weights),
            dtype,
            ACTIVATIONS[activations],
            thread_count(num_threads),
        )
    )


def dequantize_rows(
    weight: Weight,
    bits: int | None = None,
    start: int = 0,
    stop: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    num_threads: int | None = None,
) -> Tensor:
    """Rows ``start .. stop-1`` of ``W_bits``, for larger batches that multiply with ``torch.matmul``.

    Args:
        weight: a packed weight.
        bits: width; may be left out for a weight that serves only one.
        start, stop: range of rows; default all.
        dtype: ``torch.float32`` or ``torch.bfloat16``; the product is formed in float32 and rounded once.
        out: ``[stop - start, in]`` buffer of that dtype to fill, with contiguous rows; a buffer that stays in cache is
            faster than a fresh tensor.
        num_threads: default ``torch.get_num_threads()``.
    """
    library = require_library()
    if stop is None:
        stop = weight.out_features
    if not 0 <= start <= stop <= weight.out_features:
        raise ConfigurationError(f"rows {start}..{stop} are not within 0..{weight.out_features}")
    if dtype not in DTYPES:
        raise ConfigurationError(f"dtype must be torch.float32 or torch.bfloat16, not {dtype}")
    shape = (stop - start, weight.in_features)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device="cpu")
    elif out.device.type != "cpu" or out.dtype != dtype or tuple(out.shape) != shape or out.stride(1) != 1:
        raise ConfigurationError(f"out must be a {dtype} CPU tensor of shape {shape} with contiguous rows")
    check_status(
        library.matgptq_dequantize(
            weight._handle,
            weight.served_bits(bits),
            start,
            stop,
            out.data_ptr(),
            DTYPES[dtype],
            out.stride(0),
            thread_count(num_threads),
        )
    )
    return out


def read(memory: Tensor, num_threads: int | None = None) -> None:
    """Read a contiguous CPU tensor once and do nothing with it: what kernels' speed is measured against."""
    if memory.device.type != "cpu" or not memory.is_contiguous():
        raise ConfigurationError("memory must be a contiguous CPU tensor")
    require_library().matgptq_read(memory.data_ptr(), memory.nbytes, thread_count(num_threads))
