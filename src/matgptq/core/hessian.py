"""The layer Hessian: its tiles, dead columns, damping and the factor that GPTQ's compensation reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matgptq import native
from matgptq.core.finiteness import all_finite
from matgptq.core.solver_engine import engine
from matgptq.core.triangular import factorize_lower, invert_lower, panels
from matgptq.machine.workers import INLINE, Workers

# Each step adds ten times the damping of the one before; past the last, the layer is rounded to nearest.
DAMPING_STEPS = 4


def hessian_rows(inputs: Tensor, row_weights: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[rows, in]`` X whose ``X^T X`` the inputs add to a Hessian.

    Args:
        inputs: ``[..., in]`` activations of any float dtype.
        row_weights: a weight for each row, not negative; None for ones.
        dtype: of the result and of products, because a sum of tens of thousands of bfloat16 products would lose the
            small eigenvalues.
    """
    rows = inputs.reshape(-1, inputs.shape[-1]).to(dtype)
    if row_weights is not None:
        # The root on both sides: whatever a product rounds its factors to, the sum is positive semidefinite.
        rows = rows * row_weights.reshape(-1, 1).to(rows).sqrt()
    return rows


def hessian_tiles(total: Tensor) -> list[slice]:
    """Rows of a Hessian that are summed on their own; a GPU likes one product best."""
    return panels(0, len(total)) if total.device.type == "cpu" else [slice(0, len(total))]


def add_to_tile(total: Tensor, tile: slice, rows: Tensor, weight: float = 1.0) -> None:
    """Add ``weight * X^T X`` to some rows of ``total`` in place, as far as they are on and below the diagonal."""
    product = rows[:, tile].T @ rows[:, : tile.stop]
    total[tile, : tile.stop].add_(product.to(total.device), alpha=weight)


def mirror(total: Tensor) -> None:
    """Complete a Hessian whose tiles have been summed; not every library's ``X^T X`` is symmetric to the last bit."""
    for tile in hessian_tiles(total):
        total[: tile.start, tile] = total[tile, : tile.start].T
        own = total[tile, tile].tril()
        total[tile, tile] = own + own.tril(-1).T


def quadratic_forms(rows: Tensor, hessian: Tensor) -> Tensor:
    """``x H x^T`` of each row x of ``[rows, in]``, float32 ``[rows]``, by half of the products: H is symmetric."""
    if engine(rows) == "native":
        return native.quadratic_forms(rows, hessian)
    total = torch.zeros(len(rows), device=rows.device)
    for tile in hessian_tiles(hessian):
        own = rows[:, tile]
        pulled = own @ hessian[tile, tile]
        if tile.start:
            pulled.addmm_(rows[:, : tile.start], hessian[: tile.start, tile], alpha=2)
        total += pulled.mul_(own).sum(-1)
    return total


@dataclass(frozen=True)
class PreparedHessian:
    """A Hessian ready for the solver.

    Attributes:
        matrix: ``[in, in]`` float32, symmetric, with a positive diagonal (dead columns get a harmless one).
        dead: bool ``[in]``, input columns that never saw a non-zero activation.
    """

    matrix: Tensor
    dead: Tensor


def prepare_hessian(matrix: Tensor) -> PreparedHessian:
    """Give dead columns a unit of their own, so that they are rounded to nearest and disturb nothing.

    GPTQ sets the weights of such columns to zero; we keep them, since a calibration set that never excites an input
    does not prove that the input is never used.
    """
    matrix = matrix.to(torch.float32).clone()
    diagonal = matrix.diagonal()
    dead = ~(diagonal > 0)
    if bool(dead.any()):
        alive_mean = diagonal[~dead].mean() if bool((~dead).any()) else torch.ones((), device=matrix.device)
        matrix[dead, :] = 0
        matrix[:, dead] = 0
        matrix.diagonal()[dead] = alive_mean
    return PreparedHessian(matrix, dead)


@dataclass(frozen=True)
class Factor:
    """Upper triangular ``U`` with ``U^T U = (H + damping * mean(diag H) * I)^-1``, and the damping it took."""

    upper: Tensor
    damping: float
    steps: int


def factorize(matrix: Tensor, damping: float, workers: Workers = INLINE) -> Factor | None:
    """Factor the inverse of the damped Hessian, raising the damping in steps when it is not positive definite.

    ``H = L^T L`` with L lower triangular (a Cholesky factorization of the matrix read backwards) gives ``U = L^-T``
    turned upper: one factorization and one triangular inverse instead of the usual factor-invert-factor, and no loss
    from forming the inverse. Done in float64.

    Args:
        matrix: ``[in, in]`` symmetric.
        damping: fraction of the mean diagonal added to the diagonal.
        workers: among which the work is shared out.

    Returns:
        The factor in float32, or None when even the largest damping did not help (then round to nearest).
    """
    mean_diagonal = matrix.diagonal().double().mean()
    if not all_finite(matrix) or not bool(mean_diagonal > 0):
        return None
    tried = damping
    for step in range(DAMPING_STEPS + 1):
        backwards = matrix.flip(0, 1).to(torch.float64)
        backwards.diagonal().add_(tried * mean_diagonal)
        inverse = _inverse_factor(backwards, workers)
        if inverse is not None and all_finite(inverse):
            # H = flip(L) flip(L)^T, hence H^-1 = U^T U for U = flip(L)^-1 = flip(L^-1), which is upper.
            return Factor(inverse.flip(0, 1), tried, step)
        tried = max(tried * 10, 1e-4)
    return None


def _inverse_factor(matrix: Tensor, workers: Workers) -> Tensor | None:
    """float32 ``L^-1`` of a float64 matrix ``L L^T``, which is overwritten; None if it is not positive definite."""
    if matrix.device.type == "cpu":
        return invert_lower(matrix, workers) if factorize_lower(matrix, workers) else None
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return None
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.to(torch.float32)
