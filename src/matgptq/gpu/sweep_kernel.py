"""GPU code of the solver's column loop, in Triton: a stretch of columns for some rows, one row per thread.

What ``sweep`` says of the loop holds here. A thread keeps the changes of its row in the stretch so far in registers, so
that a column needs no other thread; columns behind the stretch get all of it at once, in a matrix product.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def _cells(widths):
    """The stretches of parent codes that all widths but the last, 8, read alike: (first, last, *levels), centred."""
    cells = []
    for code in range(256):
        levels = []
        for bits in widths[:-1]:
            sliced = min((code + (1 << (7 - bits))) >> (8 - bits), (1 << bits) - 1)
            levels.append(float((sliced << (8 - bits)) - 128))
        first = cells.pop()[0] if cells and list(cells[-1][2:]) == levels else float(code - 128)
        cells.append((first, float(code - 128), *levels))
    return tuple(cells)


@triton.jit
def sweep_stretch(
    base,
    trail,
    coupling,
    scales,
    group_of,
    breakpoints,
    shared_codes,
    shared_levels,
    codes,
    changes,
    first,
    count,
    columns,
    rows,
    WIDTHS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    COPIES: tl.constexpr,
    COMPENSATES: tl.constexpr,
    STRETCH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Codes of columns ``first .. first + count - 1``, count <= STRETCH, and what they leave to the columns behind.

    base: ``[columns, rows]`` if COMPENSATES, else ``[columns, copies, rows]``; trail: ``[columns, copies, rows]``.
    coupling: ``[columns, columns]``, row k what column k takes from each column before it. scales: ``[groups, copies,
    rows]``. The table of breakpoints (255, filled up with infinity), codes and levels (256) is for a single copy.
    Written: codes ``[columns, rows]``; changes ``[STRETCH, copies, rows]``, subtracted from later columns.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    place = tl.arange(0, STRETCH)
    past = ()
    for _ in tl.static_range(COPIES):
        past = past + (tl.zeros((STRETCH, ROWS), tl.float32),)
    for k in range(count):
        column = (first + k).to(tl.int64)
        pull = tl.load(coupling + column * columns + first + place, mask=place < k, other=0.0)[:, None]
        group = tl.load(group_of + column).to(tl.int64)
        values = ()
        targets = ()
        steps = ()
        for c in tl.static_range(COPIES):
            value = tl.load(base + (column if COMPENSATES else column * COPIES + c) * rows + row, mask=live, other=0.0)
            moved = tl.load(trail + (column * COPIES + c) * rows + row, mask=live, other=0.0)
            moved -= tl.sum(past[c] * pull, 0)
            values = values + (value,)
            targets = targets + (value + moved,)
            steps = steps + (tl.load(scales + (group * COPIES + c) * rows + row, mask=live, other=1.0),)

        if COPIES == 1:
            position = targets[0] / steps[0]
            segment = tl.zeros((ROWS,), tl.int32)
            for log in tl.static_range(8):
                passed = tl.load(breakpoints + segment + ((128 >> log) - 1)) < position
                segment += tl.where(passed, 128 >> log, 0)
            code = tl.load(shared_codes + segment).to(tl.int32)
            levels = (tl.load(shared_levels + segment),)
        else:
            CELLS: tl.constexpr = _cells(WIDTHS)
            LAST: tl.constexpr = COPIES - 1
            own = targets[LAST] / steps[LAST]
            nearest = tl.floor(own + 0.5)
            positions = ()
            factors = ()
            for c in tl.static_range(LAST):
                ratio = steps[c] / steps[LAST]
                positions = positions + (targets[c] / steps[c],)
                factors = factors + (WEIGHTS[c] * (ratio * ratio),)
            least = tl.full((ROWS,), float("inf"), tl.float32)
            best = tl.zeros((ROWS,), tl.float32)
            for cell in tl.static_range(len(CELLS)):
                # Sums over the same first widths are the same for many cells; the compiler keeps them.
                cost = tl.zeros((ROWS,), tl.float32)
                for c in tl.static_range(LAST):
                    off = positions[c] - CELLS[cell][2 + c]
                    cost += factors[c] * (off * off)
                candidate = tl.minimum(tl.maximum(nearest, CELLS[cell][0]), CELLS[cell][1])
                off = own - candidate
                cost += WEIGHTS[LAST] * (off * off)
                best = tl.where(cost < least, candidate, best)
                least = tl.minimum(cost, least)
            code = best.to(tl.int32) + 128
            levels = ()
            for c in tl.static_range(LAST):
                sliced = tl.minimum((code + (1 << (7 - WIDTHS[c]))) >> (8 - WIDTHS[c]), (1 << WIDTHS[c]) - 1)
                levels = levels + (((sliced << (8 - WIDTHS[c])) - 128).to(tl.float32),)
            levels = levels + (best,)

        tl.store(codes + column * rows + row, code.to(tl.uint8), mask=live)
        kept = ()
        for c in tl.static_range(COPIES):
            rounded = levels[c] * steps[c]
            change = targets[c] - rounded if COMPENSATES else rounded - values[c]
            tl.store(changes + (k * COPIES + c) * rows + row, change, mask=live)
            kept = kept + (tl.where((place == k)[:, None], change[None, :], past[c]),)
        past = kept
