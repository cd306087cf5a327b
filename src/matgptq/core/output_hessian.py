"""The Hessian of outputs: which rows' errors the model's predictions see together, and how what is left is passed on.

To second order a change D of a weight W costs ``sum_t (g_t . D x_t)^2``, with ``g_t`` the gradient in the outputs at
token t. With a mean of ``g_t g_t^T`` beside that of ``x_t x_t^T``, as in K-FAC (arXiv 1503.05671) and YAQA
(arXiv 2505.22988), this is ``trace(G D H D^T)``. G joins the rows of W: without it each is rounded as if the errors of
the others did not exist. It plays H's part for rows: with ``U^T U = G^-1``, what is left of the rows that are rounded
moves the targets of those that are not, ``W_k -= U_ik (W_i - w_i) / U_ii`` for k > i, and a row's own problem stays
what it was.

Layers that share an input are one weight. If that has too many rows, each of its layers is cut into as many equal
parts, and part i of all of them makes a block on G's diagonal: query heads with their key and value heads, neurons of a
gate with the same ones behind it. The rest of G counts as zero.

G is a mean over tokens, of which few may have most of the weight: what it says beyond their number is noise, and rows
that are joined by noise get worse. So its diagonal is raised as much as Ledoit and Wolf's shrinkage asks for (A
well-conditioned estimator for large-dimensional covariance matrices, 2004): with ``G = sum_t x_t x_t^T``, ``q = sum_t
|x_t|^4`` of many tokens and m the mean of the diagonal, the best mixture ``(1 - rho) G + rho m I`` has ``rho = q /
|G - m I|^2``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from matgptq.core.hessian import add_to_tile, factorize, hessian_tiles, mirror
from matgptq.machine.workers import INLINE, Workers

_FOURTH_POWERS = "fourth_powers"
_MOST_DAMPING = 1e3  # of a matrix that says nothing: it joins nothing then


@dataclass(frozen=True)
class OutputHessian:
    """That of layers that share an input.

    Attributes:
        layers: ``{name: rows}``, in the order in which they are stacked.
        matrix: float32 ``[blocks, size, size]``.
        fourth_powers: float64 ``[blocks]``, those of the norms of the vectors whose products are summed, by which it is
            known how far to trust the matrix; None for one that needs no doubt.
    """

    layers: dict[str, int]
    matrix: Tensor
    fourth_powers: Tensor | None = None

    @classmethod
    def empty(cls, layers: dict[str, int], most: int, memory: Tensor | None = None) -> OutputHessian:
        """A sum of nothing, of blocks of at most so many rows.

        Args:
            layers: see above.
            most: rows of a block.
            memory: float32 zeros ``[at least as many]`` to sum in.
        """
        parts = count_parts([*layers.values()], most)
        shape = (parts, sum(layers.values()) // parts, sum(layers.values()) // parts)
        matrix = torch.zeros(shape) if memory is None else memory[: math.prod(shape)].view(shape)
        return cls(layers, matrix, torch.zeros(parts, dtype=torch.float64))

    @classmethod
    def of_tensors(cls, layers: dict[str, int], read: Callable[[str], Tensor]) -> OutputHessian:
        """As it was kept: what reads a tensor is given a name that ``tensors`` has."""
        name = next(iter(layers))
        return cls(layers, read(name), read(f"{name}.{_FOURTH_POWERS}"))

    @property
    def name(self) -> str:
        """That of the first layer."""
        return next(iter(self.layers))

    def add(self, windows: Sequence[Sequence[Tensor]], exponent: float, workers: Workers = INLINE) -> None:
        """Add what some windows say, on and below the diagonals: ``sum_t x_t x_t^T``, and ``sum_t |x_t|^4``.

        The sums are cut in tiles, and every tile adds the windows in their order: the result depends neither on the
        number of threads nor on how many windows are given at a time.

        Args:
            windows: of each the gradients ``[tokens, rows]`` of all layers, of any float dtype. bfloat16 ones are
                multiplied as such: a window's products are rounded to it, their sums are not.
            exponent: x is ``|g|^(exponent/2 - 1) g``, so that a token counts as the norm of its gradient to this power:
                2 for the Fisher information itself, as ``saliency.token_weights`` weighs tokens in the other Hessian.
            workers: among which the work is shared out.
        """
        assert self.fourth_powers is not None
        weigh = partial(_weighed, parts=len(self.matrix), exponent=exponent)
        weighed = [*workers.map(weigh, windows)]
        for each in weighed:
            self.fourth_powers.add_(each.fourth_powers.to(self.fourth_powers.device))

        def add_to(place: tuple[int, slice]) -> None:
            part, tile = place
            with torch.no_grad():
                for each in weighed:
                    add_to_tile(self.matrix[part], tile, each.rows[:, part])

        tiles = [*reversed(hessian_tiles(self.matrix[0]))]  # the longest first
        workers.run(add_to, [(part, tile) for part in range(len(self.matrix)) for tile in tiles])

    def tensors(self) -> dict[str, Tensor]:
        """What is summed, by the name under which it is kept."""
        assert self.fourth_powers is not None
        return {self.name: self.matrix, f"{self.name}.{_FOURTH_POWERS}": self.fourth_powers}

    def complete(self) -> None:
        """Fill what is above the diagonals; to be done once, when everything is added."""
        for block in self.matrix:
            mirror(block)

    def divide_outputs(self, name: str, factors: Tensor) -> None:
        """Make it that of other outputs: the last of a layer's are divided by ``factors``, ``[n]``."""
        of_layers = [torch.ones(rows) for rows in self.layers.values()]
        of_layers[[*self.layers].index(name)][-len(factors) :] = factors.cpu()
        of_rows = by_block(of_layers, len(self.matrix)).to(self.matrix.device)
        before = self._traces()
        self.matrix.mul_(of_rows.unsqueeze(2)).mul_(of_rows.unsqueeze(1))
        if self.fourth_powers is not None:  # as if all norms had grown alike
            grown = torch.where(before > 0, self._traces() / before, 1.0)
            self.fourth_powers.mul_(grown.square().to(self.fourth_powers.device))

    def dampings(self, least: float) -> Tensor:
        """float32 ``[blocks]``, what to add to each block's diagonal as a fraction of its mean: ``rho / (1 - rho)``.

        Args:
            least: never less than this.
        """
        found = torch.full((len(self.matrix),), least)
        if self.fourth_powers is None:
            return found
        # Row by row in float32: a whole block would be large in float64.
        squares = torch.stack([torch.linalg.vecdot(block, block).double().sum() for block in self.matrix])
        spread = squares - self._traces().square() / self.matrix.shape[1]
        noise = self.fourth_powers.to(spread.device)
        asked = torch.where(noise < spread, noise / (spread - noise), _MOST_DAMPING).clamp(max=_MOST_DAMPING)
        return torch.maximum(found, asked.float().cpu())

    def rows(self) -> Tensor:
        """int64 ``[blocks, size]``, which row of the stacked layers stands where."""
        ends = [*accumulate(self.layers.values())]
        of_layers = [torch.arange(end - rows, end) for end, rows in zip(ends, self.layers.values(), strict=True)]
        return by_block(of_layers, len(self.matrix)).to(self.matrix.device)

    def _traces(self) -> Tensor:
        return self.matrix.diagonal(dim1=1, dim2=2).double().sum(1)


def summed_tensors(hessians: Iterable[OutputHessian]) -> dict[str, Tensor]:
    """All that is summed of some, by the names under which it is kept."""
    return {name: tensor for each in hessians for name, tensor in each.tensors().items()}


def count_parts(rows: Sequence[int], most: int) -> int:
    """Into how many equal parts layers of so many rows are cut, so that a part of each are at most ``most`` together.

    If no number does, the largest that divides all of them.
    """
    divided = math.gcd(*rows)
    fewest = -(-sum(rows) // max(most, 1))
    return next((parts for parts in range(max(fewest, 1), divided + 1) if divided % parts == 0), divided)


def matrix_bytes(rows: Sequence[int], most: int) -> int:
    """What the output Hessian of layers of so many rows takes, in blocks of at most ``most``."""
    return 4 * sum(rows) ** 2 // count_parts(rows, most)


def by_block(of_layers: Sequence[Tensor], parts: int) -> Tensor:
    """``[rows, ...]`` of each layer as ``[parts, rows of a block, ...]``."""
    return torch.cat([each.view(parts, len(each) // parts, *each.shape[1:]) for each in of_layers], 1)


class _Weighed(NamedTuple):
    """What a window says: x of each token ``[tokens, parts, size]``, and float64 ``[parts]``, ``sum_t |x_t|^4``."""

    rows: Tensor
    fourth_powers: Tensor


def _weighed(gradients: Sequence[Tensor], parts: int, exponent: float) -> _Weighed:
    rows = torch.cat([each.view(len(each), parts, -1) for each in gradients], 2)
    dtype = torch.bfloat16 if rows.dtype == torch.bfloat16 else torch.float32
    rows = rows.float()
    norms = rows.flatten(1).norm(dim=1)
    rows *= torch.where(norms > 0, norms ** (exponent / 2 - 1), 0.0).view(-1, 1, 1)
    return _Weighed(rows.to(dtype), rows.square().sum(2).double().square().sum(0))


@dataclass(frozen=True)
class DampedOutputs:
    """Blocks ``[blocks, size, size]`` of G with something added to their diagonals, and the factors of their inverses.

    Attributes:
        matrix: ``G + damping mean(diag G) I``.
        upper: U, upper triangular, ``U^T U`` the inverse of that.
    """

    matrix: Tensor
    upper: Tensor


def damp_outputs(matrix: Tensor, dampings: Tensor, workers: Workers = INLINE) -> DampedOutputs:
    """Make blocks of an output Hessian positive definite.

    Args:
        matrix: ``[blocks, size, size]``, symmetric.
        dampings: ``[blocks]``, as fractions of the mean of a block's diagonal.
        workers: among which the work is shared out.

    Returns:
        float32; two unit matrices, which join nothing, for a block that is zero or not finite.
    """
    damped = torch.eye(matrix.shape[1], device=matrix.device).repeat(len(matrix), 1, 1)
    upper = damped.clone()
    for number, (block, damping) in enumerate(zip(matrix, dampings.tolist(), strict=True)):
        factor = factorize(block, damping, workers)
        if factor is not None:
            damped[number] = block
            damped[number].diagonal().add_(factor.damping * block.diagonal().mean())
            upper[number] = factor.upper
    return DampedOutputs(damped, upper)


def loosely_joined(matrix: Tensor, size: int) -> Tensor:
    """Rows in an order in which those of a stretch of ``size`` are hardly joined with one another.

    One after the other, by descending diagonal, each goes where the squares of its correlations with those that are
    there add up to least.

    Args:
        matrix: ``[rows, rows]``, symmetric with a positive diagonal.
        size: of all stretches but the last, which has the rest.

    Returns:
        int64 ``[rows]`` on the CPU.
    """
    rows = len(matrix)
    matrix = matrix.cpu()
    diagonal = matrix.diagonal()
    squares = matrix.square() / diagonal / diagonal.unsqueeze(1)
    stretches = -(-rows // size)
    room = [size] * (stretches - 1) + [rows - size * (stretches - 1)]
    joined = torch.zeros(stretches, rows)
    taken: list[list[int]] = [[] for _ in room]
    for row in diagonal.argsort(descending=True, stable=True).tolist():
        chosen = int(joined[:, row].argmin())
        taken[chosen].append(row)
        if len(taken[chosen]) < room[chosen]:
            joined[chosen] += squares[row]
        else:
            joined[chosen] = torch.inf
    return torch.tensor([row for stretch in taken for row in stretch])
