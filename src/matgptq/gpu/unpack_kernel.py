"""GPU code that makes numbers of packed weights, in Triton. ``gpu.layout`` says how the weights lie; read it first.

On the way from planes to numbers, per weight:

    slicing     on whole planes, 32 weights per instruction: the bit that rounds is added like a carry, and dropped
                where all bits above it are set, for there the slice saturates
    transpose   planes of one bit become fields of 2, 4 or 8, half a register of each pair of neighbours: log2(field)
                exchanges between words, half an instruction per weight for 4 bits
    convert     the field is put into the mantissa of a float of known exponent, both halves at once, and the centre
                subtracted: exact, and no conversion instruction
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton's interpreter takes the bits of a bfloat16 for an integer, so there the same numbers are computed in float32.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _choose(first, second, MASK: tl.constexpr):
    """The bits of ``first`` where MASK has ones, those of ``second`` elsewhere; one instruction."""
    if INTERPRETED:
        return (first & MASK) | (second & (-1 - MASK))
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xe4;",
            "=r,r,r,r",
            [first, second, tl.full(first.shape, MASK, tl.int32)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _field_floats(word, MASK: tl.constexpr, MAGIC: tl.constexpr, CENTRE: tl.constexpr, dtype: tl.constexpr):
    """``word & MASK | MAGIC`` minus CENTRE, both halves of each word taken for floats: the lower ones, the upper ones.

    Two instructions for two weights, whatever the compiler: that of Triton 3.9 takes halves apart, subtracts from each
    and puts them together again, which makes the loop of a product half as long again; that of 3.6 does not.
    """
    if INTERPRETED:
        both = (word & MASK) | MAGIC
        centre = tl.full(word.shape, CENTRE & 0xFFFF, tl.int32).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        low = both.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        high = (both >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        return (low - centre).to(dtype), (high - centre).to(dtype)
    else:
        mask = tl.full(word.shape, MASK, tl.int32)
        magic = tl.full(word.shape, MAGIC, tl.int32)
        if dtype == tl.float16:
            centre = tl.full(word.shape, CENTRE, tl.int32)
            low, high = tl.inline_asm_elementwise(
                "{ .reg .b32 t; lop3.b32 t, $2, $3, $4, 0xea; sub.rn.f16x2 t, t, $5; mov.b32 {$0, $1}, t; }",
                "=h,=h,r,r,r,r",
                [word, mask, magic, centre],
                dtype=(tl.int16, tl.int16),
                is_pure=True,
                pack=1,
            )
        else:  # there is no difference of two pairs before compute capability 9.0
            one = tl.full(word.shape, 0x3F803F80, tl.int32)
            negative = tl.full(word.shape, CENTRE - 0x7FFF8000, tl.int32)  # the signs of both halves changed
            low, high = tl.inline_asm_elementwise(
                "{ .reg .b32 t; lop3.b32 t, $2, $3, $4, 0xea; fma.rn.bf16x2 t, t, $5, $6; mov.b32 {$0, $1}, t; }",
                "=h,=h,r,r,r,r,r",
                [word, mask, magic, one, negative],
                dtype=(tl.int16, tl.int16),
                is_pure=True,
                pack=1,
            )
        return low.to(dtype, bitcast=True), high.to(dtype, bitcast=True)


@triton.jit
def _merge(low, high, SIZE: tl.constexpr, MASK: tl.constexpr):
    """Fields of SIZE bits as fields of twice that size: those at even places, those at odd places."""
    return _choose(low, high << SIZE, MASK), _choose(low >> SIZE, high, MASK)


@triton.jit
def _spread(word, SIZE: tl.constexpr, MASK: tl.constexpr):
    """``_merge`` with zeros above."""
    return word & MASK, (word >> SIZE) & MASK


@triton.jit
def _nibbles(planes, FIELDS: tl.constexpr):
    """One to four planes, least significant first, as words whose nibbles are every fourth weight's.

    With FIELDS, they are what ``layout.fields`` makes of planes.
    """
    if len(planes) == 4 and FIELDS:
        return planes
    else:
        if len(planes) == 1:
            a0, a1 = _spread(planes[0], 1, 0x55555555)
        elif FIELDS:
            a0, a1 = planes[0], planes[1]
        else:
            a0, a1 = _merge(planes[0], planes[1], 1, 0x55555555)
        if len(planes) <= 2:
            w0, w2 = _spread(a0, 2, 0x33333333)
            w1, w3 = _spread(a1, 2, 0x33333333)
        else:
            if len(planes) == 3:
                b0, b1 = _spread(planes[2], 1, 0x55555555)
            else:
                b0, b1 = _merge(planes[2], planes[3], 1, 0x55555555)
            w0, w2 = _merge(a0, b0, 2, 0x33333333)
            w1, w3 = _merge(a1, b1, 2, 0x33333333)
        return w0, w1, w2, w3


@triton.jit
def _transpose(planes, FIELD: tl.constexpr, FIELDS: tl.constexpr):
    """2 to 8 planes, least significant first, as words of fields: field j of word m is the weight at FIELD * j + m.

    With more planes than FIELD, the words of the low nibbles come first, then those of the high ones.
    """
    if FIELD == 2:
        if FIELDS:
            return planes
        else:
            return _merge(planes[0], planes[1], 1, 0x55555555)
    elif len(planes) <= 4:
        return _nibbles(planes, FIELDS)
    else:
        words = _nibbles(planes[:4], FIELDS)
        high = _nibbles(planes[4:], FIELDS)
        if FIELD == 8:
            w0, w4 = _merge(words[0], high[0], 4, 0x0F0F0F0F)
            w1, w5 = _merge(words[1], high[1], 4, 0x0F0F0F0F)
            w2, w6 = _merge(words[2], high[2], 4, 0x0F0F0F0F)
            w3, w7 = _merge(words[3], high[3], 4, 0x0F0F0F0F)
            words = (w0, w1, w2, w3, w4, w5, w6, w7)
        else:
            words = words + high
        return words


@triton.jit
def _load_planes(first, offsets, live, stride, COUNT: tl.constexpr):
    """The first planes, most significant first, as they lie: ``[units, 128]`` words each, like ``offsets``."""
    planes = ()
    for plane in tl.static_range(COUNT):
        planes = planes + (tl.load(first + plane * stride + offsets, mask=live),)
    return planes


@triton.jit
def slice_planes(read, BITS: tl.constexpr, RESIDENT: tl.constexpr, FIELD: tl.constexpr):
    """A slice as words of fields of FIELD bits, from the planes that were read: those of s = 0, those of s = 1.

    A word is ``[units, g, t, i]``.
    """
    ROUNDS: tl.constexpr = RESIDENT and BITS < 8
    UNITS: tl.constexpr = read[0].shape[0]
    planes = ()
    for plane in tl.static_range(BITS):
        planes = (read[plane],) + planes
    if ROUNDS:
        full = planes[0]
        for plane in tl.static_range(1, BITS):
            full = full & planes[plane]
        carry = read[BITS] & ~full
        rounded = ()
        for plane in tl.static_range(BITS):
            rounded = rounded + (planes[plane] ^ carry,)
            carry = planes[plane] & carry
        planes = rounded
    cut = ()
    for plane in tl.static_range(len(planes)):
        cut = cut + (planes[plane].reshape(UNITS, 8, 4, 2, 2).permute(0, 1, 2, 4, 3),)
    words = _transpose(cut, FIELD, not RESIDENT)
    left = ()
    right = ()
    for word in tl.static_range(len(words)):
        first, second = tl.split(words[word])
        left = left + (first,)
        right = right + (second,)
    return left, right


@triton.jit
def _pair(
    words, PLACE: tl.constexpr, FIELD: tl.constexpr, ZERO: tl.constexpr, FACTOR: tl.constexpr, dtype: tl.constexpr
):
    """``FACTOR * (u - ZERO)`` of the two neighbours at one place, along a new last axis of 2."""
    MANTISSA: tl.constexpr = 10 if dtype == tl.float16 else 7
    EXPONENT_BIAS: tl.constexpr = 15 if dtype == tl.float16 else 127
    # As many fields as the mantissa holds are taken where they are, each with an exponent of its own.
    PER_SHIFT: tl.constexpr = MANTISSA // FIELD if MANTISSA >= FIELD else 1
    J: tl.constexpr = PLACE // FIELD
    BIT: tl.constexpr = J % PER_SHIFT * FIELD
    LOG: tl.constexpr = MANTISSA - BIT + (4 if FACTOR == 16 else 0)
    MASK: tl.constexpr = ((1 << FIELD) - 1) << BIT
    MAGIC: tl.constexpr = (LOG + EXPONENT_BIAS) << MANTISSA
    CENTRE: tl.constexpr = MAGIC | (ZERO << BIT)  # the same float, with ZERO in the field
    low, high = _field_floats(
        words[PLACE % FIELD] >> (J * FIELD - BIT), MASK * 0x10001, MAGIC * 0x10001, CENTRE * 0x10001, dtype
    )
    return tl.join(low, high)


@triton.jit
def convert_half(
    words, U: tl.constexpr, FIELD: tl.constexpr, ZERO: tl.constexpr, FACTOR: tl.constexpr, dtype: tl.constexpr
):
    """32 columns of 64, ``[chunks, g, t, i, b, h, e, c]``."""
    columns = ()
    for c in tl.static_range(2):
        h0 = tl.join(
            _pair(words, 8 * U + 4 * c, FIELD, ZERO, FACTOR, dtype),
            _pair(words, 8 * U + 4 * c + 1, FIELD, ZERO, FACTOR, dtype),
        )
        h1 = tl.join(
            _pair(words, 8 * U + 4 * c + 2, FIELD, ZERO, FACTOR, dtype),
            _pair(words, 8 * U + 4 * c + 3, FIELD, ZERO, FACTOR, dtype),
        )
        columns = columns + (tl.join(h0, h1),)
    return tl.join(columns[0], columns[1])


@triton.jit
def _groups(columns, GROUP_HALVES: tl.constexpr):
    """Groups of a row."""
    if GROUP_HALVES == 0:
        return 1
    else:
        return columns // (32 * GROUP_HALVES)


@triton.jit
def _group(chunk, part, columns, PARTS: tl.constexpr, GROUP_HALVES: tl.constexpr):
    """The group of a part of a chunk; the padding behind the last column belongs to the last group."""
    if GROUP_HALVES % 4 == 0:
        return chunk // (GROUP_HALVES // 4)
    else:
        return tl.minimum((PARTS * chunk + part) * (4 // PARTS) // GROUP_HALVES, _groups(columns, GROUP_HALVES) - 1)


@triton.jit
def _load_scales(scales, block, groups, group, live):
    """``[units * g * t, 2 * i + h]``: the scales of ``block`` and ``group``, which name each thread's own.

    The four threads t of a row read the same ones.
    """
    g = tl.arange(0, block.shape[0]) // 4 % 8
    offsets = (block * groups + group) * 32 + g * 4
    return tl.load(scales + offsets[:, None] + tl.arange(0, 4)[None, :], mask=live)


@triton.jit
def read_step(
    planes,
    scales,
    program,
    start,
    last,
    blocks,
    chunks,
    stride,
    columns,
    UNITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP_HALVES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What the step at chunk ``start`` takes of the weight: its planes, and the scales of each part that has its own.

    Chunks past the last are read as the last. With MASKED, a step past it reads nothing.
    """
    w_unit = tl.arange(0, UNITS)
    s_unit = tl.arange(0, UNITS * 32) // 32
    w_block = tl.minimum(program * BLOCKS + w_unit % BLOCKS, blocks - 1)
    s_block = tl.minimum(program * BLOCKS + s_unit % BLOCKS, blocks - 1)
    w_chunk = tl.minimum(start + w_unit // BLOCKS, last - 1)
    s_chunk = tl.minimum(start + s_unit // BLOCKS, last - 1)
    w_live = None
    s_live = None
    if MASKED:
        w_live = (start + w_unit * 0 < last)[:, None]
        s_live = (start + s_unit * 0 < last)[:, None]
    offsets = (w_block * chunks + w_chunk)[:, None] * 128 + tl.arange(0, 128)[None, :]
    read = _load_planes(planes, offsets, w_live, stride, COUNT)
    for part in tl.static_range(PARTS):
        group = _group(s_chunk, part, columns, PARTS, GROUP_HALVES)
        read = read + (_load_scales(scales, s_block, _groups(columns, GROUP_HALVES), group, s_live),)
    return read


@triton.jit(do_not_specialize=["first", "rows", "blocks", "chunks"])
def dequantize(
    planes,
    scales,
    out,
    first,
    rows,
    columns,
    blocks,
    chunks,
    stride,
    BITS: tl.constexpr,
    RESIDENT: tl.constexpr,
    GROUP_HALVES: tl.constexpr,
    UNITS: tl.constexpr,
):
    """``out [rows, columns]``: weights from block ``first`` on; a program takes UNITS chunks of a block of rows."""
    PLANES: tl.constexpr = BITS + 1 if RESIDENT and BITS < 8 else BITS
    FIELD: tl.constexpr = 2 if BITS == 2 else (4 if BITS <= 4 else 8)
    PARTS: tl.constexpr = 4 if GROUP_HALVES % 4 else 1
    start = tl.program_id(1) * UNITS
    block = first + tl.program_id(0)
    w_chunk = tl.minimum(start + tl.arange(0, UNITS), chunks - 1)
    s_chunk = tl.minimum(start + tl.arange(0, UNITS * 32) // 32, chunks - 1)
    offsets = (block * chunks + w_chunk)[:, None] * 128 + tl.arange(0, 128)[None, :]
    sides = slice_planes(_load_planes(planes, offsets, None, stride, PLANES), BITS, RESIDENT, FIELD)
    # As for loads, two axes: 2 * i + h, units and g in one, so that threads store what they hold.
    line = tl.arange(0, UNITS * 32)
    row = line // (UNITS * 8) * 8 + line % 8
    column = (start + line // 8 % UNITS) * 128
    live = (tl.program_id(0) * 32 + row < rows)[:, None]
    out += tl.program_id(0).to(tl.int64) * 32 * columns
    for half in tl.static_range(4):
        group = s_chunk * 0
        if GROUP_HALVES > 0:
            group = _group(s_chunk, half if PARTS == 4 else 0, columns, PARTS, GROUP_HALVES)
        scale = _load_scales(scales, block + s_chunk * 0, _groups(columns, GROUP_HALVES), group, None).to(
            tl.float32
        ) * (1 << (8 - BITS))
        scale = scale.reshape(UNITS, 8, 4, 2, 2).permute(3, 4, 0, 1, 2).reshape(2, 2, UNITS, 8, 4, 1, 1, 1)
        levels = convert_half(sides[half // 2], half % 2, FIELD, 1 << (BITS - 1), 1, tl.float16)
        levels = levels.permute(3, 5, 0, 1, 2, 7, 6, 4).to(tl.float32)  # i, h, units, g, t, c, e, b
        weights = (levels * scale).to(out.dtype.element_ty).reshape(UNITS * 32, 32)
        k = column[:, None] + 32 * half + tl.arange(0, 32)[None, :]
        tl.store(out + (row * columns)[:, None] + k, weights, mask=live & (k < columns))
