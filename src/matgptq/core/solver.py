"""Quantize one weight matrix given its Hessian: scales, compensated rounding, coordinate passes, refit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matgptq.core.finiteness import all_finite
from matgptq.core.grid import initial_scales
from matgptq.core.hessian import factorize, prepare_hessian
from matgptq.core.joined_rows import solve_joined
from matgptq.core.output_errors import OutputErrors, output_errors
from matgptq.core.output_hessian import OutputHessian
from matgptq.core.row_problem import RowProblem, SolvedRows, stack_rows
from matgptq.core.sweep import compensation_coupling, descent_coupling
from matgptq.errors import ConfigurationError
from matgptq.machine.devices import exact_products
from matgptq.machine.workers import INLINE, Workers
from matgptq.nested_weight import NestedWeight
from matgptq.recipe import Recipe
from matgptq.rounding import round_shared, shared_table

# Floats in one [in, copies * rows] temporary: bounds memory, stays near the caches, gives all threads something to do.
_SWEEP_ELEMENTS = 1 << 19
_SWEEP_ELEMENTS_ON_GPU = 1 << 27  # rows are what fills a GPU


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
    weight: Tensor,
    hessian: Tensor | None,
    recipe: Recipe,
    group_size: int,
    workers: Workers = INLINE,
    outputs: OutputHessian | None = None,
) -> Solution:
    """Quantize a weight matrix to nested codes.

    Layers that see the same input may be stacked along the rows.

    Args:
        weight: ``[rows, in]`` floating, finite.
        hessian: ``[in, in]``, ``2/N sum x x^T`` of the layer's inputs; None only if the recipe needs no calibration.
        recipe: the ingredients.
        group_size: input columns per scale, divides ``in``.
        workers: among which rows are shared out, in pieces whose size does not depend on them.
        outputs: the Hessian of the stacked layers' outputs; without it each row is solved as if there were no others.

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
    if outputs is not None and sum(outputs.layers.values()) != len(weight):
        rows = sum(outputs.layers.values())
        raise ConfigurationError(f"an output Hessian of {rows} rows does not fit a weight {tuple(weight.shape)}")
    with exact_products(weight.device):
        return _solve(weight, hessian.to(torch.float32), recipe, group_size, workers, outputs)


def _solve(
    weight: Tensor,
    hessian: Tensor,
    recipe: Recipe,
    group_size: int,
    workers: Workers,
    outputs: OutputHessian | None,
) -> Solution:
    """``solve`` of what fits together, float32, by a finite Hessian."""
    in_features = weight.shape[1]
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

    raw = hessian if dead_columns else matrix
    compensation = None if factor is None else compensation_coupling(factor.upper)
    problem = RowProblem(recipe, group_size, order, raw, matrix, compensation, descent_coupling(ordered))

    def solve_piece(piece: Tensor) -> SolvedRows:
        # PyTorch's grad mode is each thread's own.
        with torch.no_grad():
            return problem.solve(piece)

    if outputs is None:
        solved = stack_rows([*workers.map(solve_piece, pieces)])
    else:
        solved = solve_joined(problem, weight, outputs, workers)
    nested, errors = solved.weight, solved.errors
    if factor is None:
        return Solution(nested, errors, dead_columns)
    return Solution(nested, errors, dead_columns, factor.damping, factor.steps)


def _round_to_nearest(weight: Tensor, recipe: Recipe, group_size: int) -> NestedWeight:
    """Joint rounding of each weight on its own, without a Hessian."""
    scales = initial_scales(weight, group_size, recipe)
    table = shared_table(recipe.target_bits, recipe.bit_weights, weight.device)
    codes, _ = round_shared(weight / scales.repeat_interleave(group_size, 1), table)
    return NestedWeight(codes, dict.fromkeys(recipe.scale_bits, scales))
