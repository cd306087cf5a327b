"""The solver's column loop on a GPU: how ``sweep_kernel`` is called.

Importing this module imports Triton; ``sweep`` does so for tensors on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from matgptq.gpu.sweep_kernel import sweep_stretch
from matgptq.rounding import SharedTable

_ROWS = 32  # of a program: one warp, one row per thread
# Columns of a launch; a thread keeps as many numbers per copy in registers.
_STRETCH = 32
_STRETCH_MANY_COPIES = 16


def sweep(
    base: Tensor,
    trail: Tensor,
    coupling: Tensor,
    scales: Tensor,
    group_of: Tensor,
    widths: tuple[int, ...],
    weights: tuple[float, ...],
    table: SharedTable | None,
    *,
    compensating: bool,
) -> Tensor:
    """Both halves of the solver, as ``sweep.compensate`` and ``sweep.descend`` define them.

    Args:
        base: float32 ``[in, rows]`` (compensating) or ``[in, C * rows]``.
        trail: float32 ``[in, C * rows]``; may be overwritten.
        coupling: float32 ``[in, in]``: what column j passes on to column k stands in row j.
        scales: float32 ``[groups, C, rows]``.
        group_of: int32 ``[in]``.
        widths: R ascending widths; the last is 8 unless there is one copy.
        weights: lambda of each width.
        table: of ``rounding.shared_table``, if there is one copy.

    Returns:
        uint8 codes ``[in, rows]``.
    """
    columns = len(base)
    _, copies, rows = scales.shape
    stretch = _STRETCH if copies <= 4 else _STRETCH_MANY_COPIES
    pulled = coupling.T.contiguous()
    breakpoints = base.new_full((255,), torch.inf)
    codes_of, levels_of = breakpoints.new_zeros(256, dtype=torch.uint8), base.new_zeros(256)
    if table is not None:
        breakpoints[: len(table.breakpoints)] = table.breakpoints
        codes_of[: len(table.codes)] = table.codes
        levels_of[: len(table.codes)] = table.plain_mean_level
    codes = base.new_empty((columns, rows), dtype=torch.uint8)
    changes = base.new_empty((stretch, copies * rows))
    base, trail, scales = base.contiguous(), trail.contiguous(), scales.contiguous()
    for first in range(0, columns, stretch):
        last = min(first + stretch, columns)
        sweep_stretch[(-(-rows // _ROWS),)](
            base,
            trail,
            pulled,
            scales,
            group_of,
            breakpoints,
            codes_of,
            levels_of,
            codes,
            changes,
            first,
            last - first,
            columns,
            rows,
            WIDTHS=widths,
            WEIGHTS=weights,
            COPIES=copies,
            COMPENSATES=compensating,
            STRETCH=stretch,
            ROWS=_ROWS,
            num_warps=1,
            enable_fp_fusion=True,
        )
        trail[last:].addmm_(pulled[last:, first:last], changes[: last - first], alpha=-1)
    return codes
