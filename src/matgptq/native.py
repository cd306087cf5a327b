"""Native CPU kernels: a thin binding of ``libmatgptq`` (``csrc/matgptq.h`` is its specification) to torch CPU tensors.

Importing this module loads nothing; the library is loaded at the first call. An installation built without a C++
compiler has no library: ``available()`` is then false and ``reason()`` says why.

Kernels know nothing of autograd. Tensors are read through ``data_ptr`` and copied only where a layout asks for it.
Invalid arguments raise ``ConfigurationError`` before any work starts.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from matgptq.errors import ConfigurationError, MatGPTQError
from matgptq.slicing import PARENT_BITS, check_bits, check_widths

Activations = Literal["exact", "int8"]
SweepMode = Literal["residual", "change", "mean"]

_ABI_VERSION = 2
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_ACTIVATIONS = {"exact": 0, "int8": 1}
_SWEEP_MODES = {"residual": 0, "change": 1, "mean": 2}
_GROUP_UNIT = 32

_pointer, _int, _int64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class NativeUnavailableError(MatGPTQError, RuntimeError):
    """A native kernel was called but the library is missing or unusable; the message is that of ``reason()``."""


class _Product(ctypes.Structure):
    _fields_ = (
        ("weight", _pointer),
        ("bits", _int),
        ("bias", _pointer),
        ("y", _pointer),
        ("y_stride", _int64),
    )


class _SweepJob(ctypes.Structure):
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


class _SearchJob(ctypes.Structure):
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


_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "abi_version": (_int, ()),
    "message": (ctypes.c_char_p, (_int,)),
    "isa": (ctypes.c_char_p, ()),
    "set_isa": (_int, (ctypes.c_char_p,)),
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
    "read": (ctypes.c_uint64, (_pointer, _int64, _int)),
    "sweep": (_int, (_pointer,)),
    "search_scales": (_int, (_pointer,)),
}


def _library_files() -> list[Path]:
    forced = os.environ.get("MATGPTQ_NATIVE_LIBRARY")
    if forced:
        return [Path(forced)]
    # An editable install keeps the library beside the installed copy of the package, not beside this file.
    places = [Path(place) / "_native" for place in importlib.import_module("matgptq").__path__]
    return [file for place in places for pattern in ("libmatgptq.*", "matgptq.dll") for file in place.glob(pattern)]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
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
    return library, ""


def available() -> bool:
    """Whether the native library is there and usable."""
    return _load()[0] is not None


def reason() -> str:
    """Why the native library is not available; empty when it is."""
    return _load()[1]


def solves(tensor: Tensor) -> bool:
    """Whether the solver's loops over this tensor run in the library: on the CPU, where there is one.

    ``MATGPTQ_SOLVER=torch``, ``=native`` or ``=triton`` forces one engine; all give the same codes but for ties.
    """
    wanted = os.environ.get("MATGPTQ_SOLVER", "auto")
    if wanted not in ("auto", "torch", "native", "triton"):
        raise ConfigurationError(f"MATGPTQ_SOLVER must be auto, torch, native or triton, not {wanted!r}")
    if wanted == "native" and not available():
        raise ConfigurationError(f"MATGPTQ_SOLVER=native: {reason()}")
    return wanted in ("auto", "native") and tensor.device.type == "cpu" and available()


def _require() -> ctypes.CDLL:
    library, why = _load()
    if library is None:
        raise NativeUnavailableError(why)
    return library


def isa() -> str:
    """The instruction set in use: ``"avx512"``, ``"avx2"``, ``"neon"`` or ``"scalar"``."""
    name: bytes = _require().matgptq_isa()
    return name.decode()


def set_isa(name: str) -> None:
    """Force an instruction set, for tests and measurements; raise ``ConfigurationError`` if this CPU lacks it."""
    _check(_require().matgptq_set_isa(name.encode()))


def _check(status: int) -> None:
    if status == 0:
        return
    text = _require().matgptq_message(status).decode()
    if status == -5:
        raise MemoryError(f"matgptq kernels: {text}")
    raise ConfigurationError(f"matgptq kernels: {text}")


def _threads(num_threads: int | None) -> int:
    if num_threads is None:
        return torch.get_num_threads()
    if num_threads < 1:
        raise ConfigurationError(f"num_threads must be at least 1, not {num_threads}")
    return num_threads


def _expect(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor, contiguous, if it is on the CPU and of that dtype and shape."""
    if tensor.device.type != "cpu":
        raise ConfigurationError(f"{name} must be on the CPU, not on {tensor.device}")
    if tensor.dtype != dtype:
        raise ConfigurationError(f"{name} must be {dtype}, not {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ConfigurationError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
    return tensor.contiguous()


def spread_threads(num_threads: int | None = None) -> None:
    """Start the library's threads and let them run wherever OpenMP's threads of this process do.

    Servers bind each OpenMP thread, the calling one among them, to a processor of its own (``GOMP_CPU_AFFINITY``,
    ``KMP_AFFINITY``; vLLM does). A new thread inherits the caller's binding, so without this all of ours would share
    that one processor. Does nothing where threads cannot be bound.

    Args:
        num_threads: default ``torch.get_num_threads()``.
    """
    tasks = Path("/proc/self/task")
    if _threads(num_threads) == 1 or not tasks.exists():
        return
    own = len(os.sched_getaffinity(0))
    torch.empty(1 << 20).fill_(0)  # starts OpenMP's threads, if nothing has
    masks = [os.sched_getaffinity(int(task.name)) for task in tasks.iterdir()]
    processors = set().union(*(mask for mask in masks if len(mask) <= own))
    before = {task.name for task in tasks.iterdir()}
    rows = 256 * _threads(num_threads)
    weight = pack_slice(torch.zeros(rows, 32, dtype=torch.uint8), torch.ones(rows, 1), 8)
    matmul(torch.zeros(1, 32), weight, num_threads=num_threads)
    for name in {task.name for task in tasks.iterdir()} - before:
        os.sched_setaffinity(int(name), processors)


class Arena:
    """Memory shared by many weights: large blocks aligned to 2 MB, advised for huge pages.

    Weights keep it alive. Worth using for every model: small weights would otherwise get pages of 4 KB, which are up
    to several times slower to read cold.

    Args:
        block_bytes: size of the blocks taken from the system; a weight larger than that gets its own.
    """

    def __init__(self, block_bytes: int = 64 << 20) -> None:
        if block_bytes < 1:
            raise ConfigurationError(f"block_bytes must be positive, not {block_bytes}")
        library = _require()
        self._handle = library.matgptq_arena_create(block_bytes)
        if not self._handle:
            raise MemoryError("matgptq kernels: out of memory")
        weakref.finalize(self, library.matgptq_arena_free, self._handle).atexit = False

    @property
    def nbytes(self) -> int:
        """Bytes handed out to weights so far."""
        return int(_require().matgptq_arena_bytes(self._handle))


class Weight:
    """A packed weight, made by ``pack_parent`` or ``pack_slice``.

    Attributes:
        out_features, in_features: shape ``[out, in]``.
        group_size: input columns per scale.
        widths: widths that it serves, ascending.
        resident: true for the parent's 8 planes, false for a packed slice.
        device: the CPU.
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
        weakref.finalize(self, _require().matgptq_weight_free, handle).atexit = False

    @property
    def key(self) -> int:
        """A number that belongs to this weight as long as it lives."""
        return self._handle

    def __deepcopy__(self, memo: object) -> Weight:
        """The same weight: it never changes, so copies of a model may share it."""
        return self

    def __repr__(self) -> str:
        form = "resident parent" if self.resident else "packed slice"
        return (
            f"Weight({form}, {self.out_features} x {self.in_features}, group {self.group_size}, widths {self.widths})"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory held: planes and scales, padding included."""
        return int(_require().matgptq_weight_bytes(self._handle))

    def bytes_read(self, bits: int | None = None) -> int:
        """Bytes that one product of width ``bits`` reads (a resident parent reads r+1 planes for r < 8)."""
        return int(_require().matgptq_weight_bytes_read(self._handle, self.served_bits(bits)))

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
    library = _require()
    if codes.ndim != 2 or 0 in codes.shape:
        raise ConfigurationError(f"codes must be a matrix [out, in] that is not empty, not {tuple(codes.shape)}")
    out_features, in_features = codes.shape
    codes = _expect(codes, "codes", torch.uint8, (out_features, in_features))
    widths = check_widths(scales)
    groups = next(iter(scales.values())).shape[-1]
    if groups == 0 or in_features % groups:
        raise ConfigurationError(f"{groups} groups do not divide {in_features} input features")
    group_size = in_features // groups
    if groups > 1 and group_size % _GROUP_UNIT:
        raise ConfigurationError(
            f"group_size {group_size} is not supported: use a multiple of {_GROUP_UNIT}, or one group per row"
        )
    # Equal tensors are stored once: the conversion must not make two of one.
    converted: dict[int, Tensor] = {}
    for scale in scales.values():
        if id(scale) not in converted:
            converted[id(scale)] = _expect(
                scale.to(torch.float32), f"scales of {tuple(scales)} bits", torch.float32, (out_features, groups)
            )
    width_array = (_int * len(widths))(*widths)
    scale_array = (_pointer * len(widths))(*(converted[id(scales[bits])].data_ptr() for bits in widths))
    handle = _pointer()
    _check(
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
            _threads(num_threads),
            ctypes.byref(handle),
        )
    )
    assert handle.value is not None  # _check has raised otherwise
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
        self._multiply = _require().matgptq_matmul
        self._activations = _ACTIVATIONS[activations]
        self.in_features = weights[0].in_features
        self.out_features = sum(weight.out_features for weight in weights)
        self._products = (_Product * len(weights))()
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
                bias = _expect(bias, "bias", torch.float32, (weight.out_features,))
                self._alive.append(bias)
                product.bias = bias.data_ptr()
            self._offsets.append(start)
            start += weight.out_features

    def __call__(self, x: Tensor) -> Tensor:
        """``[rows, sum of out]`` in the dtype of ``x``, float32 or bfloat16 ``[rows, in]`` on the CPU."""
        dtype = _DTYPES.get(x.dtype)
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
            _check(status)
        return joined


def _rows_of(x: Tensor, activations: Activations) -> Tensor:
    """``x`` as ``[rows, in]`` with adjacent columns, if the library can multiply it."""
    if x.device.type != "cpu":
        raise ConfigurationError(f"x must be on the CPU, not on {x.device}")
    if x.dtype not in _DTYPES:
        raise ConfigurationError(f"x must be torch.float32 or torch.bfloat16, not {x.dtype}")
    if activations not in _ACTIVATIONS:
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
    products = (_Product * len(weights))()
    alive: list[Tensor] = []
    for product, weight, width, bias, y in zip(products, weights, widths, added, results, strict=True):
        if weight.in_features != in_features:
            raise ConfigurationError(f"x has {in_features} features, the weight takes {weight.in_features}")
        product.weight = weight._handle
        product.bits = weight.served_bits(width)
        if bias is not None:
            bias = _expect(bias, "bias", torch.float32, (weight.out_features,))
            alive.append(bias)
            product.bias = bias.data_ptr()
        product.y = y.data_ptr()
        product.y_stride = y.stride(0)
    dtype = _DTYPES[rows.dtype]
    _check(
        _require().matgptq_matmul(
            rows.data_ptr(),
            dtype,
            rows.stride(0),
            batch,
            in_features,
            products,
            len(weights),
            dtype,
            _ACTIVATIONS[activations],
            _threads(num_threads),
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
    library = _require()
    if stop is None:
        stop = weight.out_features
    if not 0 <= start <= stop <= weight.out_features:
        raise ConfigurationError(f"rows {start}..{stop} are not within 0..{weight.out_features}")
    if dtype not in _DTYPES:
        raise ConfigurationError(f"dtype must be torch.float32 or torch.bfloat16, not {dtype}")
    shape = (stop - start, weight.in_features)
    if out is None:
        out = torch.empty(shape, dtype=dtype)
    elif out.device.type != "cpu" or out.dtype != dtype or tuple(out.shape) != shape or out.stride(1) != 1:
        raise ConfigurationError(f"out must be a {dtype} CPU tensor of shape {shape} with contiguous rows")
    _check(
        library.matgptq_dequantize(
            weight._handle,
            weight.served_bits(bits),
            start,
            stop,
            out.data_ptr(),
            _DTYPES[dtype],
            out.stride(0),
            _threads(num_threads),
        )
    )
    return out


def read(memory: Tensor, num_threads: int | None = None) -> None:
    """Read a contiguous CPU tensor once and do nothing with it: what kernels' speed is measured against."""
    if memory.device.type != "cpu" or not memory.is_contiguous():
        raise ConfigurationError("memory must be a contiguous CPU tensor")
    _require().matgptq_read(memory.data_ptr(), memory.nbytes, _threads(num_threads))


def sweep(
    base: Tensor,
    coupling: Tensor,
    scales: Tensor,
    group_of: Tensor,
    widths: Sequence[int],
    weights: Sequence[float] | Tensor,
    *,
    mode: SweepMode = "residual",
    trail: Tensor | None = None,
    num_threads: int | None = None,
) -> Tensor:
    """The solver's column sweep: choose parent codes column by column, compensating each width's copy.

    For column j in order, with ``x_r = base_r[j] + trail_r[j]``: the code minimises
    ``sum_r weights[r] * (x_r - s_r * (v_r(q) - 128))^2`` exactly (the lowest of equals), giving
    ``w_r = s_r * (v_r(q) - 128)``, and for all k > j ``trail_r[k] -= c_r * coupling[j, k]`` where ``c_r`` is

    - ``"residual"`` (GPTQ): ``x_r - w_r``
    - ``"change"`` (coordinate descent): ``w_r - base_r[j]``
    - ``"mean"`` (the published baseline): ``x - mean_r(w_r)``, with one shared copy

    Args:
        base: ``torch.float32`` ``[R, rows, in]``, columns in processing order; ``[1, rows, in]`` in the mean mode.
        coupling: ``torch.float32`` ``[in, in]``; only the part above the diagonal is read.
        scales: ``torch.float32`` ``[R, rows, groups]``, in units of the parent's grid; may be negative, not zero.
        group_of: ``torch.int32`` ``[in]``, the group of each column in processing order.
        widths: R ascending widths, 2..8.
        weights: R numbers, not negative: the lambda of each width.
        mode: see above.
        trail: ``torch.float32`` like ``base``, added to it from the start; not written. Default zeros.
        num_threads: default ``torch.get_num_threads()``.

    Returns:
        Parent codes, ``torch.uint8`` ``[rows, in]``.
    """
    library = _require()
    if mode not in _SWEEP_MODES:
        raise ConfigurationError(f"mode must be one of {tuple(_SWEEP_MODES)}, not {mode!r}")
    ascending = check_widths(widths)
    if tuple(widths) != ascending:
        raise ConfigurationError(f"widths must be ascending and without repeats, not {tuple(widths)}")
    lambdas = torch.as_tensor(weights, dtype=torch.float32, device="cpu").contiguous()
    count = len(ascending)
    if tuple(lambdas.shape) != (count,) or not bool((lambdas >= 0).all()):
        raise ConfigurationError(f"weights must be {count} numbers that are not negative")
    if base.ndim != 3 or scales.ndim != 3:
        raise ConfigurationError("base must be [R, rows, in] and scales [R, rows, groups]")
    _, rows, in_features = base.shape
    groups = scales.shape[2]
    copies = 1 if mode == "mean" else count
    base = _expect(base, "base", torch.float32, (copies, rows, in_features))
    coupling = _expect(coupling, "coupling", torch.float32, (in_features, in_features))
    scales = _expect(scales, "scales", torch.float32, (count, rows, groups))
    group_of = _expect(group_of, "group_of", torch.int32, (in_features,))
    if trail is not None:
        trail = _expect(trail, "trail", torch.float32, (copies, rows, in_features))
    codes = torch.empty((rows, in_features), dtype=torch.uint8)
    width_array = (_int * count)(*ascending)
    job = _SweepJob(
        rows=rows,
        in_features=in_features,
        num_groups=groups,
        num_widths=count,
        widths=ctypes.addressof(width_array),
        weights=lambdas.data_ptr(),
        base=base.data_ptr(),
        trail=None if trail is None else trail.data_ptr(),
        coupling=coupling.data_ptr(),
        scales=scales.data_ptr(),
        group_of=group_of.data_ptr(),
        codes=codes.data_ptr(),
        mode=_SWEEP_MODES[mode],
        num_threads=_threads(num_threads),
    )
    _check(library.matgptq_sweep(ctypes.byref(job)))
    return codes


def search_scales(
    weight: Tensor,
    importance: Tensor,
    candidates: Tensor,
    breakpoints: Tensor,
    mean_level: Tensor,
    spread: Tensor,
    *,
    num_threads: int | None = None,
) -> Tensor:
    """Index of the best candidate scale of every group.

    A candidate s costs ``s^2 * sum_j importance[j] * error(weight[j] / s)`` over the columns of the group, with
    ``error(p) = (p - mean_level[k])^2 + spread[k]`` on piece k, ``breakpoints[k-1] < p <= breakpoints[k]``. The first
    of equals is taken.

    Args:
        weight: ``torch.float32`` ``[rows, in]``.
        importance: ``torch.float32`` ``[in]``.
        candidates: ``torch.float32`` ``[n, rows, groups]``, not zero.
        breakpoints: ``torch.float32`` ``[K - 1]``, ascending.
        mean_level, spread: ``torch.float32`` ``[K]``, K at most 256.
        num_threads: default ``torch.get_num_threads()``.

    Returns:
        ``torch.int32`` ``[rows, groups]``.
    """
    library = _require()
    if weight.ndim != 2 or candidates.ndim != 3:
        raise ConfigurationError("weight must be [rows, in] and candidates [n, rows, groups]")
    rows, in_features = weight.shape
    count, _, groups = candidates.shape
    if groups == 0 or in_features % groups:
        raise ConfigurationError(f"{groups} groups do not divide {in_features} input features")
    pieces = len(mean_level)
    weight = _expect(weight, "weight", torch.float32, (rows, in_features))
    importance = _expect(importance, "importance", torch.float32, (in_features,))
    candidates = _expect(candidates, "candidates", torch.float32, (count, rows, groups))
    breakpoints = _expect(breakpoints, "breakpoints", torch.float32, (pieces - 1,))
    mean_level = _expect(mean_level, "mean_level", torch.float32, (pieces,))
    spread = _expect(spread, "spread", torch.float32, (pieces,))
    best = torch.empty((rows, groups), dtype=torch.int32)
    job = _SearchJob(
        rows=rows,
        in_features=in_features,
        group_size=in_features // groups,
        num_candidates=count,
        num_pieces=pieces,
        weight=weight.data_ptr(),
        importance=importance.data_ptr(),
        candidates=candidates.data_ptr(),
        breakpoints=breakpoints.data_ptr(),
        mean_level=mean_level.data_ptr(),
        spread=spread.data_ptr(),
        best=best.data_ptr(),
        num_threads=_threads(num_threads),
    )
    _check(library.matgptq_search_scales(ctypes.byref(job)))
    return best
