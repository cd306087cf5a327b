"""Quantize one weight matrix given its Hessian: scales, compensated rounding, coordinate passes, refit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from matgptq.errors import ConfigurationError
from matgptq.finiteness import all_finite
from matgptq.grid import Refit, initial_scales, refit_scales, search_scales
from matgptq.hessian import factorize, prepare_hessian, quadratic_forms
from matgptq.nested_weight import NestedWeight, scale_source
from matgptq.recipe import Recipe
from matgptq.rounding import SharedTable, round_shared, shared_table
from matgptq.slicing import PARENT_BITS, WIDTHS, level_table
from matgptq.sweep import SweepGrid, code_levels, compensate, descend
from matgptq.workers import INLINE, Workers

# Floats in one [in, copies * rows] temporary: bounds memory, stays near the caches, gives all threads something to do.
_SWEEP_ELEMENTS = 1 << 19
_SWEEP_ELEMENTS_ON_GPU = 1 << 27  # rows are what fills a GPU


@dataclass(frozen=True)
class OutputErrors:
    """How far the layer's outputs move, row by row.

    Attributes:
        energy: ``[rows]``, ``w H w^T``: the squared outputs of full precision.
        errors: ``{width: [rows]}``, ``(w - w_r) H (w - w_r)^T``, all widths.
    """

    energy: Tensor
    errors: Mapping[int, Tensor]

    def relative(self, rows: slice = slice(None)) -> dict[int, float]:
        """``||(W - W_r) X||^2 / ||W X||^2`` of some rows, for every width; 0 where nothing comes out."""
        energy = float(self.energy[rows].sum())
        return {bits: float(self.errors[bits][rows].sum()) / energy if energy > 0 else 0.0 for bits in WIDTHS}


@dataclass(frozen=True)
class Solution:
    """What the solver made of a matrix, and what it had to resort to.

    Attributes:
        weight: codes and scales on the device of the input; scales float32, already at storage precision.
        errors: of the outputs; None without a finite Hessian.
        dead_columns: input columns that calibration never excited; rounded to nearest.
        damping: fraction of the mean diagonal that made the Hessian positive definite (0 when none was used).
        damping_steps: how often it had to be raised beyond the recipe's.
        rounded_to_nearest: no damping helped (or the Hessian was not finite), so the layer was rounded to nearest.
    """

    weight: NestedWeight
    errors: OutputErrors | None = None
    dead_columns: int = 0
    damping: float = 0.0
    damping_steps: int = 0
    rounded_to_nearest: bool = False


def solve(
    weight: Tensor, hessian: Tensor | None, recipe: Recipe, group_size: int, workers: Workers = INLINE
) -> Solution:
    """Quantize a weight matrix to nested codes.

    Layers that see the same input may be stacked along the rows: rows do not influence one another.

    Args:
        weight: ``[rows, in]`` floating, finite.
        hessian: ``[in, in]``, ``2/N sum x x^T`` of the layer's inputs; None only if the recipe needs no calibration.
        recipe: the ingredients.
        group_size: input columns per scale, divides ``in``.
        workers: among which rows are shared out, in pieces whose size does not depend on them.

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
    if not all_finite(hessian):
        return Solution(_round_to_nearest(weight, recipe, group_size), rounded_to_nearest=True)
    hessian = hessian.to(torch.float32)
    prepared = prepare_hessian(hessian)
    matrix, dead_columns = prepared.matrix, int(prepared.dead.sum())
    copies = 1 if recipe.compensation == "mean" else len(recipe.target_bits)
    elements = _SWEEP_ELEMENTS if weight.device.type == "cpu" else _SWEEP_ELEMENTS_ON_GPU
    pieces = torch.split(weight, max(1, elements // (in_features * copies)))

    order = torch.arange(in_features, device=weight.device)
    if recipe.column_order == "hessian":
        order = matrix.diagonal().argsort(descending=True, stable=True)
    ordered = matrix[order.unsqueeze(1), order]
    factor = None
    if recipe.compensation != "none":
        factor = factorize(ordered, recipe.damping, workers)
        if factor is None:
            fallback = _round_to_nearest(weight, recipe, group_size)
            return Solution(fallback, output_errors(weight, fallback, hessian), dead_columns, rounded_to_nearest=True)

    problem = _Problem(recipe, group_size, order, matrix, ordered, None if factor is None else factor.upper)

    def solve_piece(piece: Tensor) -> tuple[NestedWeight, OutputErrors]:
        # PyTorch's grad mode is each thread's own.
        with torch.no_grad():
            nested, known = problem.solve(piece, search_scales(piece, matrix.diagonal(), group_size, recipe))
            # What the refit found holds unless dead columns gave it a Hessian that is not the layer's own.
            return nested, output_errors(piece, nested, hessian, {} if dead_columns else known)

    solved = [*workers.map(solve_piece, pieces)]
    nested = NestedWeight(
        torch.cat([piece.codes for piece, _ in solved]),
        {bits: torch.cat([piece.scales[bits] for piece, _ in solved]) for bits in solved[0][0].scales},
    )
    errors = OutputErrors(
        torch.cat([each.energy for _, each in solved]),
        {bits: torch.cat([each.errors[bits] for _, each in solved]) for bits in WIDTHS},
    )
    if factor is None:
        return Solution(nested, errors, dead_columns)
    return Solution(nested, errors, dead_columns, factor.damping, factor.steps)


def output_errors(
    weight: Tensor, nested: NestedWeight, hessian: Tensor, known: Mapping[int, Tensor] | None = None
) -> OutputErrors:
    """What each width of a quantized matrix does to the layer's outputs.

    Args:
        weight: ``[rows, in]`` full precision.
        nested: its quantized form.
        hessian: ``[in, in]``.
        known: errors of widths ``[rows]`` that need not be computed again.
    """
    weight = weight.to(torch.float32)
    hessian = hessian.to(torch.float32)
    of_widths = dict(known or {})
    for bits in WIDTHS:
        if bits not in of_widths:
            of_widths[bits] = quadratic_forms(weight - nested.dequantize(bits), hessian)
    return OutputErrors(quadratic_forms(weight, hessian), of_widths)


def _round_to_nearest(weight: Tensor, recipe: Recipe, group_size: int) -> NestedWeight:
    """Joint rounding of each weight on its own, without a Hessian."""
    scales = initial_scales(weight, group_size, recipe)
    codes, _ = round_shared(weight / scales.repeat_interleave(group_size, 1), _shared(recipe, weight.device))
    return NestedWeight(codes, dict.fromkeys(recipe.scale_bits, scales))


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

    def solve(self, weight: Tensor, start_scales: Tensor) -> tuple[NestedWeight, dict[int, Tensor]]:
        """Codes and scales of some rows, and the output errors that the last refit knows."""
        recipe = self.recipe
        widths = recipe.target_bits
        one_copy = recipe.compensation == "mean" or len(widths) == 1
        # One set of scales per copy that the sweep keeps, [copies, rows, groups].
        scales = start_scales.repeat(1 if one_copy else len(widths), 1, 1)
        if self.upper is None:
            positions = weight / start_scales.repeat_interleave(self.group_size, 1)
            codes, _ = round_shared(positions, _shared(recipe, weight.device))
        else:
            codes = self._restore(compensate(weight.T[self.order], self.upper, self._grid(scales)))
        for _ in range(recipe.coordinate_passes):
            if recipe.refit and recipe.refit_in_loop:
                refits = [self._refit(weight, codes, own, bits) for own, bits in zip(scales, widths, strict=True)]
                scales = torch.stack([refit.scales for refit in refits])
            codes = self._descend(weight, codes, scales)
        if not recipe.refit:
            return NestedWeight(codes, {PARENT_BITS: start_scales}), {}
        if recipe.compensation == "mean":
            scales = start_scales.repeat(len(widths), 1, 1)
        final = {bits: self._refit(weight, codes, own, bits) for own, bits in zip(scales, widths, strict=True)}
        if len(widths) == 1:
            refit = final[widths[0]]
            return NestedWeight(codes, {PARENT_BITS: refit.scales}), {widths[0]: refit.errors}
        source = scale_source(final)
        for bits in recipe.refit_bits:
            if bits not in final:
                final[bits] = self._refit(weight, codes, final[source[bits]].scales, bits)
        return NestedWeight(codes, {bits: refit.scales for bits, refit in final.items()}), {
            bits: refit.errors for bits, refit in final.items()
        }

    def _grid(self, scales: Tensor) -> SweepGrid:
        by_group = scales.permute(2, 0, 1).contiguous()  # [groups, copies, rows]
        group_of: list[int] = (self.order // self.group_size).tolist()
        return SweepGrid(by_group, group_of, self.recipe.target_bits, self.recipe.bit_weights)

    def _restore(self, codes: Tensor) -> Tensor:
        """Codes ``[in, rows]`` in processing order back to ``[rows, in]`` in the model's order."""
        restored = torch.empty_like(codes)
        restored[self.order] = codes
        return restored.T.contiguous()

    def _refit(self, weight: Tensor, codes: Tensor, scales: Tensor, bits: int) -> Refit:
        levels = code_levels(codes, level_table(bits).to(codes.device).unsqueeze(0))
        return refit_scales(weight, levels[0], scales, self.hessian)

    def _descend(self, weight: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        tables = torch.stack([level_table(bits) for bits in self.recipe.target_bits]).to(codes.device)
        levels = code_levels(codes, tables)  # [copies, rows, in]
        current = levels * scales.repeat_interleave(self.group_size, 2)  # [copies, rows, in]
        gradient = (weight - current) @ self.hessian
        codes = descend(self._by_column(current), self._by_column(gradient), self.ordered_hessian, self._grid(scales))
        return self._restore(codes)

    def _by_column(self, copies: Tensor) -> Tensor:
        """``[copies, rows, in]`` as ``[in, copies * rows]`` in processing order."""
        return copies[..., self.order].permute(2, 0, 1).reshape(len(self.order), -1)
