"""The rows of one weight matrix as a problem: first codes and scales, passes that better them, and the end.

No row knows of the others here, so that any of them may be worked on at a time, in pieces that are cut at will.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from matgptq.core.grid import Refit, refit_scales, search_scales
from matgptq.core.output_errors import OutputErrors, output_errors
from matgptq.core.sweep import SweepGrid, code_levels, compensate, descend
from matgptq.nested_weight import NestedWeight, scale_source
from matgptq.recipe import Recipe
from matgptq.rounding import round_shared, shared_table
from matgptq.slicing import PARENT_BITS, WIDTHS, level_table


@dataclass(frozen=True)
class Draft:
    """Some rows as far as they are solved, with C copies of the weight: one per target width, or one for all of them.

    Attributes:
        codes: uint8 ``[rows, in]``.
        scales: float32 ``[C, rows, groups]``, of the target widths ascending.
    """

    codes: Tensor
    scales: Tensor

    def select(self, index: Tensor) -> Draft:
        """Those rows that an index names."""
        return Draft(self.codes[index], self.scales[:, index])

    def split(self, rows: int) -> list[Draft]:
        """In pieces of so many rows."""
        parts = zip(torch.split(self.codes, rows), torch.split(self.scales, rows, 1), strict=True)
        return [Draft(codes, scales) for codes, scales in parts]


@dataclass(frozen=True)
class SolvedRows:
    """Some rows that are solved."""

    weight: NestedWeight
    errors: OutputErrors

    def select(self, index: Tensor) -> SolvedRows:
        """Those of them that an index names."""
        scales = {bits: each[index] for bits, each in self.weight.scales.items()}
        errors = {bits: each[index] for bits, each in self.errors.errors.items()}
        weight = NestedWeight(self.weight.codes[index], scales)
        return SolvedRows(weight, OutputErrors(self.errors.energy[index], errors))


def stack_drafts(parts: Sequence[Draft]) -> Draft:
    """Rows behind rows."""
    return Draft(torch.cat([each.codes for each in parts]), torch.cat([each.scales for each in parts], 1))


def stack_rows(parts: Sequence[SolvedRows]) -> SolvedRows:
    """Rows behind rows."""
    weights, errors = [part.weight for part in parts], [part.errors for part in parts]
    scales = {bits: torch.cat([each.scales[bits] for each in weights]) for bits in weights[0].scales}
    of_widths = {bits: torch.cat([each.errors[bits] for each in errors]) for bits in WIDTHS}
    return SolvedRows(
        NestedWeight(torch.cat([each.codes for each in weights]), scales),
        OutputErrors(torch.cat([each.energy for each in errors]), of_widths),
    )


@dataclass(frozen=True)
class RowProblem:
    """What all rows of one matrix have in common.

    Attributes:
        recipe: the ingredients.
        group_size: input columns per scale.
        order: int64 ``[in]``, original column at each processing position.
        raw_hessian: ``[in, in]``, that of the layer, by which errors are told.
        hessian: ``[in, in]``, the same with something on the diagonal of columns that were never excited.
        compensation: ``[in, in]``, ``sweep.compensation_coupling`` in processing order; None: first codes by plain
            rounding.
        descent: ``[in, in]``, ``sweep.descent_coupling`` in processing order.
    """

    recipe: Recipe
    group_size: int
    order: Tensor
    raw_hessian: Tensor
    hessian: Tensor
    compensation: Tensor | None
    descent: Tensor

    @property
    def has_one_copy(self) -> bool:
        """Whether all target widths share a copy of the weight."""
        return self.recipe.compensation == "mean" or len(self.recipe.target_bits) == 1

    def solve(self, weight: Tensor) -> SolvedRows:
        """Rows ``[rows, in]`` from beginning to end, as if there were no others."""
        recipe = self.recipe
        draft = self.begin(weight)
        targets = weight.expand(len(recipe.target_bits), -1, -1)
        for _ in range(recipe.coordinate_passes):
            if recipe.refit and recipe.refit_in_loop:
                draft, _ = self.refit(targets, draft)
            draft = self.descend(targets, draft)
        errors: dict[int, Tensor] = {}
        if recipe.refit:
            draft, errors = self.refit(targets, draft)
        return self.finish(weight, draft, errors)

    def begin(self, weight: Tensor, targets: Tensor | None = None) -> Draft:
        """First scales and codes.

        Args:
            weight: ``[rows, in]``.
            targets: ``[C, rows, in]``, what each copy is to come near; by default the weight.
        """
        recipe = self.recipe
        start = search_scales(weight, self.hessian.diagonal(), self.group_size, recipe)
        scales = start.repeat(1 if self.has_one_copy else len(recipe.target_bits), 1, 1)
        if self.compensation is None:
            positions = weight / start.repeat_interleave(self.group_size, 1)
            table = shared_table(recipe.target_bits, recipe.bit_weights, weight.device)
            return Draft(round_shared(positions, table)[0], scales)
        moved = None if targets is None else self._by_column(targets - weight)
        codes = compensate(weight.T[self.order], self.compensation, self._grid(scales), moved)
        return Draft(self._restore(codes), scales)

    def refit(self, targets: Tensor, draft: Draft) -> tuple[Draft, dict[int, Tensor]]:
        """Best scales of each target width for the codes, and the output errors ``[rows]`` that they leave.

        Args:
            targets: ``[widths, rows, in]``, what each width is to come near.
            draft: if it has one copy for several widths, each gets scales of its own.
        """
        widths = self.recipe.target_bits
        scales, errors = self._refit(targets, draft.codes, draft.scales.expand(len(widths), -1, -1), widths)
        return Draft(draft.codes, scales), dict(zip(widths, errors, strict=True))

    def descend(self, targets: Tensor, draft: Draft) -> Draft:
        """A pass of coordinate descent over all columns; there must be a copy for each width."""
        current = self.values(draft)
        # One product: of a batch, PyTorch's libraries may copy the Hessian for each copy of the weight.
        slope = (targets - current).reshape(-1, current.shape[2]) @ self.hessian
        steps = slope.div_(self.hessian.diagonal()).view_as(current)
        codes = descend(self._by_column(current), self._by_column(steps), self.descent, self._grid(draft.scales))
        return Draft(self._restore(codes), draft.scales)

    def values(self, draft: Draft) -> Tensor:
        """``[C, rows, in]``, the weights that a draft with a copy for each width stands for."""
        return _levels(draft.codes, self.recipe.target_bits) * draft.scales.repeat_interleave(self.group_size, 2)

    def finish(self, weight: Tensor, draft: Draft, errors: Mapping[int, Tensor]) -> SolvedRows:
        """Scales for the widths that are no targets, and what every width does to the outputs.

        Args:
            weight: ``[rows, in]``.
            draft: of these rows.
            errors: ``{width: [rows]}`` that are known.
        """
        recipe = self.recipe
        known = dict(errors)
        if not recipe.refit or len(recipe.target_bits) == 1:
            nested = NestedWeight(draft.codes, {PARENT_BITS: draft.scales[0]})
        else:
            scales = dict(zip(recipe.target_bits, draft.scales, strict=True))
            source = scale_source(scales)
            others = tuple(bits for bits in recipe.refit_bits if bits not in scales)
            if others:
                start = torch.stack([scales[source[bits]] for bits in others])
                found = self._refit(weight.expand(len(others), -1, -1), draft.codes, start, others)
                scales.update(zip(others, found.scales, strict=True))
                known.update(zip(others, found.errors, strict=True))
            nested = NestedWeight(draft.codes, scales)
        # What the refit found holds unless dead columns gave it a Hessian that is not the layer's own.
        same = self.raw_hessian is self.hessian
        return SolvedRows(nested, output_errors(weight, nested, self.raw_hessian, known if same else {}))

    def _refit(self, targets: Tensor, codes: Tensor, scales: Tensor, widths: Sequence[int]) -> Refit:
        """Of all widths, as rows behind rows: scales ``[widths, rows, groups]`` and errors ``[widths, rows]``."""
        levels = _levels(codes, widths)
        rows = (targets.flatten(0, 1), levels.flatten(0, 1), scales.flatten(0, 1))
        found = refit_scales(*rows, self.hessian)
        return Refit(found.scales.view_as(scales), found.errors.view(scales.shape[:2]))

    def _grid(self, scales: Tensor) -> SweepGrid:
        by_group = scales.permute(2, 0, 1).contiguous()  # [groups, copies, rows]
        group_of: list[int] = (self.order // self.group_size).tolist()
        return SweepGrid(by_group, group_of, self.recipe.target_bits, self.recipe.bit_weights)

    def _restore(self, codes: Tensor) -> Tensor:
        """Codes ``[in, rows]`` in processing order back to ``[rows, in]`` in the model's order."""
        restored = torch.empty_like(codes)
        restored[self.order] = codes
        return restored.T.contiguous()

    def _by_column(self, copies: Tensor) -> Tensor:
        """``[copies, rows, in]`` as ``[in, copies * rows]`` in processing order."""
        return copies[..., self.order].permute(2, 0, 1).reshape(len(self.order), -1)


def _levels(codes: Tensor, widths: Sequence[int]) -> Tensor:
    """Centred levels, float32 ``[widths, rows, in]``."""
    return code_levels(codes, torch.stack([level_table(bits) for bits in widths]).to(codes.device))
