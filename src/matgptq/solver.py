"""Quantize one weight matrix given its Hessian: scales, compensated rounding, coordinate passes, refit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from matgptq.errors import ConfigurationError
from matgptq.finiteness import all_finite
from matgptq.grid import Refit, initial_scales, refit_scales, search_scales
from matgptq.hessian import factorize, prepare_hessian, quadratic_forms
from matgptq.nested_weight import NestedWeight, scale_source
from matgptq.output_hessian import OutputHessian, factorize_outputs
from matgptq.recipe import Recipe
from matgptq.rounding import SharedTable, round_shared, shared_table
from matgptq.slicing import PARENT_BITS, WIDTHS, level_table
from matgptq.sweep import SweepGrid, code_levels, compensate, descend
from matgptq.workers import INLINE, Workers

# Floats in one [in, copies * rows] temporary: bounds memory, stays near the caches, gives all threads something to do.
_SWEEP_ELEMENTS = 1 << 19
_SWEEP_ELEMENTS_ON_GPU = 1 << 27  # rows are what fills a GPU
# Rows of a block of an output Hessian that are rounded side by side: what they leave moves those behind them and not
# each other, so that few lose little and many leave more to do at once.
_JOINED_ROWS, _JOINED_STEPS, _JOINED_STEPS_ON_GPU = 32, 16, 8
_JOINED_PIECES = 4  # of at least so many rows, into which these are cut for threads
_JOINED_COLUMNS = 1024  # of all copies, in which a thread moves the rows behind
_JOINED_ELEMENTS = 1 << 26  # floats by which the rows of some blocks are moved; one block is always solved


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
    hessian = hessian.to(torch.float32)
    prepared = prepare_hessian(hessian)
    matrix, dead_columns = prepared.matrix, int(prepared.dead.sum())
    copies = 1 if recipe.compensation == "mean" else len(recipe.target_bits)
    elements = _SWEEP_ELEMENTS if weight.device.type == "cpu" else _SWEEP_ELEMENTS_ON_GPU
    pieces = torch.split(weight, max(1, elements // (in_features * copies)))
    if outputs is not None and sum(outputs.layers.values()) != len(weight):
        rows = sum(outputs.layers.values())
        raise ConfigurationError(f"an output Hessian of {rows} rows does not fit a weight {tuple(weight.shape)}")

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

    def solve_piece(piece: Tensor) -> _Rows:
        # PyTorch's grad mode is each thread's own.
        with torch.no_grad():
            nested, known = problem.solve(piece)
            # What the refit found holds unless dead columns gave it a Hessian that is not the layer's own.
            return _Rows(nested, output_errors(piece, nested, hessian, {} if dead_columns else known))

    if outputs is None:
        solved = _stack([*workers.map(solve_piece, pieces)])
    else:
        with torch.no_grad():
            solved = _solve_joined(problem, weight, hessian, outputs, workers)
    nested, errors = solved.weight, solved.errors
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


@dataclass(frozen=True)
class _Rows:
    """Some rows that are solved."""

    weight: NestedWeight
    errors: OutputErrors

    def select(self, index: Tensor) -> _Rows:
        """Those of them that an index names."""
        scales = {bits: each[index] for bits, each in self.weight.scales.items()}
        errors = {bits: each[index] for bits, each in self.errors.errors.items()}
        return _Rows(NestedWeight(self.weight.codes[index], scales), OutputErrors(self.errors.energy[index], errors))


def _stack(parts: Sequence[_Rows]) -> _Rows:
    """Rows behind rows."""
    weights, errors = [part.weight for part in parts], [part.errors for part in parts]
    scales = {bits: torch.cat([each.scales[bits] for each in weights]) for bits in weights[0].scales}
    of_widths = {bits: torch.cat([each.errors[bits] for each in errors]) for bits in WIDTHS}
    return _Rows(
        NestedWeight(torch.cat([each.codes for each in weights]), scales),
        OutputErrors(torch.cat([each.energy for each in errors]), of_widths),
    )


def _solve_joined(
    problem: _Problem, weight: Tensor, hessian: Tensor, outputs: OutputHessian, workers: Workers
) -> _Rows:
    """Solve rows whose errors act together, those first that the predictions depend on most.

    Some rows of each block are solved side by side. What is then left of each width's copy moves that width's targets
    of the rows behind them in the block, as a column's residual moves the columns behind it.
    """
    matrix = outputs.matrix.to(weight.device)
    ranks = matrix.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    rows = outputs.rows().to(weight.device).gather(1, ranks)
    of_a_block = matrix.shape[1] * len(problem.recipe.target_bits) * weight.shape[1]
    solved, places = [], []
    for some in torch.split(torch.arange(len(matrix)), max(1, _JOINED_ELEMENTS // of_a_block)):
        ordered = [matrix[block][ranks[block].unsqueeze(1), ranks[block]] for block in some]
        upper = factorize_outputs(torch.stack(ordered), problem.recipe.output_damping, workers)
        for index, part in _solve_blocks(problem, weight, hessian, rows[some], upper, workers):
            places.append(index)
            solved.append(part)
    return _stack(solved).select(torch.cat(places).argsort())


def _solve_blocks(
    problem: _Problem, weight: Tensor, hessian: Tensor, rows: Tensor, upper: Tensor, workers: Workers
) -> Iterator[tuple[Tensor, _Rows]]:
    """Rows ``[blocks, size]`` of a weight, as they are solved, in the order of the factor ``[blocks, size, size]``."""
    blocks, size = rows.shape
    widths, columns = problem.recipe.target_bits, weight.shape[1]
    on_cpu = weight.device.type == "cpu"
    steps = _JOINED_STEPS if on_cpu else _JOINED_STEPS_ON_GPU
    step = _JOINED_ROWS * max(1, -(-size // (_JOINED_ROWS * steps)))
    together = max(_JOINED_ROWS, -(-step // _JOINED_PIECES)) if on_cpu else blocks * step
    moved = weight.new_zeros(blocks, size, len(widths) * columns)

    def solve_piece(piece: tuple[Tensor, Tensor]) -> tuple[_Rows, Tensor]:
        own, by_copies = piece
        with torch.no_grad():
            targets = own + by_copies.view(len(own), len(widths), columns).transpose(0, 1)
            nested, _ = problem.solve(own, targets)
            left = [target - nested.dequantize(bits) for target, bits in zip(targets, widths, strict=True)]
            return _Rows(nested, output_errors(own, nested, hessian)), torch.stack(left, 1).view(len(own), -1)

    for first in range(0, size, step):
        part, behind = slice(first, min(first + step, size)), slice(min(first + step, size), size)
        index = rows[:, part].flatten()
        own, by_copies = weight[index], moved[:, part].flatten(0, 1)
        pieces = zip(torch.split(own, together), torch.split(by_copies, together), strict=True)
        solved = [*workers.map(solve_piece, pieces)]
        yield index, _stack([each for each, _ in solved])
        passed = torch.linalg.solve_triangular(
            upper[:, part, part].mT, torch.cat([left for _, left in solved]).view(blocks, -1, len(widths) * columns),
            upper=False,
        )  # fmt: skip
        pull = upper[:, part, behind].mT

        def move(some: slice, pull: Tensor = pull, passed: Tensor = passed, behind: slice = behind) -> None:
            with torch.no_grad():
                moved[:, behind, some] -= pull @ passed[..., some]

        if behind.start < size:
            workers.run(move, [slice(at, at + _JOINED_COLUMNS) for at in range(0, moved.shape[2], _JOINED_COLUMNS)])


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

    def solve(self, weight: Tensor, targets: Tensor | None = None) -> tuple[NestedWeight, dict[int, Tensor]]:
        """Codes and scales of some rows, and the output errors that the last refit knows.

        Args:
            weight: ``[rows, in]``.
            targets: ``[copies, rows, in]``, what each width is to come near; by default the weight.
        """
        recipe = self.recipe
        widths = recipe.target_bits
        one_copy = recipe.compensation == "mean" or len(widths) == 1
        start_scales = search_scales(weight, self.hessian.diagonal(), self.group_size, recipe)
        # One set of scales per copy that the sweep keeps, [copies, rows, groups].
        scales = start_scales.repeat(1 if one_copy else len(widths), 1, 1)
        moved = None if targets is None else self._by_column(targets - weight)
        targets = weight.expand(len(widths), -1, -1) if targets is None else targets
        if self.upper is None:
            positions = weight / start_scales.repeat_interleave(self.group_size, 1)
            codes, _ = round_shared(positions, _shared(recipe, weight.device))
        else:
            codes = self._restore(compensate(weight.T[self.order], self.upper, self._grid(scales), moved))
        for _ in range(recipe.coordinate_passes):
            if recipe.refit and recipe.refit_in_loop:
                scales = torch.stack([refit.scales for refit in self._refit_all(targets, codes, scales)])
            codes = self._descend(targets, codes, scales)
        if not recipe.refit:
            return NestedWeight(codes, {PARENT_BITS: start_scales}), {}
        if recipe.compensation == "mean":
            scales = start_scales.repeat(len(widths), 1, 1)
        final = dict(zip(widths, self._refit_all(targets, codes, scales), strict=True))
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

    def _refit_all(self, targets: Tensor, codes: Tensor, scales: Tensor) -> list[Refit]:
        """Of each target width, to its own targets."""
        widths = self.recipe.target_bits
        return [self._refit(target, codes, own, bits)
                for target, own, bits in zip(targets, scales, widths, strict=True)]  # fmt: skip

    def _refit(self, weight: Tensor, codes: Tensor, scales: Tensor, bits: int) -> Refit:
        levels = code_levels(codes, level_table(bits).to(codes.device).unsqueeze(0))
        return refit_scales(weight, levels[0], scales, self.hessian)

    def _descend(self, targets: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        tables = torch.stack([level_table(bits) for bits in self.recipe.target_bits]).to(codes.device)
        levels = code_levels(codes, tables)  # [copies, rows, in]
        current = levels * scales.repeat_interleave(self.group_size, 2)  # [copies, rows, in]
        gradient = (targets - current) @ self.hessian
        codes = descend(self._by_column(current), self._by_column(gradient), self.ordered_hessian, self._grid(scales))
        return self._restore(codes)

    def _by_column(self, copies: Tensor) -> Tensor:
        """``[copies, rows, in]`` as ``[in, copies * rows]`` in processing order."""
        return copies[..., self.order].permute(2, 0, 1).reshape(len(self.order), -1)
