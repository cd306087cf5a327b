"""GPU code of products with packed weights, in Triton; ``unpack_kernel`` makes numbers of them.

For few rows of x (``fused``), everything a thread needs of the weight it loads itself, 128 bits at a time, into the
registers from which its tensor core multiplies: no shared memory, no barriers, until the parts of a sum meet at the
end. Integers are multiplied by activations and summed in float32, and the group's scale multiplies the sum. So nothing
is rounded but the activations as they came, the float32 sums and the result.

For many rows (``staged``), all warps of a program share what one of them unpacked, through shared memory: scaled, and
rounded to the dtype of x.

Where a kernel may start before the one ahead of it has ended (OVERLAPS), it reads nothing but weights until it may read
all: those were written long before.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from matgptq.gpu.unpack_kernel import INTERPRETED, convert_half, read_step, slice_planes

# The compiler hands neighbours in pairs to the threads of a tensor core, or, up to 3.7, two pairs each where tensors
# are joined. The order of columns is free as long as weights and activations agree: it is the one that moves nothing.
_PAIRS_FIRST = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8))


@triton.jit
def _operand(
    words, U: tl.constexpr, FIELD: tl.constexpr, ZERO: tl.constexpr, FACTOR: tl.constexpr, dtype: tl.constexpr
):
    """``[chunks, 32, 32]`` for the tensor cores, columns in the order c, e, t, b or c, t, e, b."""
    half = convert_half(words, U, FIELD, ZERO, FACTOR, dtype)
    half = half.permute(0, 3, 5, 1, 7, 2, 6, 4) if _PAIRS_FIRST else half.permute(0, 3, 5, 1, 7, 6, 2, 4)
    return half.reshape(half.shape[0], 32, 32)


@triton.jit
def _dot(weights, activations, total):
    if INTERPRETED:
        weights, activations = weights.to(tl.float32), activations.to(tl.float32)
    return tl.dot(weights, activations, total)


@triton.jit
def _multiply(words, activations, total, U: tl.constexpr, BITS: tl.constexpr, FIELD: tl.constexpr):
    """``total [units, 32, n]`` plus the product of 32 columns with ``activations [n / 8 * units * n % 8, 32]``."""
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
def _apply_scales(total, scale):
    """``total [units, 32, n]`` times the scales of its rows, as they were loaded."""
    UNITS: tl.constexpr = total.shape[0]
    TILES: tl.constexpr = total.shape[2] // 8
    rows = scale.to(tl.float32).reshape(UNITS, 8, 4, 2, 2).permute(0, 3, 4, 1, 2)  # units, i, h, g, t
    rows = rows.reshape(UNITS, 2, 2, 8, 1, 4, 1)
    return (total.reshape(UNITS, 2, 2, 8, TILES, 4, 2) * rows).reshape(UNITS, 32, TILES * 8)


@triton.jit
def _load_activations(x, n, x_chunk, columns, live, HALF: tl.constexpr, RAGGED: tl.constexpr):
    """32 columns of each chunk; zeros where there are none."""
    column = x_chunk[:, None] * 128 + 32 * HALF + tl.arange(0, 32)[None, :]
    if RAGGED:
        live = live & (column < columns)
    return tl.load(x + (n * columns)[:, None] + column, mask=live, other=0.0)


@triton.jit
def _sum_units(sums, BLOCKS: tl.constexpr):
    """``[units, 32, n]`` as ``[BLOCKS * 32, n]``, summed over the units of a block in one exchange between warps.

    tl.sum would exchange register by register, with a barrier for each.
    """
    if sums.shape[0] == BLOCKS:
        return sums.reshape(BLOCKS * 32, sums.shape[2])
    else:
        halves = sums.reshape(2, sums.shape[0] // 2, 32, sums.shape[2])
        first, second = tl.split(halves.permute(1, 2, 3, 0))
        return _sum_units(first + second, BLOCKS)


@triton.jit
def _deliver(
    result,
    scales,
    bias,
    out,
    partial,
    arrived,
    rows,
    batch,
    split,
    splits,
    BITS: tl.constexpr,
    GROUP_HALVES: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Add the splits up, if there are several, and store ``result [rows of the program, n]``."""
    tile, program = tl.program_id(0), tl.program_id(1)
    M: tl.constexpr = result.shape[0]
    N: tl.constexpr = result.shape[1]
    PIECE: tl.constexpr = N if N < 16 else 16  # columns added up at a time, so that the parts of all fit in registers
    if splits > 1:
        slot = program * tl.num_programs(0) + tile
        m = tl.arange(0, M)[:, None]
        lane = tl.arange(0, N)[None, :]
        own = partial + slot * (M * N) + m
        stretch = tl.num_programs(1) * tl.num_programs(0) * (M * N)
        tl.store(own + lane * M + split * stretch, result, mask=lane < batch)
        tl.debug_barrier()
        if tl.atomic_add(arrived + slot, 1) == splits - 1:
            # The last to arrive adds all parts up, in their order, so that the result does not depend on who it is.
            tl.store(arrived + slot, 0)
            for first in range(0, N, PIECE):
                piece = first + tl.arange(0, PIECE)[None, :]
                total = tl.zeros((M, PIECE), tl.float32)
                for start in range(0, splits, 8):
                    for other in tl.static_range(8):  # eight loads on their way at a time
                        present = piece < tl.where(start + other < splits, batch, 0)
                        part = own + piece * M + (start + other) * stretch
                        total += tl.load(part, mask=present, other=0.0, cache_modifier=".cg")
                _finish(total, first, scales, bias, out, program, rows, batch, BITS, GROUP_HALVES, BIASED)
    else:
        _finish(result, 0, scales, bias, out, program, rows, batch, BITS, GROUP_HALVES, BIASED)


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
    AHEAD: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """``out [batch, rows] = x [batch, columns] @ w^T + bias``.

    A program computes BLOCKS blocks of rows for 8 * TILES rows of x, over the columns of one split. It holds UNITS
    blocks of one chunk at a time, one or two for each warp: neighbouring chunks of every block. A split is ``steps``
    such steps. GROUP_HALVES is the group size over 32, or 0 for one group per row.
    """
    N: tl.constexpr = 8 * TILES
    CHUNKS: tl.constexpr = UNITS // BLOCKS
    PLANES: tl.constexpr = BITS + 1 if RESIDENT and BITS < 8 else BITS
    # Parts of a chunk with scales of their own.
    PARTS: tl.constexpr = (
        0 if GROUP_HALVES == 0 else (1 if GROUP_HALVES % 4 == 0 else (2 if GROUP_HALVES % 2 == 0 else 4))
    )
    PIECES: tl.constexpr = 1 if PARTS == 0 else PARTS
    # Eight bits do not fit the mantissa of a bfloat16, which has seven: they are multiplied as two nibbles.
    WHOLE: tl.constexpr = BITS < 8 or x.dtype.element_ty == tl.float16
    FIELD: tl.constexpr = 2 if BITS == 2 else (8 if BITS > 4 and WHOLE else 4)
    tile, program, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    x += tile.to(tl.int64) * N * columns
    out += tile.to(tl.int64) * N * rows
    batch -= tile * N

    # The unit of each thread's activations. What threads load has two axes, the second of neighbours: of more axes,
    # compilers differ in which one goes to threads.
    x_unit = tl.arange(0, N * UNITS) // 8 % UNITS
    n = tl.arange(0, N * UNITS) // (8 * UNITS) * 8 + tl.arange(0, N * UNITS) % 8
    first = split * steps * CHUNKS
    last = tl.minimum(first + steps * CHUNKS, chunks)
    sums = tl.zeros((UNITS, 32, N), tl.float32)
    if AHEAD:
        read = read_step(
            *(planes, scales, program, first, last, blocks, chunks, stride, columns),
            *(UNITS, BLOCKS, PLANES, PARTS, GROUP_HALVES, AHEAD),
        )
    if OVERLAPS:  # what comes before may still run until here; it does not write weights
        gdc_launch_dependents()
        gdc_wait()
    for start in range(first, last, CHUNKS):
        # Activations of chunks past the end are zeros.
        x_chunk = tl.minimum(start + x_unit // BLOCKS, last - 1)
        x_live = ((start + x_unit // BLOCKS < last) & (n < batch))[:, None]
        halves = ()
        if TILES < 4:  # the registers hold the activations of a whole step, so they may be on their way early
            for half in tl.static_range(4):
                halves = halves + (_load_activations(x, n, x_chunk, columns, x_live, half, RAGGED),)
        if AHEAD:
            taken = read
            read = read_step(
                *(planes, scales, program, start + CHUNKS, last, blocks, chunks, stride, columns),
                *(UNITS, BLOCKS, PLANES, PARTS, GROUP_HALVES, AHEAD),
            )
        else:
            taken = read_step(
                *(planes, scales, program, start, last, blocks, chunks, stride, columns),
                *(UNITS, BLOCKS, PLANES, PARTS, GROUP_HALVES, AHEAD),
            )
        sides = slice_planes(taken, BITS, RESIDENT, FIELD)
        for piece in tl.static_range(PIECES):
            part = sums if PARTS == 0 else tl.zeros((UNITS, 32, N), tl.float32)
            for half in tl.static_range(piece * 4 // PIECES, (piece + 1) * 4 // PIECES):
                if TILES < 4:
                    activations = halves[half]
                else:
                    activations = _load_activations(x, n, x_chunk, columns, x_live, half, RAGGED)
                part = _multiply(sides[half // 2], activations, part, half % 2, BITS, FIELD)
            sums = part if PARTS == 0 else sums + _apply_scales(part, taken[PLANES + piece])

    result = _sum_units(sums, BLOCKS)
    _deliver(result, scales, bias, out, partial, arrived, rows, batch, split, splits, BITS, GROUP_HALVES, BIASED)


@triton.jit
def _finish(
    result,
    first,
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
    """Scale, add the bias and store ``result [rows of the program, n]``, rows of x from ``first`` on."""
    row = program * result.shape[0] + tl.arange(0, result.shape[0])
    n = first + tl.arange(0, result.shape[1])[None, :]
    live = row < rows
    result *= 1 << (8 - BITS)
    if GROUP_HALVES == 0:
        scale = tl.load(scales + row // 32 * 32 + row % 8 * 4 + row % 32 // 8, mask=live, other=0.0)
        result *= scale.to(tl.float32)[:, None]
    if BIASED:
        result += tl.load(bias + row, mask=live, other=0.0).to(tl.float32)[:, None]
    tl.store(out + n * rows + row[:, None], result.to(out.dtype.element_ty), mask=live[:, None] & (n < batch))


@triton.jit(do_not_specialize=["batch", "blocks", "chunks", "steps", "splits"])
def staged(
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
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    RAGGED: tl.constexpr,
    BIASED: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """``out [batch, rows] = x [batch, columns] @ w^T + bias``, for many rows of x.

    Weights are unpacked once, scaled and rounded to the dtype of x, as the reference's are, and multiplied from shared
    memory, where all warps find them. A program computes BLOCKS blocks of rows for 8 * TILES rows of x.
    """
    N: tl.constexpr = 8 * TILES
    M: tl.constexpr = 32 * BLOCKS
    FIELD: tl.constexpr = 2 if BITS == 2 else (4 if BITS <= 4 else 8)
    PLANES: tl.constexpr = BITS + 1 if RESIDENT and BITS < 8 else BITS
    PARTS: tl.constexpr = (
        0 if GROUP_HALVES == 0 else (1 if GROUP_HALVES % 4 == 0 else (2 if GROUP_HALVES % 2 == 0 else 4))
    )
    dtype: tl.constexpr = x.dtype.element_ty
    tile, program, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    x += tile.to(tl.int64) * N * columns
    out += tile.to(tl.int64) * N * rows
    batch -= tile * N
    n = tl.arange(0, N)[:, None]
    k = tl.arange(0, 128)[None, :]
    first = split * steps
    last = tl.minimum(first + steps, chunks)
    sums = tl.zeros((M, N), tl.float32)
    if AHEAD:
        read = read_step(
            *(planes, scales, program, first, last, blocks, chunks, stride, columns),
            *(BLOCKS, BLOCKS, PLANES, PARTS, GROUP_HALVES, AHEAD),
        )
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    for chunk in range(first, last):
        column = chunk * 128 + k
        live = n < batch
        if RAGGED:
            live = live & (column < columns)
        activations = tl.load(x + n * columns + column, mask=live, other=0.0)
        if AHEAD:
            taken = read
            read = read_step(
                *(planes, scales, program, chunk + 1, last, blocks, chunks, stride, columns),
                *(BLOCKS, BLOCKS, PLANES, PARTS, GROUP_HALVES, AHEAD),
            )
        else:
            taken = read_step(
                *(planes, scales, program, chunk, last, blocks, chunks, stride, columns),
                *(BLOCKS, BLOCKS, PLANES, PARTS, GROUP_HALVES, AHEAD),
            )
        sides = slice_planes(taken, BITS, RESIDENT, FIELD)
        quarters = ()
        for half in tl.static_range(4):
            weights = convert_half(sides[half // 2], half % 2, FIELD, 1 << (BITS - 1), 1, tl.float16)
            if PARTS > 0:
                weights = _scaled(weights, taken[PLANES + half * PARTS // 4], 1 << (8 - BITS), dtype)
            weights = weights.to(dtype).permute(0, 3, 5, 1, 2, 7, 6, 4)  # units, i, h, g, t, c, e, b
            quarters = quarters + (weights.reshape(M, 32),)
        both = tl.join(tl.join(quarters[0], quarters[1]), tl.join(quarters[2], quarters[3]))  # k, u, s
        sums = _dot(both.permute(0, 3, 2, 1).reshape(M, 128), activations.trans(1, 0), sums)
    if PARTS > 0:
        sums *= 1.0 / (1 << (8 - BITS))  # _finish multiplies by it; both are exact
    _deliver(sums, scales, bias, out, partial, arrived, rows, batch, split, splits, BITS, GROUP_HALVES, BIASED)


@triton.jit
def _scaled(levels, scale, FACTOR: tl.constexpr, dtype: tl.constexpr):
    """Levels ``[units, g, t, i, b, h, e, c]`` times FACTOR and the scales of their rows, rounded once."""
    scale = (scale.to(tl.float32) * FACTOR).reshape(levels.shape[0], 8, 4, 2, 2)
    scale = scale.reshape(levels.shape[0], 8, 4, 2, 1, 2, 1, 1)
    if dtype == tl.float16:
        return levels * scale.to(tl.float16)
    else:
        return (levels.to(tl.float32) * scale).to(dtype)
