"""Weights in the memory forms of the library, and products with them."""

from __future__ import annotations

import ctypes
import itertools
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Self

import torch
from torch import Tensor

from matgptq.errors import ConfigurationError
from matgptq.native.library import (
    ACTIVATIONS,
    DTYPES,
    GROUP_UNIT,
    Activations,
    Product,
    check_status,
    expect_tensor,
    require_library,
    shares_threads,
    thread_count,
)
from matgptq.slicing import PARENT_BITS, check_bits, check_widths

_keys = itertools.count(1)


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


class _Held:
    """Lies in memory of the library: copies are the same object, and a pickle could not hold it."""

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "packed weights are not pickled; use save_pretrained, or load with from_pretrained and "
            "quantization_config=MatGPTQConfig(packed=False)"
        )


class Arena(_Held):
    """Memory shared by many weights: large blocks aligned to 2 MB, advised for huge pages.

    Weights keep it alive. Worth using for every model: small weights would otherwise get pages of 4 KB, which are up
    to several times slower to read cold.

    Args:
        block_bytes: size of the blocks taken from the system; a weight larger than that gets its own.
    """

    def __init__(self, block_bytes: int = 64 << 20) -> None:
        if block_bytes < 1:
            raise ConfigurationError(f"block_bytes must be positive, not {block_bytes}")
        library = require_library()
        self._handle = library.matgptq_arena_create(block_bytes)
        if not self._handle:
            raise MemoryError("matgptq kernels: out of memory")
        weakref.finalize(self, library.matgptq_arena_free, self._handle).atexit = False

    @property
    def nbytes(self) -> int:
        """Bytes handed out to weights so far."""
        return int(require_library().matgptq_arena_bytes(self._handle))


class Weight(_Held):
    """A packed weight, made by ``pack_parent`` or ``pack_slice``.

    Attributes:
        out_features, in_features: shape ``[out, in]``.
        group_size: input columns per scale.
        widths: widths that it serves, ascending.
        resident: true for the parent's 8 planes, false for a packed slice.
        device: the CPU.
        key: a number that no other packed weight has; positive, as those of the GPU's form are not.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        handle: int,
        out_features: int,
        in_features: int,
        group_size: int,
        widths: tuple[int, ...],
        *,
        resident: bool,
    ) -> None:
        self._handle = handle
        self.out_features = out_features
        self.in_features = in_features
        self.group_size = group_size
        self.widths = widths
        self.resident = resident
        self.key = next(_keys)
        weakref.finalize(self, require_library().matgptq_weight_free, handle).atexit = False

    def __repr__(self) -> str:
        form = "resident parent" if self.resident else "packed slice"
        return (
            f"Weight({form}, {self.out_features} x {self.in_features}, group {self.group_size}, widths {self.widths})"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory held: planes and scales, padding included."""
        return int(require_library().matgptq_weight_bytes(self._handle))

    def bytes_read(self, bits: int | None = None) -> int:
        """Bytes that one product of width ``bits`` reads (a resident parent reads r+1 planes for r < 8)."""
        return int(require_library().matgptq_weight_bytes_read(self._handle, self.served_bits(bits)))

    def served_bits(self, bits: int | None) -> int:
        """``bits`` if this weight serves it; the only width when ``bits`` is None."""
        if bits is None:
            if len(self.widths) != 1:
                raise ConfigurationError(f"bits is needed: this weight serves the widths {self.widths}")
            return self.widths[0]
        if bits not in self.widths:
            raise ConfigurationError(f"bits must be one of {self.widths} for this weight, not {bits!r}")
        return bits


def _pack(
    codes: Tensor, scales: Mapping[int, Tensor], slice_bits: int, arena: Arena | None, num_threads: int | None
) -> Weight:
    library = require_library()
    if codes.ndim != 2 or 0 in codes.shape:
        raise ConfigurationError(f"codes must be a matrix [out, in] that is not empty, not {tuple(codes.shape)}")
    out_features, in_features = codes.shape
    codes = expect_tensor(codes, "codes", torch.uint8, (out_features, in_features))
    widths = check_widths(scales)
    groups = next(iter(scales.values())).shape[-1]
    if groups == 0 or in_features % groups:
        raise ConfigurationError(f"{groups} groups do not divide {in_features} input features")
    group_size = in_features // groups
    if groups > 1 and group_size % GROUP_UNIT:
        raise ConfigurationError(
            f"group_size {group_size} is not supported: use a multiple of {GROUP_UNIT}, or one group per row"
        )
    # Equal tensors are stored once: the conversion must not make two of one.
    converted: dict[int, Tensor] = {}
    for scale in scales.values():
        if id(scale) not in converted:
            converted[id(scale)] = expect_tensor(
                scale.to(torch.float32), f"scales of {tuple(scales)} bits", torch.float32, (out_features, groups)
            )
    width_array = (ctypes.c_int * len(widths))(*widths)
    scale_array = (ctypes.c_void_p * len(widths))(*(converted[id(scales[bits])].data_ptr() for bits in widths))
    handle = ctypes.c_void_p()
    check_status(
        library.matgptq_pack(
            codes.data_ptr(),
            in_features,
            out_features,
            in_features,
            group_size,
            slice_bits,
            len(widths),
            width_array,
            scale_array,
            arena._handle if arena else None,
            thread_count(num_threads),
            ctypes.byref(handle),
        )
    )
    assert handle.value is not None  # check_status has raised otherwise
    return Weight(handle.value, out_features, in_features, group_size, widths, resident=slice_bits == 0)


def pack_parent(
    codes: Tensor,
    scales: Tensor | Mapping[int, Tensor],
    *,
    arena: Arena | None = None,
    num_threads: int | None = None,
) -> Weight:
    """Pack parent codes as 8 bit planes that serve any width.

    Args:
        codes: parent codes, ``torch.uint8`` ``[out, in]``.
        scales: group scales in units of the parent's grid, floating ``[out, groups]``: one tensor for all widths
            2..8, or one per width, keyed by it; only those widths are served then. ``in / groups`` is ``in`` or a
            multiple of 32. Scales that are float16 numbers exactly are stored as such.
        arena: memory to use; without one the weight gets its own block.
        num_threads: default ``torch.get_num_threads()``.
    """
    if isinstance(scales, Tensor):
        scales = dict.fromkeys(range(2, PARENT_BITS + 1), scales)
    return _pack(codes, scales, 0, arena, num_threads)


def pack_slice(
    codes: Tensor, scales: Tensor, bits: int, *, arena: Arena | None = None, num_threads: int | None = None
) -> Weight:
    """Pack one slice: ``bits`` bits per weight, rounded already.

    Args:
        codes: *parent* codes, ``torch.uint8`` ``[out, in]``; they are sliced here.
        scales: group scales of that width in units of the parent's grid, floating ``[out, groups]``.
        bits: width, 2..8, the only one that the result serves.
        arena, num_threads: as for ``pack_parent``.
    """
    check_bits(bits)
    return _pack(codes, {bits: scales}, bits, arena, num_threads)


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
        activations: ``"exact"`` takes x as it is and sums in float32. ``"int8"`` first rounds x to int8, symmetric,
            per row and block of a group (at most 128) columns; results are the same on every CPU.
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
        dtype = DTYPES.get(x.dtype)
        if dtype is None or x.ndim != 2 or x.shape[1] != self.in_features or x.device.type != "cpu":
            raise ConfigurationError(f"x must be float32 or bfloat16 [rows, {self.in_features}] on the CPU")
        if x.stride(1) != 1:
            x = x.contiguous()
        batch = x.shape[0]
        joined = x.new_empty((batch, self.out_features))
        start, size = joined.data_ptr(), joined.element_size()
        products = type(self._products).from_buffer_copy(self._products)  # other threads may be here, too
        for product, offset in zip(products, self._offsets, strict=True):
            product.y = start + offset * size
        status = self._multiply(
            x.data_ptr(),
            dtype,
            x.stride(0),
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
