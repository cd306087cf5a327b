"""The column loop: round one input column after the other and pass what is left on to the columns not yet visited.

Both halves of the solver are this loop. In GPTQ's compensation (arXiv 2210.17323) column j moves the *targets* of the
later columns by ``-(x_j - w_j) U_jk / U_jj``; in coordinate descent a change of column j moves the *minimisers* of
the later columns by ``-(w_j' - w_j) H_jk / H_kk``. Rows never meet, so they may be cut into pieces at will.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matgptq.rounding import CellTable, SharedTable, round_nested, round_shared

# Columns whose mutual updates are made one by one; the columns behind them get one matrix product per stretch.
_STRETCH = 32


@dataclass(frozen=True)
class SweepGrid:
    """What the rounding of a sweep needs to know about the grid; G groups, C copies of the weight.

    Attributes:
        scales: float32 ``[G, C, rows]``, one scale per group, copy and row.
        weights: float32 ``[G, C, rows]``, ``lambda_r s_r^2`` up to a common factor per row and group; read by nested
            rounding only.
        group_of: ``[in]`` group of each column, in processing order.
        table: ``CellTable`` for one copy per width, ``SharedTable`` for one copy that serves all widths.
    """

    scales: Tensor
    weights: Tensor
    group_of: list[int]
    table: CellTable | SharedTable


def _round(target: Tensor, group: int, grid: SweepGrid) -> tuple[Tensor, Tensor]:
    """Codes (uint8 ``[rows]``) for targets ``[C, rows]`` of one column, and their weights ``[C, rows]``."""
    scales = grid.scales[group]
    position = target / scales
    if isinstance(grid.table, SharedTable):
        codes, levels = round_shared(position[0], grid.table)
        return codes, levels * scales
    chosen = round_nested(position, grid.weights[group], grid.table)
    return chosen.to(torch.uint8), grid.table.levels.index_select(1, chosen).mul_(scales)


def compensate(weight: Tensor, upper: Tensor, grid: SweepGrid) -> Tensor:
    """GPTQ's loop with one compensated copy of the weight per entry of the grid.

    Args:
        weight: float32 ``[in, rows]``, transposed, columns of the layer in processing order.
        upper: float32 ``[in, in]``, upper factor U of the inverse Hessian in the same order.
        grid: scales and tables.

    Returns:
        uint8 codes ``[in, rows]``.
    """
    coupling = upper / upper.diagonal().unsqueeze(-1)
    columns, rows = weight.shape
    copies = grid.scales.shape[1]
    moved = torch.zeros(columns, copies * rows, device=weight.device)  # what compensation added to the targets
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    residuals = torch.empty(_STRETCH, copies * rows, device=weight.device)
    for first in range(0, columns, _STRETCH):
        last = min(first + _STRETCH, columns)
        for j in range(first, last):
            target = moved[j].view(copies, rows) + weight[j]
            codes[j], rounded = _round(target, grid.group_of[j], grid)
            residual = target.sub_(rounded).view(-1)
            residuals[j - first] = residual
            moved[j + 1 : last].addr_(coupling[j, j + 1 : last], residual, alpha=-1)
        moved[last:].addmm_(coupling[first:last, last:].T, residuals[: last - first], alpha=-1)
    return codes


def descend(current: Tensor, gradient: Tensor, hessian: Tensor, grid: SweepGrid) -> Tensor:
    """One pass of exact coordinate descent on ``sum_r lambda_r (w - w_r) H (w - w_r)^T``.

    Args:
        current: float32 ``[in, C * rows]``, the weights ``w_r`` that the present codes stand for, processing order.
        gradient: float32 ``[in, C * rows]``, ``((w - w_r) H)^T`` for them; overwritten.
        hessian: float32 ``[in, in]`` in the same order, positive diagonal.
        grid: scales and tables.

    Returns:
        uint8 codes ``[in, rows]``; with the exact Hessian the objective never grows.
    """
    diagonal = hessian.diagonal()
    columns, copies, rows = len(current), grid.scales.shape[1], grid.scales.shape[2]
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=current.device)
    changes = torch.empty(_STRETCH, copies * rows, device=current.device)
    for first in range(0, columns, _STRETCH):
        last = min(first + _STRETCH, columns)
        for j in range(first, last):
            target = torch.add(current[j], gradient[j] / diagonal[j]).view(copies, rows)
            codes[j], rounded = _round(target, grid.group_of[j], grid)
            change = rounded.view(-1) - current[j]
            changes[j - first] = change
            gradient[j + 1 : last].addr_(hessian[j, j + 1 : last], change, alpha=-1)
        gradient[last:].addmm_(hessian[first:last, last:].T, changes[: last - first], alpha=-1)
    return codes


def code_levels(codes: Tensor, table: Tensor) -> Tensor:
    """Centred levels of uint8 codes at every width of ``table`` (``[R, 256]``): float32 ``[R, *codes.shape]``."""
    return table.index_select(1, codes.reshape(-1).to(torch.int64)).view(len(table), *codes.shape)
