"""Group scales: their storage precision, the starting grid, the scale search and the refit per width."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from matgptq import native
from matgptq.core.solver_engine import engine
from matgptq.errors import UnsupportedModelError
from matgptq.recipe import GROUP_SIZE_FALLBACKS, PER_CHANNEL, Recipe
from matgptq.rounding import SharedTable, shared_table
from matgptq.slicing import PARENT_BITS, ZERO_POINT

# An export stores s * 2^(8-r) in float16, which ends at 65504; the largest factor is 2^6. With 8 significant bits
# the largest scale that fits is 255 * 4.
MAX_SCALE = 1020.0
MIN_SCALE = 2.0**-24  # the smallest positive float16
_SEARCH_ELEMENTS = 1 << 22  # weights looked at in one piece, to bound temporaries
_RIDGE = 1e-4
_REFIT_RANGE = (0.25, 4.0)
_REFIT_ROWS = 192  # rows at a time, so that what a group couples stays in cache


def storable_scales(scales: Tensor) -> Tensor:
    """Round scales to values that float16 and bfloat16 both hold exactly, so that every engine reads the same.

    That is 8 significant bits, and multiples of 2^-24 in float16's subnormal range. The magnitude is kept within
    ``MIN_SCALE .. MAX_SCALE``: a scale of zero would make the rounding divide by zero.

    Args:
        scales: any float dtype and shape, finite.

    Returns:
        float32 tensor of the same shape; every value survives a round trip through float16 and through bfloat16.
    """
    magnitude = scales.to(torch.float32).abs().clamp(MIN_SCALE, MAX_SCALE)
    # bfloat16 first: it leaves 8 significant bits, which float16 then holds, or cuts again where it is subnormal.
    magnitude = magnitude.to(torch.bfloat16).to(torch.float16).to(torch.float32).clamp_min(MIN_SCALE)
    return torch.where(scales < 0, -magnitude, magnitude)


def resolve_group_size(name: str, in_features: int, requested: int) -> int:
    """The group size of a layer: the requested one, or the first of 128, 64, 32 below it that divides ``in_features``.

    Raises:
        UnsupportedModelError: none of them divides; the message names the layer and the way out.
    """
    if requested == PER_CHANNEL:
        return in_features
    for size in (requested, *(size for size in GROUP_SIZE_FALLBACKS if size < requested)):
        if in_features % size == 0:
            return size
    raise UnsupportedModelError(
        f"layer {name}: {in_features} input features are a multiple of no group size among "
        f"{requested} and its fallbacks {GROUP_SIZE_FALLBACKS}; use --group-size with a divisor of {in_features}, "
        f"--group-size {PER_CHANNEL} for one scale per output row, or --ignore {name}"
    )


def initial_scales(weight: Tensor, group_size: int, recipe: Recipe) -> Tensor:
    """Starting scales ``[rows, groups]`` from the largest magnitude of each group (no search).

    ``weight`` is ``[rows, in]`` float32 in the original column order. Groups of zeros get the smallest scale.
    """
    groups = weight.view(len(weight), -1, group_size)
    largest = groups.abs().amax(-1)
    if recipe.grid == "minmax":
        # GPTQ's symmetric grid spreads 2^r levels over [-absmax, absmax]; in units of the parent's grid the
        # spacing of a width r < 8 alone is 2^(8-r) codes.
        top = recipe.target_bits[-1]
        scales = 2 * largest / ((1 << top) - 1) / (1 << (PARENT_BITS - top))
    else:
        scales = largest / ZERO_POINT
    if recipe.signed_scales:
        # Level -128 exists and +128 does not: point the long side at the largest magnitude.
        scales = torch.where(groups.amax(-1) >= -groups.amin(-1), -scales, scales)
    return storable_scales(scales)


def search_scales(weight: Tensor, hessian_diagonal: Tensor, group_size: int, recipe: Recipe) -> Tensor:
    """Scales ``[rows, groups]`` that minimise ``sum_r lambda_r sum_j H_jj (w_j - w_r,j)^2`` within each group.

    Tries ``recipe.scale_candidates`` shrink factors of the starting scale. Each candidate is judged with the codes
    that the joint rounding would choose for it, and after rounding to storage precision.

    Args:
        weight: ``[rows, in]`` float32, original column order.
        hessian_diagonal: ``[in]`` float32, positive.
        group_size: divides ``in``.
        recipe: reads grid, signed_scales, scale_candidates, scale_min_shrink, target_bits, bit_weights.
    """
    start = initial_scales(weight, group_size, recipe)
    if recipe.scale_candidates == 1:
        return start
    table = shared_table(recipe.target_bits, recipe.bit_weights, weight.device)
    importance = hessian_diagonal.view(-1, group_size)  # [groups, group_size]
    shrinks = torch.linspace(1.0, recipe.scale_min_shrink, recipe.scale_candidates).tolist()
    if engine(weight) == "native":
        candidates = storable_scales(start * torch.tensor(shrinks).view(-1, 1, 1))
        chosen = native.search_scales(
            weight, hessian_diagonal, candidates, table.breakpoints, table.mean_level, table.spread
        )
        return candidates.gather(0, chosen.long().unsqueeze(0)).squeeze(0)
    best = start.clone()
    rows_per_piece = max(1, _SEARCH_ELEMENTS // weight.shape[1])
    for first in range(0, len(weight), rows_per_piece):
        piece = slice(first, first + rows_per_piece)
        groups = weight[piece].view(-1, *importance.shape)  # [rows, groups, group_size]
        lowest = torch.full(groups.shape[:2], torch.inf, device=weight.device)
        for shrink in shrinks:
            scales = storable_scales(start[piece] * shrink)
            error = _group_error(groups, scales, importance, table)
            better = error < lowest
            lowest = torch.where(better, error, lowest)
            best[piece] = torch.where(better, scales, best[piece])
    return best


def _group_error(groups: Tensor, scales: Tensor, importance: Tensor, table: SharedTable) -> Tensor:
    """``sum_r lambda_r sum_j H_jj (w_j - w_r,j)^2`` of each group, ``[rows, groups]``."""
    position = groups / scales.unsqueeze(-1)
    error = table.error(position)  # in squared steps of the parent's grid
    return (error * importance).sum(-1) * scales.square()


class Refit(NamedTuple):
    """Refitted scales ``[rows, groups]`` and the output errors ``(w - w_r) H (w - w_r)^T`` ``[rows]`` they leave."""

    scales: Tensor
    errors: Tensor


def refit_scales(weight: Tensor, levels: Tensor, scales: Tensor, hessian: Tensor) -> Refit:
    """Best group scales of one width for fixed codes: least squares in the Hessian's norm, per output row.

    With ``w_r = sum_g m_g v_g`` (``v_g``: the current weights of group g) the error ``(w - w_r) H (w - w_r)^T`` is
    least where ``A (m - 1) = b``, ``A_gh = v_g^T H_gh v_h``, ``b_g = v_g^T (H (w - sum_h v_h))_g``; a small ridge pulls
    m toward 1. Written for the change ``m - 1``, because at high widths the error is far below the rounding of
    ``w H w^T`` in float32.

    Args:
        weight: ``[rows, in]`` full-precision target.
        levels: ``[rows, in]`` float32 centred levels ``v_r(q) - 128`` of this width.
        scales: ``[rows, groups]`` current scales of this width.
        hessian: ``[in, in]``, symmetric.

    Returns:
        Storable scales and the error of each row. A multiplier that is not finite or leaves 1/4..4 is not taken: such
        a group is nearly empty and the system says nothing about it. A row whose rounded solution would be worse than
        what it replaces keeps its scales.
    """
    pieces = [
        _refit_rows(weight[i : i + _REFIT_ROWS], levels[i : i + _REFIT_ROWS], scales[i : i + _REFIT_ROWS], hessian)
        for i in range(0, len(weight), _REFIT_ROWS)
    ]
    return Refit(torch.cat([piece.scales for piece in pieces]), torch.cat([piece.errors for piece in pieces]))


def _refit_rows(weight: Tensor, levels: Tensor, scales: Tensor, hessian: Tensor) -> Refit:
    rows, groups = scales.shape
    size = weight.shape[1] // groups
    current = (levels.view(rows, groups, size) * scales.unsqueeze(-1)).view(rows, -1)
    sums = native.refit_sums if engine(weight) == "native" else _refit_sums
    system, slope, errors = sums(weight - current, current, hessian, size)
    ridge = _RIDGE * system.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    regular = system + torch.diag_embed(ridge.unsqueeze(-1).expand(rows, groups))
    change, info = torch.linalg.solve_ex(regular, slope)
    multipliers = 1 + change
    low, high = _REFIT_RANGE
    usable = torch.isfinite(multipliers) & (multipliers >= low) & (multipliers <= high) & (info == 0).unsqueeze(-1)
    refitted = storable_scales(torch.where(usable, scales * multipliers, scales))
    taken = (refitted - scales) / scales  # the change that rounding to storage precision left
    growth = (taken * (system @ taken.unsqueeze(-1)).squeeze(-1)).sum(-1) - 2 * (taken * slope).sum(-1)
    better = growth < 0
    return Refit(
        torch.where(better.unsqueeze(-1), refitted, scales),
        torch.where(better, (errors + growth).clamp_min(0), errors),
    )


def _refit_sums(difference: Tensor, current: Tensor, hessian: Tensor, size: int) -> native.RefitSums:
    """``native.refit_sums`` as tensor code, for other devices too."""
    rows, groups = len(current), current.shape[1] // size
    system = torch.empty(rows, groups, groups, device=current.device)
    for g in range(groups):
        first = g * size  # symmetric: only the upper half is computed
        coupled = (current[:, first : first + size] @ hessian[first : first + size, first:]).mul_(current[:, first:])
        system[:, g, g:] = coupled.view(rows, groups - g, size).sum(-1)
        system[:, g + 1 :, g] = system[:, g, g + 1 :]
    coupled = difference @ hessian
    slope = (coupled * current).view(rows, groups, size).sum(-1)
    return native.RefitSums(system, slope, coupled.mul_(difference).sum(-1))
