"""Rows whose errors act together: a sweep over them as over columns, then passes in which each sees all others.

The rows of a block of an output Hessian G come by descending diagonal. In the sweep, what is left of each width's copy
of some rows moves that width's targets of the rows behind them, as a column's residual moves the columns behind it. In
a pass of coordinate descent the rows of a part B meet the targets that are best for them while all others stay what
they are, ``W_B + G_BB^-1 G_BR (W_R - w_R)``. Either way some rows are worked on side by side, which do not move each
other; those of a pass are chosen so that G hardly joins them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from matgptq.core.output_hessian import DampedOutputs, OutputHessian, damp_outputs, loosely_joined
from matgptq.core.row_problem import Draft, RowProblem, SolvedRows, stack_drafts, stack_rows
from matgptq.machine.workers import Workers

# Rows of a block that are worked on side by side: few lose little, and many leave more to do at once.
_ROWS, _STEPS, _STEPS_ON_GPU = 32, 16, 8
_PIECES = 4  # of at least so many rows, into which these are cut for threads
_COLUMNS = 1024  # of all copies, in which a thread moves rows
_FINISHED = 128  # that are finished at a time on a CPU
MOVED_ELEMENTS = 1 << 26  # floats by which the rows of some blocks are moved; one block is always solved


def solve_joined(problem: RowProblem, weight: Tensor, outputs: OutputHessian, workers: Workers) -> SolvedRows:
    """Solve rows together.

    Args:
        problem: with a copy of the weight for each width.
        weight: ``[rows, in]``.
        outputs: the Hessian of those rows.
        workers: that share the work.
    """
    matrix = outputs.matrix.to(weight.device)
    ranks = matrix.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    rows = outputs.rows().to(weight.device).gather(1, ranks)
    dampings = outputs.dampings(problem.recipe.output_damping)

    def finish(piece: tuple[Tensor, Draft]) -> SolvedRows:
        with torch.no_grad():
            return problem.finish(*piece, {})

    of_a_block = matrix.shape[1] * len(problem.recipe.target_bits) * weight.shape[1]
    solved: list[SolvedRows] = []
    for some in torch.split(torch.arange(len(matrix)), max(1, MOVED_ELEMENTS // of_a_block)):
        ordered = torch.stack([matrix[block][ranks[block].unsqueeze(1), ranks[block]] for block in some])
        own = weight[rows[some].flatten()]
        draft = _Blocks(problem, own, damp_outputs(ordered, dampings[some], workers), workers).solve()
        at_a_time = _FINISHED if weight.device.type == "cpu" else len(own)
        pieces = zip(torch.split(own, at_a_time), draft.split(at_a_time), strict=True)
        solved += workers.map(finish, pieces)
    return stack_rows(solved).select(rows.flatten().argsort())


class _Blocks:
    """Rows of some blocks ``[blocks, size]``, in the order of their output Hessians."""

    def __init__(self, problem: RowProblem, weight: Tensor, outputs: DampedOutputs, workers: Workers) -> None:
        self._problem, self._weight, self._outputs, self._workers = problem, weight, outputs, workers
        self._blocks, self._size = outputs.matrix.shape[:2]
        self._copies, self._columns = len(problem.recipe.target_bits), weight.shape[1]
        on_cpu = weight.device.type == "cpu"
        steps = _STEPS if on_cpu else _STEPS_ON_GPU
        self._step = _ROWS * max(1, -(-self._size // (_ROWS * steps)))
        self._together = max(_ROWS, -(-self._step // _PIECES)) if on_cpu else self._blocks * self._step
        self._first_of_block = torch.arange(self._blocks, device=weight.device).unsqueeze(1) * self._size
        # Of rows that are solved, what is left of each copy; in the sweep, by what the others are moved until then.
        self._left = weight.new_zeros(self._blocks, self._size, self._copies * self._columns)

    @torch.no_grad()
    def solve(self) -> Draft:
        """Codes and scales of all rows."""
        passes = self._problem.recipe.coordinate_passes
        draft = self._sweep(refit=self._refits(last=passes == 0))
        if passes:
            parts = [loosely_joined(matrix, self._step) for matrix in self._outputs.matrix]
            order = torch.stack(parts).to(self._weight.device)
            visits = [(numbers, self._pull(numbers)) for numbers in torch.split(order, self._step, 1)]
            for number in range(passes):
                self._descend(draft, visits, refit=self._refits(last=number == passes - 1))
        return draft

    def _refits(self, *, last: bool) -> bool:
        recipe = self._problem.recipe
        return recipe.refit and (recipe.refit_in_loop or last)

    def _sweep(self, *, refit: bool) -> Draft:
        """Each row once, moved by what is left of those before it."""
        problem = self._problem

        def begin(own: Tensor, moved: Tensor, _: Tensor) -> tuple[Draft, Tensor]:
            targets = own + moved
            draft = problem.begin(own, targets)
            if refit:
                draft = problem.refit(targets, draft)[0]
            return draft, targets - problem.values(draft)

        upper, drafts, places = self._outputs.upper, [], []
        for first in range(0, self._size, self._step):
            part = slice(first, min(first + self._step, self._size))
            behind = slice(part.stop, self._size)
            index = (torch.arange(part.start, part.stop, device=self._weight.device) + self._first_of_block).flatten()
            moved = self._left[:, part].clone()
            draft, left = self._in_pieces(begin, index, moved)
            drafts.append(draft)
            places.append(index)
            self._left[:, part] = left - moved
            if behind.start == behind.stop:
                continue
            passed = torch.linalg.solve_triangular(upper[:, part, part].mT, left, upper=False)
            pull = upper[:, part, behind].mT

            def move(some: slice, pull: Tensor = pull, passed: Tensor = passed, behind: slice = behind) -> None:
                with torch.no_grad():
                    self._left[:, behind, some] -= pull @ passed[..., some]

            self._by_columns(move)
        return stack_drafts(drafts).select(torch.cat(places).argsort())

    def _descend(self, draft: Draft, visits: Sequence[tuple[Tensor, Tensor]], *, refit: bool) -> None:
        """Better a draft by one pass over all rows.

        Args:
            draft: is changed in place.
            visits: numbers of some rows ``[blocks, n]``, and how all others pull them, ``_pull``.
            refit: whether scales follow.
        """
        problem = self._problem

        def better(own: Tensor, moved: Tensor, index: Tensor) -> tuple[Draft, Tensor]:
            targets = own + moved
            found = problem.descend(targets, draft.select(index))
            if refit:
                found = problem.refit(targets, found)[0]
            return found, own - problem.values(found)

        flat = self._left.flatten(0, 1)
        for numbers, pull in visits:
            moved = self._left.new_empty(*pull.shape[:2], self._left.shape[2])

            def move(some: slice, pull: Tensor = pull, moved: Tensor = moved) -> None:
                with torch.no_grad():
                    torch.matmul(pull, self._left[..., some], out=moved[..., some])

            self._by_columns(move)
            index = (numbers + self._first_of_block).flatten()
            found, left = self._in_pieces(better, index, moved)
            draft.codes[index] = found.codes
            draft.scales[:, index] = found.scales
            flat[index] = left.flatten(0, 1)

    def _pull(self, numbers: Tensor) -> Tensor:
        """``G_BB^-1 G_BR`` of rows B ``[blocks, step]`` of each block, ``[blocks, step, size]``, zero at B."""
        pulls = []
        for matrix, rows in zip(self._outputs.matrix, numbers, strict=True):
            others = matrix[rows]
            own = others[:, rows]
            others[:, rows] = 0
            pulls.append(torch.linalg.inv(own) @ others)
        return torch.stack(pulls)

    def _in_pieces(
        self, work: Callable[[Tensor, Tensor, Tensor], tuple[Draft, Tensor]], index: Tensor, moved: Tensor
    ) -> tuple[Draft, Tensor]:
        """Work on rows by their numbers, moved by ``[blocks, n, copies * in]``; gives a draft and as large a tensor."""

        def piece(given: tuple[Tensor, Tensor]) -> tuple[Draft, Tensor]:
            index, moved = given
            with torch.no_grad():
                by_copy = moved.view(len(index), self._copies, self._columns).transpose(0, 1)
                draft, left = work(self._weight[index], by_copy, index)
                return draft, left.transpose(0, 1).reshape(len(index), -1)

        pieces = zip(torch.split(index, self._together), torch.split(moved.flatten(0, 1), self._together), strict=True)
        done = [*self._workers.map(piece, pieces)]
        return stack_drafts([draft for draft, _ in done]), torch.cat([left for _, left in done]).view_as(moved)

    def _by_columns(self, move: Callable[[slice], None]) -> None:
        width = self._left.shape[2]
        self._workers.run(move, [slice(at, min(at + _COLUMNS, width)) for at in range(0, width, _COLUMNS)])
