"""GPU code of products with packed weights, in Triton. ``gpu_layout`` says how the weights lie; read it first.

Everything a thread needs of the weight it loads itself, 128 bits at a time, into the registers from which its tensor
core multiplies: no shared memory, no barriers, until the parts of a sum meet at the end. On the way from planes to
operands, per weight:

    slicing     on whole planes, 32 weights per instruction: the bit that rounds is added like a carry, and dropped
                where all bits above it are set, for there the slice saturates
    transpose   planes of one bit become fields of 2, 4 or 8, half a register of each pair of neighbours: log2(field)
                exchanges between words, half an instruction per weight for 4 bits
    convert     the field is put into the mantissa of a float of known exponent, both halves at once, and the centre
                subtracted: exact, and no conversion instruction
    multiply    integers by activations, summed in float32; the group's scale multiplies the sum

So nothing is rounded but the activations as they came, the float32 sums and the result.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton's interpreter takes the bits of a bfloat16 for an integer, so there the same numbers are computed in float32.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
# The compiler hands neighbours in pairs to the threads of a tensor core, or, up to 3.7, two pairs each where tensors
# are joined. The order of columns is free as long as weights and activations agree: it is the one that moves nothing.
_PAIRS_FIRST = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8))


@triton.jit
def _merge(low, high, SIZE: tl.constexpr, MASK: tl.constexpr):
    """Fields of SIZE bits as fields of twice that size: those at even places, those at odd places."""
    even = (low & MASK) | ((high & MASK) << SIZE)
    odd = ((low >> SIZE) & MASK) | (high & (-1 - MASK))
    return even, odd


@triton.jit
def _quads(p0, p1, p2, p3):
    """Four planes, least significant first, as words whose nibbles are every fourth weight's."""
    a0, a1 = _merge(p0, p1, 1, 0x55555555)
    b0, b1 = _merge(p2, p3, 1, 0x55555555)
    w0, w2 = _merge(a0, b0, 2, 0x33333333)
    w1, w3 = _merge(a1, b1, 2, 0x33333333)
    return w0, w1, w2, w3


@triton.jit
def _transpose(planes, FIELD: tl.constexpr):
    """Planes, least significant first, as words of fields: field j of word m is the weight at place FIELD * j + m.

    There are as many planes as words: 2, 4 or 8. If FIELD is half of that, the words of the low nibbles come first.
    """
    if len(planes) == 2:
        return _merge(planes[0], planes[1], 1, 0x55555555)
    else:
        words = _quads(planes[0], planes[1], planes[2], planes[3])
        if len(planes) == 8:
            high = _quads(planes[4], planes[5], planes[6], planes[7])
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
def _load_slice(first, offsets, stride, BITS: tl.constexpr, RESIDENT: tl.constexpr, FIELD: tl.constexpr):
    """A slice as words of fields of FIELD bits, ``[units, g, t, i]`` each; ``offsets [units, 128]``."""
    ROUNDS: tl.constexpr = RESIDENT and BITS < 8
    planes = ()
    for plane in tl.static_range(BITS):
        planes = (tl.load(first + plane * stride + offsets),) + planes
    if ROUNDS:
        full = planes[0]
        for plane in tl.static_range(1, BITS):
            full = full & planes[plane]
        carry = tl.load(first + BITS * stride + offsets) & ~full
        rounded = ()
        for plane in tl.static_range(BITS):
            rounded = rounded + (planes[plane] ^ carry,)
            carry = planes[plane] & carry
        planes = rounded
    for _ in tl.static_range(BITS, 2 if BITS == 2 else (4 if BITS <= 4 else 8)):
        planes = planes + (tl.zeros_like(planes[0]),)
    cut = ()
    for plane in tl.static_range(len(planes)):
        cut = cut + (planes[plane].reshape(offsets.shape[0], 8, 4, 4),)
    return _transpose(cut, FIELD)


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
    ONE: tl.constexpr = 1 << (MANTISSA - BIT)  # the float's implicit one, in units of u
    LOG: tl.constexpr = MANTISSA - BIT + (4 if FACTOR == 16 else 0)
    MASK: tl.constexpr = ((1 << FIELD) - 1) << BIT
    MAGIC: tl.constexpr = (LOG + EXPONENT_BIAS) << MANTISSA
    both = ((words[PLACE % FIELD] >> (J * FIELD - BIT)) & (MASK * 0x10001)) | (MAGIC * 0x10001)
    low = both.to(tl.int16).to(dtype, bitcast=True)
    high = (both >> 16).to(tl.int16).to(dtype, bitcast=True)
    if _INTERPRETED:
        low, high = low.to(tl.float32), high.to(tl.float32)
    return tl.join((low - FACTOR * (ONE + ZERO)).to(dtype), (high - FACTOR * (ONE + ZERO)).to(dtype))


@triton.jit
def _half(words, U: tl.constexpr, FIELD: tl.constexpr, ZERO: tl.constexpr, FACTOR: tl.constexpr, dtype: tl.constexpr):
    """32 columns of a chunk, ``[chunks, g, t, i, b, h, e, c]``."""
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
def _operand(
    words, U: tl.constexpr, FIELD: tl.constexpr, ZERO: tl.constexpr, FACTOR: tl.constexpr, dtype: tl.constexpr
):
    """``[chunks, 64, 32]`` for the tensor cores, columns in the order c, e, t, b or c, t, e, b."""
    half = _half(words, U, FIELD, ZERO, FACTOR, dtype)
    half = half.permute(0, 3, 5, 1, 7, 2, 6, 4) if _PAIRS_FIRST else half.permute(0, 3, 5, 1, 7, 6, 2, 4)
    return half.reshape(half.shape[0], 64, 32)


@triton.jit
def _dot(weights, activations, total):
    if _INTERPRETED:
        weights, activations = weights.to(tl.float32), activations.to(tl.float32)
    return tl.dot(weights, activations, total)


@triton.jit
def _multiply(words, activations, total, U: tl.constexpr, BITS: tl.constexpr, FIELD: tl.constexpr):
    """``total [units, 64, n]`` plus the product of 32 columns with ``activations [n / 8 * units * n % 8, 32]``."""
    dtype: tl.constexpr = activations.dtype
    UNITS: tl.constexpr = total.shape[0]
    cut = activations.reshape(total.shape[2] // 8, UNITS, 8, 4, 2, 2, 2)  # n / 8, units, n % 8, t, c, e, b
    cut = cut.permute(1, 4, 3, 5, 6, 0, 2) if _PAIRS_FIRST else cut.permute(1, 4, 5, 3, 6, 0, 2)
    cut = cut.reshape(UNITS, 32, total.shape[2])
    if FIELD < BITS:  # 16 * (high nibble - 8) + low nibble
        total = _dot(_operand(words[4:], U, 4, 8, 16, dtype), cut, total)
        return _dot(_operand(words[:4], U, 4, 0, 1, dtype), cut, total)
    else:
        return _dot(_operand(words, U, FIELD, 1 << (BITS - 1), 1, dtype), cut, total)


@triton.jit
def _group(half, columns, GROUP_HALVES: tl.constexpr):
    """The group of each half of a chunk; the padding behind the last column belongs to the last group."""
    if GROUP_HALVES == 0:
        return half * 0
    else:
        return tl.minimum(half // GROUP_HALVES, columns // (32 * GROUP_HALVES) - 1)


@triton.jit
def _load_scales(scales, block, blocks, group):
    """``[units * g * t, 2 * i + h]``: the scales of ``block`` and ``group``, which name each thread's own.

    The four threads t of a row read the same ones.
    """
    g = tl.arange(0, block.shape[0]) // 4 % 8
    offsets = (group * blocks + block) * 64 + g * 8
    return tl.load(scales + offsets[:, None] + tl.arange(0, 8)[None, :])


@triton.jit
def _apply_scales(total, scale):
    """``total [units, 64, n]`` times the scales of its rows, as they were loaded."""
    UNITS: tl.constexpr = total.shape[0]
    TILES: tl.constexpr = total.shape[2] // 8
    rows = scale.to(tl.float32).reshape(UNITS, 8, 4, 4, 2).permute(0, 3, 4, 1, 2)  # units, i, h, g, t
    rows = rows.reshape(UNITS, 4, 2, 8, 1, 4, 1)
    return (total.reshape(UNITS, 4, 2, 8, TILES, 4, 2) * rows).reshape(UNITS, 64, TILES * 8)


@triton.jit
def _sum_units(sums, BLOCKS: tl.constexpr):
    """``[units, 64, n]`` as ``[BLOCKS * 64, n]``, summed over the units of a block in one exchange between warps.

    tl.sum would exchange register by register, with a barrier for each.
    """
    if sums.shape[0] == BLOCKS:
        return sums.reshape(BLOCKS * 64, sums.shape[2])
    else:
        halves = sums.reshape(2, sums.shape[0] // 2, 64, sums.shape[2])
        first, second = tl.split(halves.permute(1, 2, 3, 0))
        return _sum_units(first + second, BLOCKS)


# Sizes that vary from call to call and say nothing about alignment must not each cost a compilation.
@triton.jit(do_not_specialize=["batch", "blocks", "chunks", "steps", "splits"])
def fused(
    x,
    planes,
    scales,
    bias,
    out,
    partial,
    arrived,
    rows,
    columns,
    batch,
    blocks,
    chunks,
    stride,
    steps,
    splits,
    BITS: tl.constexpr,
    RESIDENT: tl.constexpr,
    GROUP_HALVES: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    RAGGED: tl.constexpr,
    BIASED: tl.constexpr,
):
    """``out [batch, rows] = x [batch, columns] @ w^T + bias``.

    A program computes BLOCKS blocks of rows for 8 * TILES rows of x, over the columns of one split. It holds UNITS
    blocks of one chunk at a time, one or two for each warp: neighbouring chunks of every block. A split is ``steps``
    such steps. GROUP_HALVES is the group size over 32, or 0 for one group per row.
    """
    N: tl.constexpr = 8 * TILES
    CHUNKS: tl.constexpr = UNITS // BLOCKS
    # Eight bits do not fit the mantissa of a bfloat16, which has seven: they are multiplied as two nibbles.
    WHOLE: tl.constexpr = BITS < 8 or x.dtype.element_ty == tl.float16
    FIELD: tl.constexpr = 2 if BITS == 2 else (8 if BITS > 4 and WHOLE else 4)
    tile, program, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    x += tile.to(tl.int64) * N * columns
    out += tile.to(tl.int64) * N * rows
    batch -= tile * N

    # The unit of each thread's words, activations and scales. What threads load has two axes, the second of neighbours:
    # of more axes, compilers differ in which one goes to threads.
    w_unit = tl.arange(0, UNITS)
    x_unit = tl.arange(0, TILES * UNITS * 8) // 8 % UNITS
    s_unit = tl.arange(0, UNITS * 32) // 32
    w_block = tl.minimum(program * BLOCKS + w_unit % BLOCKS, blocks - 1)
    s_block = tl.minimum(program * BLOCKS + s_unit % BLOCKS, blocks - 1)
    n = tl.arange(0, TILES * UNITS * 8) // (8 * UNITS) * 8 + tl.arange(0, TILES * UNITS * 8) % 8
    k = tl.arange(0, 32)[None, :]
    within = tl.arange(0, 128)[None, :]
    first = split * steps * CHUNKS
    last = tl.minimum(first + steps * CHUNKS, chunks)
    sums = tl.zeros((UNITS, 64, N), tl.float32)
    for start in range(first, last, CHUNKS):
        # Chunks past the end read the last one again and multiply it by activations of zero.
        w_chunk = tl.minimum(start + w_unit // BLOCKS, last - 1)
        x_chunk = tl.minimum(start + x_unit // BLOCKS, last - 1)
        s_chunk = tl.minimum(start + s_unit // BLOCKS, last - 1)
        offsets = (w_block * chunks + w_chunk)[:, None] * 128 + within
        words = _load_slice(planes, offsets, stride, BITS, RESIDENT, FIELD)
        column = x_chunk[:, None] * 64 + k
        live = ((start + x_unit // BLOCKS < last) & (n < batch))[:, None]
        place = x + (n * columns)[:, None] + column
        if RAGGED:
            x0 = tl.load(place, mask=live & (column < columns), other=0.0)
            x1 = tl.load(place + 32, mask=live & (column + 32 < columns), other=0.0)
        else:
            x0 = tl.load(place, mask=live, other=0.0)
            x1 = tl.load(place + 32, mask=live, other=0.0)
        if GROUP_HALVES == 0:
            sums = _multiply(words, x1, _multiply(words, x0, sums, 0, BITS, FIELD), 1, BITS, FIELD)
        elif GROUP_HALVES % 2 == 0:
            scale = _load_scales(scales, s_block, blocks, s_chunk // (GROUP_HALVES // 2))
            part = _multiply(words, x0, tl.zeros((UNITS, 64, N), tl.float32), 0, BITS, FIELD)
            sums += _apply_scales(_multiply(words, x1, part, 1, BITS, FIELD), scale)
        else:
            scale0 = _load_scales(scales, s_block, blocks, _group(2 * s_chunk, columns, GROUP_HALVES))
            scale1 = _load_scales(scales, s_block, blocks, _group(2 * s_chunk + 1, columns, GROUP_HALVES))
            sums += _apply_scales(_multiply(words, x0, tl.zeros((UNITS, 64, N), tl.float32), 0, BITS, FIELD), scale0)
            sums += _apply_scales(_multiply(words, x1, tl.zeros((UNITS, 64, N), tl.float32), 1, BITS, FIELD), scale1)

    result = _sum_units(sums, BLOCKS)
    if splits > 1:
        SIZE: tl.constexpr = BLOCKS * 64 * N
        GATHER: tl.constexpr = 4096 // SIZE if SIZE < 4096 else 1
        slot = program * tl.num_programs(0) + tile
        lane = tl.arange(0, N)[None, :]
        own = partial + slot * SIZE + lane * (BLOCKS * 64) + tl.arange(0, BLOCKS * 64)[:, None]
        stretch = tl.num_programs(1) * tl.num_programs(0) * SIZE
        tl.store(own + split * stretch, result, mask=lane < batch)
        tl.debug_barrier()
        if tl.atomic_add(arrived + slot, 1) == splits - 1:
            # The last to arrive adds all parts up, in their order, so that the result does not depend on who it is.
            tl.store(arrived + slot, 0)
            result = tl.zeros((BLOCKS * 64, N), tl.float32)
            for start in range(0, splits, GATHER):
                for other in tl.static_range(GATHER):  # several loads on their way at a time
                    present = lane < tl.where(start + other < splits, batch, 0)
                    part = own + (start + other) * stretch
                    result += tl.load(part, mask=present, other=0.0, cache_modifier=".cg")
            _finish(result, scales, bias, out, program, rows, batch, BITS, GROUP_HALVES, BIASED)
    else:
        _finish(result, scales, bias, out, program, rows, batch, BITS, GROUP_HALVES, BIASED)


@triton.jit
def _finish(
    result,
    scales,
    bias,
    out,
    program,
    rows,
    batch,
    BITS: tl.constexpr,
    GROUP_HALVES: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Scale, add the bias and store ``result [rows of the program, n]``."""
    row = program * result.shape[0] + tl.arange(0, result.shape[0])
    n = tl.arange(0, result.shape[1])[None, :]
    live = row < rows
    result *= 1 << (8 - BITS)
    if GROUP_HALVES == 0:
        scale = tl.load(scales + row // 64 * 64 + row % 8 * 8 + row % 64 // 8, mask=live, other=0.0)
        result *= scale.to(tl.float32)[:, None]
    if BIASED:
        result += tl.load(bias + row, mask=live, other=0.0).to(tl.float32)[:, None]
    tl.store(out + n * rows + row[:, None], result.to(out.dtype.element_ty), mask=live[:, None] & (n < batch))


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
    FIELD: tl.constexpr = 2 if BITS == 2 else (4 if BITS <= 4 else 8)
    start = tl.program_id(1) * UNITS
    block = first + tl.program_id(0)
    w_chunk = tl.minimum(start + tl.arange(0, UNITS), chunks - 1)
    s_chunk = tl.minimum(start + tl.arange(0, UNITS * 32) // 32, chunks - 1)
    offsets = (block * chunks + w_chunk)[:, None] * 128 + tl.arange(0, 128)[None, :]
    words = _load_slice(planes, offsets, stride, BITS, RESIDENT, FIELD)
    # As for loads, two axes: 2 * i + h, units and g in one, so that threads store what they hold.
    line = tl.arange(0, UNITS * 64)
    row = line // (UNITS * 8) * 8 + line % 8
    column = (start + line // 8 % UNITS) * 64
    live = (tl.program_id(0) * 64 + row < rows)[:, None]
    out += tl.program_id(0).to(tl.int64) * 64 * columns
    for u in tl.static_range(2):
        group = _group(2 * s_chunk + u, columns, GROUP_HALVES)
        scale = _load_scales(scales, block + s_chunk * 0, blocks, group).to(tl.float32) * (1 << (8 - BITS))
        scale = scale.reshape(UNITS, 8, 4, 4, 2).permute(3, 4, 0, 1, 2).reshape(4, 2, UNITS, 8, 4, 1, 1, 1)
        levels = _half(words, u, FIELD, 1 << (BITS - 1), 1, tl.float16)
        levels = levels.permute(3, 5, 0, 1, 2, 7, 6, 4).to(tl.float32)  # i, h, units, g, t, c, e, b
        weights = (levels * scale).to(out.dtype.element_ty).reshape(UNITS * 64, 32)
        k = column[:, None] + 32 * u + tl.arange(0, 32)[None, :]
        tl.store(out + (row * columns)[:, None] + k, weights, mask=live & (k < columns))
