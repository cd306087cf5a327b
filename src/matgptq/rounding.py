"""Joint rounding: the parent code that serves all target widths best, without trying all 256.

Positions are weights in units of the parent's grid, ``p = w / s``, so that code q at width r stands for the centred
level ``L_r(q) = v_r(q) - 128``. Two cases:

*Shared*: all widths round the same number p (one copy of the weight). ``sum_r lambda_r (p - L_r(q))^2`` is, up to a
term that does not depend on q, a line in p for each q, so the best q is a lower envelope of 256 lines: a sorted table
of breakpoints, computed once for (R, lambda), and a binary search per weight.

*Nested*: every width has its own p_r. The slices below the parent are constant on cells between their rounding
boundaries (25 boundaries for R = 2,3,4,8), and inside a cell the best parent code is ``p_8`` rounded and clamped to
the cell. Only one candidate per cell is left, and no approximation is made.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from matgptq.slicing import NUM_CODES, PARENT_BITS, ZERO_POINT, level_table


@dataclass(frozen=True)
class SharedTable:
    """Lower envelope of the joint rounding objective; all tensors float32 on one device, K segments.

    Attributes:
        breakpoints: ``[K - 1]`` ascending positions between segments.
        codes: uint8 ``[K]``, the best code on each segment.
        mean_level: ``[K]``, ``sum_r lambda_r L_r / sum_r lambda_r`` of that code.
        spread: ``[K]``, the lambda-weighted variance of its levels.
        plain_mean_level: ``[K]``, the unweighted mean of its levels (what the published method subtracts).
        total_weight: ``sum_r lambda_r``.
    """

    breakpoints: Tensor
    codes: Tensor
    mean_level: Tensor
    spread: Tensor
    plain_mean_level: Tensor
    total_weight: float

    def error(self, position: Tensor) -> Tensor:
        """``min_q sum_r lambda_r (p - L_r(q))^2``, same shape as ``position``."""
        segment = torch.bucketize(position, self.breakpoints)
        distance = position - self.mean_level[segment]
        return distance.square_().add_(self.spread[segment]).mul_(self.total_weight)


@functools.cache
def shared_table(
    target_bits: tuple[int, ...], bit_weights: tuple[float, ...], device: torch.device | str = "cpu"
) -> SharedTable:
    """The envelope for widths R and weights lambda (cached; both tuples have one entry per width)."""
    levels = torch.stack([level_table(bits) for bits in target_bits]).double()  # [R, 256]
    weights = torch.tensor(bit_weights, dtype=torch.float64).unsqueeze(-1)
    slope = (weights * levels).sum(0)
    offset = (weights * levels.square()).sum(0)
    total = float(weights.sum())
    mean = slope / total
    parent = level_table(PARENT_BITS)
    hull: list[int] = []

    def crossing(a: int, b: int) -> float:
        return float((offset[b] - offset[a]) / (2 * (slope[b] - slope[a])))

    for code in range(NUM_CODES):  # slopes never decrease with the code
        if hull and slope[code] == slope[hull[-1]]:
            # Same levels at every target width. Keep the code whose own level is nearest to them, so that a parent
            # made for one width r holds u * 2^(8-r) and reads the same at every larger width.
            if abs(parent[code] - mean[code]) >= abs(parent[hull[-1]] - mean[code]):
                continue
            hull.pop()
        while len(hull) > 1 and crossing(hull[-2], hull[-1]) >= crossing(hull[-1], code):
            hull.pop()
        hull.append(code)
    codes = torch.tensor(hull)
    breakpoints = torch.tensor([crossing(a, b) for a, b in itertools.pairwise(hull)], dtype=torch.float64)
    return SharedTable(
        breakpoints=breakpoints.float().to(device),
        codes=codes.to(torch.uint8).to(device),
        mean_level=mean[codes].float().to(device),
        spread=(offset / total - mean.square())[codes].clamp_min(0).float().to(device),
        plain_mean_level=levels.mean(0)[codes].float().to(device),
        total_weight=total,
    )


def round_shared(position: Tensor, table: SharedTable) -> tuple[Tensor, Tensor]:
    """Best codes when all widths round the same number.

    Args:
        position: float32, any shape: ``w / s``.
        table: of ``shared_table``.

    Returns:
        codes (uint8) and the unweighted mean of their levels (float32), both of the shape of ``position``.
    """
    segment = torch.bucketize(position, table.breakpoints)
    return table.codes[segment], table.plain_mean_level[segment]


@dataclass(frozen=True)
class CellTable:
    """The cells on which all target slices below the parent are constant; C cells, R widths.

    Attributes:
        low, high: float32 ``[C, 1]``, the first and last centred parent level of each cell.
        features: float32 ``[C, 2 (R - 1)]``: squares of the levels, then the levels, of the widths below the parent.
        levels: float32 ``[R, 256]``, centred level of every code at every target width.
    """

    low: Tensor
    high: Tensor
    features: Tensor
    levels: Tensor


@functools.cache
def cell_table(target_bits: tuple[int, ...], device: torch.device | str = "cpu") -> CellTable:
    """The cells of widths ``target_bits``, ascending and ending with the parent's 8 (cached)."""
    if target_bits[-1] != PARENT_BITS or len(target_bits) < 2:
        raise ValueError(f"nested rounding needs the parent and at least one width below it, not {target_bits}")
    levels = torch.stack([level_table(bits) for bits in target_bits])
    lower = levels[:-1]
    first = torch.ones(NUM_CODES, dtype=torch.bool)
    first[1:] = (lower[:, 1:] != lower[:, :-1]).any(0)
    starts = torch.nonzero(first).flatten()
    ends = torch.cat([starts[1:], torch.tensor([NUM_CODES])]) - 1
    cells = lower[:, starts].T  # [C, R - 1]
    tensors = (
        (starts - ZERO_POINT).float().unsqueeze(-1),
        (ends - ZERO_POINT).float().unsqueeze(-1),
        torch.cat([cells.square(), cells], dim=1).contiguous(),
        levels,
    )
    return CellTable(*(tensor.to(device) for tensor in tensors))


def round_nested(position: Tensor, weights: Tensor, table: CellTable) -> Tensor:
    """Best codes when every width rounds a number of its own: ``argmin_q sum_r a_r (p_r - L_r(q))^2``.

    Args:
        position: float32 ``[R, rows]``, ``p_r = x_r / s_r`` in the order of the table's widths (parent last).
        weights: float32 ``[R, rows]`` (or ``[R, 1]``), ``a_r = lambda_r s_r^2``, any common factor per row.
        table: of ``cell_table``.

    Returns:
        codes, int64 ``[rows]``.
    """
    weighted = weights * position
    coefficients = torch.cat([weights[:-1].expand_as(position[:-1]), weighted[:-1] * -2])  # [2 (R - 1), rows]
    nearest = position[-1].round()
    candidates = nearest.clamp(table.low, table.high)  # [C, rows]
    cost = (candidates - position[-1]).square_().mul_(weights[-1]).addmm_(table.features, coefficients)
    best = cost.min(0, keepdim=True).indices  # several times faster than argmin along the first dimension
    return candidates.gather(0, best).squeeze(0).to(torch.int64).add_(ZERO_POINT)
