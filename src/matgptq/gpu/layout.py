"""How codes lie in the memory of a GPU: bit planes, in the order in which tensor cores want them.

Matrices are cut into blocks of 32 rows and chunks of 128 columns, both padded with zero bits. Plane 0 holds the most
significant bit of every code, so a slice of r bits reads the first r + 1 planes (one rounds; all 8 for r = 8) of a
*resident parent*, and all r planes of a *packed slice*, which was rounded when it was packed.

A block and chunk of one plane is 128 words of 32 bits: one warp, 128 bits per thread. The multiply instruction of
tensor cores (m16n8k16) fixes which thread holds which weight, so nothing has to change places after loading. With

    row    = 32 * block + 16 * i + 8 * h + g                     i, h = 0..1, g = 0..7
    column = 128 * chunk + 64 * s + 32 * u + 8 * t + 4 * c + 2 * e + b      t = 0..3, the others 0..1

the bit lies in word ``4 * (4 * g + t) + 2 * s + i`` of its 128, at position ``16 * b + 8 * u + 4 * c + 2 * e + h``:
bit b apart by 16, so that the two neighbours that share a register unpack as the halves of one word. The order of
columns lets a thread load its activations as 16 neighbouring bytes. Scales lie as ``[blocks, groups, g, 2 * i + h]``
for the same reason. Blocks are low, so that matrices of a few thousand rows give every multiprocessor one of its own
and no sum has to be split.

Nothing is rounded any more in a packed slice, so what kernels would make of its planes with every product is made when
it is packed: words of fields in place of planes, as ``fields`` says.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from matgptq import slicing
from matgptq.errors import ConfigurationError
from matgptq.immutable import Immutable
from matgptq.slicing import PARENT_BITS, check_bits, slice_codes

BLOCK_ROWS = 32
CHUNK_COLUMNS = 128
CHUNK_WORDS = BLOCK_ROWS * CHUNK_COLUMNS // 32
GROUP_UNIT = 32

# Sizes of the axes that rows (block, i, h, g) and columns (chunk, s, u, t, c, e, b) are cut into.
_ROW_AXES = (2, 2, 8)
_COLUMN_AXES = (2, 2, 4, 2, 2, 2)
# From [block, i, h, g, chunk, s, u, t, c, e, b] to [block, chunk, g, t, s, i, b, u, c, e, h].
_TO_WORDS = (0, 4, 3, 7, 5, 1, 10, 6, 8, 9, 2)
_FROM_WORDS = tuple(_TO_WORDS.index(axis) for axis in range(11))

_COUNTERS = 4  # per block of rows: so many tiles of activations may have their columns split

_keys = itertools.count(-1, -1)


class PlaneWeight(Immutable):
    """A weight packed for the Triton kernels, made by ``pack_parent`` or ``pack_slice``.

    Attributes:
        planes: int32 ``[planes, blocks, chunks, 128]``, most significant plane first, laid out as this file says; of a
            packed slice, as many words of fields.
        scales: ``{width: [blocks, groups, 32]}`` float16, for the widths that it serves; in units of the parent's grid.
        out_features, in_features: shape of the weight.
        group_size: input columns per scale.
        resident: true for the parent's 8 planes, false for a packed slice.
        arrived: int32 zeros, scratch with which the parts of a product find out which is the last. So one weight must
            not be multiplied on two streams at the same time.
        key: a number that no other packed weight has; negative, as those of the native library's are not.
    """

    def __init__(
        self, planes: Tensor, scales: Mapping[int, Tensor], shape: tuple[int, int], group_size: int, *, resident: bool
    ) -> None:
        self.planes = planes
        self.scales = dict(scales)
        self.out_features, self.in_features = shape
        self.group_size = group_size
        self.resident = resident
        self.arrived = torch.zeros(_COUNTERS * planes.shape[1], dtype=torch.int32, device=planes.device)
        self.key = next(_keys)

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that it serves, ascending."""
        return tuple(sorted(self.scales))

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.planes.device

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, padding included."""
        own = {scale.data_ptr(): scale.nbytes for scale in self.scales.values()}
        return self.planes.nbytes + sum(own.values()) + self.arrived.nbytes

    def planes_read(self, bits: int) -> int:
        """Planes that a product of that width reads."""
        return min(bits + 1, PARENT_BITS) if self.resident else len(self.planes)

    def bytes_read(self, bits: int) -> int:
        """Bytes that one product of that width reads."""
        return self.planes[0].nbytes * self.planes_read(bits) + self.scales[bits].nbytes

    def copy_of(self, bits: int) -> PlaneWeight:
        """Another copy in memory of what products of one width read."""
        return PlaneWeight(
            self.planes[: self.planes_read(bits)].clone(),
            {bits: self.scales[bits].clone()},
            (self.out_features, self.in_features),
            self.group_size,
            resident=self.resident,
        )


def packable(in_features: int, group_size: int) -> bool:
    """Whether the kernels take this group size: a multiple of 32, or one group per row."""
    return group_size == in_features or group_size % GROUP_UNIT == 0


def pack_parent(codes: Tensor, scales: Mapping[int, Tensor]) -> PlaneWeight:
    """Pack parent codes as 8 planes that serve any width.

    Args:
        codes: parent codes, ``torch.uint8`` ``[out, in]``, on any device.
        scales: float16 ``[out, groups]`` for each width that is to be served, in units of the parent's grid.

    Raises:
        ConfigurationError: wrong dtypes or shapes, or a group size that the kernels do not take.
    """
    return _pack(codes, codes, PARENT_BITS, scales, resident=True)


def pack_slice(codes: Tensor, scales: Tensor, bits: int) -> PlaneWeight:
    """Pack one slice in ``bits`` planes.

    Args:
        codes: *parent* codes, ``torch.uint8`` ``[out, in]``; they are sliced here.
        scales: float16 ``[out, groups]`` of that width, in units of the parent's grid.
        bits: the only width that the result serves, 2..8.

    Raises:
        ConfigurationError: as for ``pack_parent``.
    """
    return _pack(codes, slice_codes(codes, bits), check_bits(bits), {bits: scales}, resident=False)


def unpack(weight: PlaneWeight) -> Tensor:
    """The codes that were packed: the parent's uint8 ``[out, in]``, or those of the slice."""
    count, blocks, chunks, _ = weight.planes.shape
    planes = weight.planes if weight.resident else fields(weight.planes, count)
    sliced = torch.zeros(blocks, chunks, 8, 4, 2, 2, 2, 2, 2, 2, 2, dtype=torch.uint8, device=weight.device)
    shifts = torch.arange(32, device=weight.device, dtype=torch.int32)
    for words in planes:
        bits = ((words.unsqueeze(-1) >> shifts) & 1).to(torch.uint8)
        sliced = (sliced << 1) | bits.view(sliced.shape)
    codes = sliced.permute(_FROM_WORDS).reshape(blocks * BLOCK_ROWS, chunks * CHUNK_COLUMNS)
    return codes[: weight.out_features, : weight.in_features].contiguous()


def fields(planes: Tensor, bits: int) -> Tensor:
    """Planes of a slice as words of fields, and back.

    Args:
        planes: int32 ``[bits, ...]``, most significant first.
        bits: width of the slice.

    Returns:
        As many, in the same order. Every four planes, from the least significant on, become the words w0 to w3, of
        which nibble j of wm is the weight at place 4 * j + m. Of two or three planes left over, the lower two become
        words of fields of two bits; a single one stays. Both steps undo themselves and one may go before the other, so
        doing it twice changes nothing.
    """
    done = planes.clone()
    for stop in range(bits, 0, -4):  # parts of four planes, the least significant ones first
        part = done[max(0, stop - 4) : stop].flip(0)  # a copy, least significant first
        if len(part) > 1:
            _exchange(part[0], part[1], 1, 0x55555555)
        if len(part) == 4:
            _exchange(part[2], part[3], 1, 0x55555555)
            _exchange(part[0], part[2], 2, 0x33333333)
            _exchange(part[1], part[3], 2, 0x33333333)
        done[max(0, stop - 4) : stop] = part.flip(0)
    return done


def _exchange(low: Tensor, high: Tensor, size: int, mask: int) -> None:
    """Fields of ``size`` bits as fields of twice that, those at even places and those at odd ones, in place.

    Done twice it changes nothing.
    """
    even = (low & mask) | ((high << size) & ~mask)
    high.copy_(((low >> size) & mask) | (high & ~mask))
    low.copy_(even)


def dequantize(weight: PlaneWeight, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights ``[out, in]`` of one slice, with PyTorch operations: the definition of what the kernels multiply by.

    Args:
        weight: packed weight that serves ``bits``.
        bits: width.
        dtype: of the result; formed in float32 and rounded once, as ``slicing.dequantize`` does.
    """
    codes = unpack(weight)
    blocks, groups, _ = weight.scales[bits].shape
    placed = weight.scales[bits].view(blocks, groups, 8, 4).permute(0, 3, 2, 1)
    scales = placed.reshape(blocks * BLOCK_ROWS, groups)[: weight.out_features]
    if weight.resident:
        return slicing.dequantize(codes, scales, bits, dtype)
    # The codes of a slice, moved to the top, are a parent that has the slice as its own.
    return slicing.dequantize(codes << (PARENT_BITS - bits), scales, bits, dtype)


def _pack(codes: Tensor, stored: Tensor, count: int, scales: Mapping[int, Tensor], *, resident: bool) -> PlaneWeight:
    if codes.dtype != torch.uint8 or codes.dim() != 2 or 0 in codes.shape:
        raise ConfigurationError(
            f"codes must be a uint8 matrix [out, in] that is not empty, not {codes.dtype} {tuple(codes.shape)}"
        )
    out_features, in_features = codes.shape
    groups = next(iter(scales.values())).shape[-1]
    if groups == 0 or in_features % groups:
        raise ConfigurationError(f"{groups} groups do not divide {in_features} input features")
    group_size = in_features // groups
    if not packable(in_features, group_size):
        raise ConfigurationError(
            f"group_size {group_size} is not supported: use a multiple of {GROUP_UNIT}, or one group per row"
        )
    blocks = -(-out_features // BLOCK_ROWS)
    chunks = -(-in_features // CHUNK_COLUMNS)
    padding = (0, chunks * CHUNK_COLUMNS - in_features, 0, blocks * BLOCK_ROWS - out_features)
    padded = torch.nn.functional.pad(stored, padding)
    ordered = padded.view(blocks, *_ROW_AXES, chunks, *_COLUMN_AXES).permute(_TO_WORDS).reshape(-1, 8)
    planes = torch.empty(count, len(ordered) // 4, dtype=torch.int32, device=codes.device)
    for plane, significance in zip(planes, reversed(range(count)), strict=True):
        packed = plane.view(torch.uint8)  # bit 0 of a word is bit 0 of its first byte
        packed.zero_()
        for position in range(8):
            packed |= ((ordered[:, position] >> significance) & 1) << position
    placed: dict[int, Tensor] = {}  # equal tensors stay one
    for scale in scales.values():
        if id(scale) not in placed:
            placed[id(scale)] = _place_scales(scale, out_features, groups, blocks)
    if not resident:
        planes = fields(planes, count)
    return PlaneWeight(
        planes.view(count, blocks, chunks, CHUNK_WORDS),
        {bits: placed[id(scale)] for bits, scale in scales.items()},
        (out_features, in_features),
        group_size,
        resident=resident,
    )


def _place_scales(scale: Tensor, out_features: int, groups: int, blocks: int) -> Tensor:
    """float16 ``[out, groups]`` as ``[blocks, groups, 32]``, the rows of a block in the order g, i, h."""
    if scale.dtype != torch.float16 or tuple(scale.shape) != (out_features, groups):
        raise ConfigurationError(
            f"scales must be float16 {(out_features, groups)}, not {scale.dtype} {tuple(scale.shape)}"
        )
    padded = torch.nn.functional.pad(scale, (0, 0, 0, blocks * BLOCK_ROWS - out_features))
    return padded.view(blocks, 4, 8, groups).permute(0, 3, 2, 1).reshape(blocks, groups, BLOCK_ROWS)
