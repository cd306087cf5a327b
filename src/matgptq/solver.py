"""Quantize one weight matrix given its Hessian: scales, compensated rounding, coordinate passes, refit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from matgptq.errors import ConfigurationError
from matgptq.grid import initial_scales, refit_scales, search_scales
from matgptq.hessian import factorize, prepare_hessian
from matgptq.nested_weight import NestedWeight, scale_source
from matgptq.recipe import Recipe
from matgptq.rounding import SharedTable, round_shared, shared_table
from matgptq.slicing import PARENT_BITS, level_table
from matgptq.sweep import SweepGrid, code_levels, compensate, descend

_SWEEP_ELEMENTS = 1 << 25  # floats in one [in, copies * rows] temporary; more rows than that go piece by piece


@dataclass(frozen=True)
class Solution:
    """What the solver made of a matrix, and what it had to resort to.

    Attributes:
        weight: codes and scales on the device of the input; scales float32, already at storage precision.
        dead_columns: input columns that calibration never excited; rounded to nearest.
        damping: fraction of the mean diagonal that made the Hessian positive definite (0 when none was used).
        damping_steps: how often it had to be raised beyond the recipe's.
        rounded_to_nearest: no damping helped (or the Hessian was not finite), so the layer was rounded to nearest.
    """

    weight: NestedWeight
    dead_columns: int = 0
    damping: float = 0.0
    damping_steps: int = 0
    rounded_to_nearest: bool = False


def solve(weight: Tensor, hessian: Tensor | None, recipe: Recipe, group_size: int) -> Solution:
    """Quantize a weight matrix to nested codes.

    Layers that see the same input may be stacked along the rows: rows do not influence one another.

    Args:
        weight: ``[rows, in]`` floating, finite.
        hessian: ``[in, in]``, ``2/N sum x x^T`` of the layer's inputs; None only if the recipe needs no calibration.
        recipe: the ingredients.
        group_size: input columns per scale, divides ``in``.

    Raises:
        ConfigurationError: shapes do not fit, or the Hessian is missing.
    """
    weight = weight.to(torch.float32)
    in_features = weight.shape[1]
    if in_features % group_size:
        raise ConfigurationError(f"group size {group_size} does not divide {in_features} input features")
    if hessian is None:
        if recipe.needs_calibration:
            raise ConfigurationError(f"method {recipe.method} with these options needs a Hessian")
        return Solution(_round_to_nearest(weight, recipe, group_size))
    if tuple(hessian.shape) != (in_features, in_features):
        raise ConfigurationError(f"Hessian {tuple(hessian.shape)} does not fit a weight {tuple(weight.shape)}")
    if not bool(torch.isfinite(hessian).all()):
        return Solution(_round_to_nearest(weight, recipe, group_size), rounded_to_nearest=True)
    prepared = prepare_hessian(hessian)
    matrix, dead_columns = prepared.matrix, int(prepared.dead.sum())
    scales = search_scales(weight, matrix.diagonal(), group_size, recipe)

    order = torch.arange(in_features, device=weight.device)
    if recipe.column_order == "hessian":
        order = matrix.diagonal().argsort(descending=True, stable=True)
    ordered = matrix[order][:, order]
    factor = None
    if recipe.compensation != "none":
        factor = factorize(ordered, recipe.damping)
        if factor is None:
            fallback = _round_to_nearest(weight, recipe, group_size)
            return Solution(fallback, dead_columns, rounded_to_nearest=True)

    copies = 1 if recipe.compensation == "mean" else len(recipe.target_bits)
    rows_per_piece = max(1, _SWEEP_ELEMENTS // (in_features * copies))
    problem = _Problem(recipe, group_size, order, matrix, ordered, None if factor is None else factor.upper)
    pieces = [
        problem.solve(rows, piece_scales)
        for rows, piece_scales in zip(
            torch.split(weight, rows_per_piece), torch.split(scales, rows_per_piece), strict=True
        )
    ]
    nested = NestedWeight(
        torch.cat([piece.codes for piece in pieces]),
        {bits: torch.cat([piece.scales[bits] for piece in pieces]) for bits in pieces[0].scales},
    )
    if factor is None:
        return Solution(nested, dead_columns)
    return Solution(nested, dead_columns, factor.damping, factor.steps)


def relative_errors(
    weight: Tensor, nested: NestedWeight, hessian: Tensor, widths: tuple[int, ...]
) -> Mapping[int, float]:
    """Relative output error ``||(W - W_r) X||^2 / ||W X||^2`` of each width, from the Hessian."""
    weight = weight.to(torch.float32)
    hessian = hessian.to(torch.float32)
    reference = float(((weight @ hessian) * weight).sum())
    errors = {}
    for bits in widths:
        difference = weight - nested.dequantize(bits)
        error = float(((difference @ hessian) * difference).sum())
        errors[bits] = error / reference if reference > 0 else 0.0
    return errors


def _round_to_nearest(weight: Tensor, recipe: Recipe, group_size: int) -> NestedWeight:
    """Joint rounding of each weight on its own, without a Hessian."""
    scales = initial_scales(weight, group_size, recipe)
    codes, _ = round_shared(weight / scales.repeat_interleave(group_size, 1), _shared(recipe, weight.device))
    return NestedWeight(codes, {PARENT_BITS: scales})


def _shared(recipe: Recipe, device: torch.device) -> SharedTable:
    return shared_table(recipe.target_bits, recipe.bit_weights, device)


@dataclass(frozen=True)
class _Problem:
    """What all rows of one matrix have in common."""

    recipe: Recipe
    group_size: int
    order: Tensor  # [in], original column at each processing position
    hessian: Tensor  # [in, in], original order
    ordered_hessian: Tensor  # [in, in], processing order
    upper: Tensor | None  # [in, in], processing order; None: first codes by plain rounding

    def solve(self, weight: Tensor, start_scales: Tensor) -> NestedWeight:
        recipe = self.recipe
        one_copy = recipe.compensation == "mean" or len(recipe.target_bits) == 1
        # One set of scales per copy that the sweep keeps, [copies, rows, groups].
        scales = start_scales.repeat(1 if one_copy else len(recipe.target_bits), 1, 1)
        if self.upper is None:
            positions = weight / start_scales.repeat_interleave(self.group_size, 1)
            codes, _ = round_shared(positions, _shared(recipe, weight.device))
        else:
            codes = self._restore(compensate(weight.T[self.order], self.upper, self._grid(scales)))
        for _ in range(recipe.coordinate_passes):
            if recipe.refit and recipe.refit_in_loop:
                scales = self._refit(weight, codes, scales, recipe.target_bits)
            codes = self._descend(weight, codes, scales)
        if not recipe.refit:
            return NestedWeight(codes, {PARENT_BITS: start_scales})
        if recipe.compensation == "mean":
            scales = start_scales.repeat(len(recipe.target_bits), 1, 1)
        scales = self._refit(weight, codes, scales, recipe.target_bits)
        if len(recipe.target_bits) == 1:
            return NestedWeight(codes, {PARENT_BITS: scales[0]})
        own = dict(zip(recipe.target_bits, scales, strict=True))
        source = scale_source(own)
        for bits in recipe.refit_bits:
            if bits not in own:
                own[bits] = self._refit(weight, codes, own[source[bits]].unsqueeze(0), (bits,))[0]
        return NestedWeight(codes, own)

    def _grid(self, scales: Tensor) -> SweepGrid:
        by_group = scales.permute(2, 0, 1).contiguous()  # [groups, copies, rows]
        group_of: list[int] = (self.order // self.group_size).tolist()
        return SweepGrid(by_group, group_of, self.recipe.target_bits, self.recipe.bit_weights)

    def _restore(self, codes: Tensor) -> Tensor:
        """Codes ``[in, rows]`` in processing order back to ``[rows, in]`` in the model's order."""
        restored = torch.empty_like(codes)
        restored[self.order] = codes
        return restored.T.contiguous()

    def _levels(self, codes: Tensor, widths: tuple[int, ...]) -> Tensor:
        """Centred levels ``[widths, rows, in]``."""
        return code_levels(codes, torch.stack([level_table(bits) for bits in widths]).to(codes.device))

    def _refit(self, weight: Tensor, codes: Tensor, scales: Tensor, widths: tuple[int, ...]) -> Tensor:
        """Refitted scales of some widths, ``[widths, rows, groups]`` as the present ones."""
        levels = self._levels(codes, widths)
        return torch.stack(
            [
                refit_scales(weight, width_levels, width_scales, self.hessian, self.group_size)
                for width_levels, width_scales in zip(levels, scales, strict=True)
            ]
        )

    def _descend(self, weight: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        levels = self._levels(codes, self.recipe.target_bits)
        current = levels * scales.repeat_interleave(self.group_size, 2)  # [copies, rows, in]
        gradient = (weight - current) @ self.hessian
        codes = descend(self._by_column(current), self._by_column(gradient), self.ordered_hessian, self._grid(scales))
        return self._restore(codes)

    def _by_column(self, copies: Tensor) -> Tensor:
        """``[copies, rows, in]`` as ``[in, copies * rows]`` in processing order."""
        return copies[..., self.order].permute(2, 0, 1).reshape(len(self.order), -1)
