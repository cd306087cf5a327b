"""The layer Hessian: accumulation, dead columns, damping and the factor that GPTQ's compensation reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Each step adds ten times the damping of the one before; past the last, the layer is rounded to nearest.
DAMPING_STEPS = 4


def accumulate_hessian(total: Tensor, inputs: Tensor, weight: float = 1.0, row_weights: Tensor | None = None) -> None:
    """Add ``weight * X^T diag(row_weights) X`` to ``total`` in place.

    Args:
        total: float32 or float64 ``[in, in]`` running sum.
        inputs: ``[..., in]`` activations of any float dtype; products are formed in ``total``'s dtype, because a
            sum of tens of thousands of bfloat16 products would lose the small eigenvalues.
        weight: of all these rows.
        row_weights: one more weight for each row, not negative; None for ones.
    """
    rows = inputs.reshape(-1, inputs.shape[-1]).to(total.dtype)
    if row_weights is not None:
        # The root on both sides: whatever a product rounds its factors to, the sum is positive semidefinite.
        rows = rows * row_weights.reshape(-1, 1).to(total).sqrt()
    total.addmm_(rows.T, rows, alpha=weight)


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


def factorize(matrix: Tensor, damping: float) -> Factor | None:
    """Factor the inverse of the damped Hessian, raising the damping in steps when it is not positive definite.

    ``H = L^T L`` with L lower triangular (a Cholesky factorization of the matrix read backwards) gives
    ``U = L^-T`` turned upper: one factorization and one triangular inverse instead of the usual
    factor-invert-factor, and no loss from forming the inverse. Done in float64.

    Args:
        matrix: ``[in, in]`` symmetric.
        damping: fraction of the mean diagonal added to the diagonal.

    Returns:
        The factor in float32, or None when even the largest damping did not help (then round to nearest).
    """
    working = matrix.to(torch.float64)
    mean_diagonal = working.diagonal().mean()
    if not bool(torch.isfinite(working).all()) or not bool(mean_diagonal > 0):
        return None
    tried = damping
    for step in range(DAMPING_STEPS + 1):
        damped = working.clone()
        damped.diagonal().add_(tried * mean_diagonal)
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) == 0:
            # flip(L) is upper with H = flip(L) flip(L)^T, hence H^-1 = U^T U for U = flip(L)^-1.
            identity = torch.eye(len(working), dtype=torch.float64, device=working.device)
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            if bool(torch.isfinite(upper).all()):
                return Factor(upper.to(torch.float32), tried, step)
        tried = max(tried * 10, 1e-4)
    return None
