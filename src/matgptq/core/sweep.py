"""The column loop: round one input column after the other and pass what is left on to the columns not yet visited.

Both halves of the solver are this loop. In GPTQ's compensation (arXiv 2210.17323) column j moves the *targets* of the
later columns by ``-(x_j - w_j) U_jk / U_jj``; in coordinate descent a change of column j moves the *minimisers* of
the later columns by ``-(w_j' - w_j) H_jk / H_kk``. Rows never meet, so they may be cut into pieces at will.

Three engines give the same codes but for ties: PyTorch operations on whole columns, which run anywhere; the native
library, which keeps a few rows in cache and is used for tensors on the CPU when it is there; and a Triton kernel, which
keeps them in registers and is used on a GPU. ``MATGPTQ_SOLVER=torch``, ``=native`` or ``=triton`` forces one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matgptq import native
from matgptq.core.solver_engine import engine
from matgptq.rounding import cell_table, round_nested, round_shared, shared_table
from matgptq.slicing import PARENT_BITS, slice_codes

# Columns whose mutual updates are made one by one; the columns behind them get one matrix product per stretch.
_STRETCH = 32


@dataclass(frozen=True)
class SweepGrid:
    """What the rounding of a sweep needs to know about the grid; G groups, C copies of the weight.

    Attributes:
        scales: float32 ``[G, C, rows]``, one scale per group, copy and row.
        group_of: ``[in]`` group of each column, in processing order.
        target_bits: widths R, ascending.
        bit_weights: lambda, one for each width.

    There is one copy per width, or a single one that all widths share (the published method, which passes on the
    plain mean of their residuals).
    """

    scales: Tensor
    group_of: list[int]
    target_bits: tuple[int, ...]
    bit_weights: tuple[float, ...]

    @property
    def copies(self) -> int:
        """C."""
        return int(self.scales.shape[1])


def compensation_coupling(upper: Tensor) -> Tensor:
    """``U_jk / U_jj``: by how much of column j's residual each column k behind it is moved in ``compensate``.

    Args:
        upper: ``[in, in]``, upper factor U of the inverse Hessian in processing order.
    """
    return upper / upper.diagonal().unsqueeze(-1)


def descent_coupling(hessian: Tensor) -> Tensor:
    """``H_jk / H_kk``: by how much of a change of column j the minimiser of each column k moves in ``descend``.

    Args:
        hessian: ``[in, in]`` in processing order, positive diagonal.
    """
    return hessian / hessian.diagonal()


def compensate(weight: Tensor, coupling: Tensor, grid: SweepGrid, moved: Tensor | None = None) -> Tensor:
    """GPTQ's loop with one compensated copy of the weight per entry of the grid.

    Args:
        weight: float32 ``[in, rows]``, transposed, columns of the layer in processing order.
        coupling: float32 ``[in, in]``, ``compensation_coupling`` in the same order.
        grid: scales and widths.
        moved: float32 ``[in, C * rows]``, what is added to the copies from the start; may be overwritten.

    Returns:
        uint8 codes ``[in, rows]``.
    """
    chosen = engine(weight)
    if chosen == "native":
        base = weight.T.expand(grid.copies, -1, -1)
        trail = None if moved is None else moved.view(len(weight), grid.copies, -1).permute(1, 2, 0)
        return _sweep_natively(base, trail, coupling, grid, compensating=True)
    columns, rows = weight.shape
    if moved is None:
        moved = weight.new_zeros(columns, grid.copies * rows)
    if chosen == "triton":
        return _sweep_on_gpu(weight, moved, coupling, grid, compensating=True)
    rounder = _Rounder(grid)
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    residuals = torch.empty(_STRETCH, grid.copies * rows, device=weight.device)
    for first in range(0, columns, _STRETCH):
        last = min(first + _STRETCH, columns)
        for j in range(first, last):
            target = moved[j].view(grid.copies, rows) + weight[j]
            codes[j], rounded = rounder.round(target, j)
            residual = target.sub_(rounded).view(-1)
            residuals[j - first] = residual
            moved[j + 1 : last].addr_(coupling[j, j + 1 : last], residual, alpha=-1)
        moved[last:].addmm_(coupling[first:last, last:].T, residuals[: last - first], alpha=-1)
    return codes


def descend(current: Tensor, steps: Tensor, coupling: Tensor, grid: SweepGrid) -> Tensor:
    """One pass of exact coordinate descent on ``sum_r lambda_r (w - w_r) H (w - w_r)^T``.

    Args:
        current: float32 ``[in, C * rows]``, the weights ``w_r`` that the present codes stand for, processing order.
        steps: float32 ``[in, C * rows]``, how far each is from its minimiser while the others stay what they are:
            ``((w - w_r) H)^T`` over the diagonal of H; may be overwritten.
        coupling: float32 ``[in, in]``, ``descent_coupling`` in the same order.
        grid: scales and widths.

    Returns:
        uint8 codes ``[in, rows]``; with the exact Hessian the objective never grows.
    """
    columns, copies, rows = len(current), grid.copies, grid.scales.shape[2]
    chosen = engine(current)
    if chosen == "native":
        base, trail = (t.view(columns, copies, rows).permute(1, 2, 0) for t in (current, steps))
        return _sweep_natively(base, trail, coupling, grid, compensating=False)
    if chosen == "triton":
        return _sweep_on_gpu(current, steps, coupling, grid, compensating=False)
    rounder = _Rounder(grid)
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=current.device)
    changes = torch.empty(_STRETCH, copies * rows, device=current.device)
    for first in range(0, columns, _STRETCH):
        last = min(first + _STRETCH, columns)
        for j in range(first, last):
            target = torch.add(current[j], steps[j]).view(copies, rows)
            codes[j], rounded = rounder.round(target, j)
            change = rounded.view(-1) - current[j]
            changes[j - first] = change
            steps[j + 1 : last].addr_(coupling[j, j + 1 : last], change, alpha=-1)
        steps[last:].addmm_(coupling[first:last, last:].T, changes[: last - first], alpha=-1)
    return codes


def code_levels(codes: Tensor, table: Tensor) -> Tensor:
    """Centred levels of uint8 codes at every width of ``table`` (``[R, 256]``): float32 ``[R, *codes.shape]``."""
    return table.index_select(1, codes.reshape(-1).to(torch.int64)).view(len(table), *codes.shape)


class _Rounder:
    """Best codes of one column after the other, with PyTorch operations."""

    def __init__(self, grid: SweepGrid) -> None:
        self._scales, self._group_of = grid.scales, grid.group_of
        device = grid.scales.device
        self._shared = shared_table(grid.target_bits, grid.bit_weights, device) if grid.copies == 1 else None
        if self._shared is None:
            self._cells = cell_table(grid.target_bits, device)
            lambdas = torch.tensor(grid.bit_weights, device=device).view(-1, 1)
            # lambda_r s_r^2 up to a common factor: the objective is in units of the weight, positions are in steps.
            self._weights = lambdas * (grid.scales / grid.scales[:, -1:]).square()

    def round(self, target: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """uint8 codes ``[rows]`` for the targets ``[C, rows]``, and what to subtract for them ``[C, rows]``."""
        group = self._group_of[column]
        scales = self._scales[group]
        position = target / scales
        if self._shared is not None:
            codes, levels = round_shared(position[0], self._shared)
            return codes, levels * scales
        chosen = round_nested(position, self._weights[group], self._cells)
        return chosen.to(torch.uint8), self._cells.levels.index_select(1, chosen).mul_(scales)


def _sweep_on_gpu(base: Tensor, trail: Tensor, coupling: Tensor, grid: SweepGrid, *, compensating: bool) -> Tensor:
    from matgptq.gpu import sweep as gpu_sweep

    widths = grid.target_bits
    if grid.copies > 1:
        cell_table(widths)  # refuses what the kernel does not know, a set of widths without the parent
    return gpu_sweep.sweep(
        base,
        trail,
        coupling,
        grid.scales,
        torch.tensor(grid.group_of, dtype=torch.int32, device=base.device),
        widths,
        grid.bit_weights,
        shared_table(widths, grid.bit_weights, base.device) if grid.copies == 1 else None,
        compensating=compensating,
    )


def _sweep_natively(
    base: Tensor, trail: Tensor | None, coupling: Tensor, grid: SweepGrid, *, compensating: bool
) -> Tensor:
    """Both loops in the native library; ``base`` and ``trail`` are ``[C, rows, in]``."""
    shared = grid.copies == 1 and len(grid.target_bits) > 1
    codes = native.sweep(
        base.contiguous(),
        coupling.contiguous(),
        grid.scales.permute(1, 2, 0).expand(len(grid.target_bits), -1, -1).contiguous(),
        torch.tensor(grid.group_of, dtype=torch.int32),
        grid.target_bits,
        grid.bit_weights,
        mode=("mean" if shared else "residual") if compensating else "change",
        trail=None if trail is None else trail.contiguous(),
    )
    top = grid.target_bits[-1]
    if top < PARENT_BITS:
        # The library takes the lowest code of a level; the one that every larger width reads alike is u * 2^(8-r).
        codes = slice_codes(codes, top) << (PARENT_BITS - top)
    return codes.T
