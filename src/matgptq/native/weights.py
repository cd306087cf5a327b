"""Weights in the memory forms of the library: a parent that serves every width, or one slice."""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from matgptq.errors import ConfigurationError
from matgptq.immutable import Immutable
from matgptq.native.library import GROUP_UNIT, check_status, expect_tensor, require_library, thread_count
from matgptq.slicing import PARENT_BITS, check_bits, check_widths

_keys = itertools.count(1)


class Arena(Immutable):
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


class Weight(Immutable):
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
