"""Orthogonal matrices that spread outliers evenly: Hadamard matrices with random signs, or random ones.

A Hadamard matrix of order n has entries +-1 and orthogonal rows, ``H H^T = n I``: each of its products is a plain mean
of all inputs with signs, so that one large value becomes n small ones. Orders built here:

    2^k                    Sylvester: Kronecker powers of [[1, 1], [1, -1]]
    q + 1                  Paley I, q prime, q = 3 mod 4      (Paley, J. Math. Phys. 12, 1933)
    2 (q + 1)              Paley II, q prime, q = 1 mod 4
    2^k times one of them  their Kronecker product
    any other              a random orthogonal matrix takes its place
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SYLVESTER_FACTOR = 64  # Kronecker factors of about this size need the fewest operations


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix ``Q = diag(signs) (F_1 kron F_2 kron ...)``, kept as its factors.

    Attributes:
        factors: float64 orthogonal ``[n_i, n_i]``, the product of all n_i is n.
        signs: float64, +1 and -1, ``[n]`` or ``[..., n]`` for a batch of matrices that differ in their signs.
    """

    factors: tuple[Tensor, ...]
    signs: Tensor

    def apply(self, rows: Tensor) -> Tensor:
        """``rows Q`` in float64.

        Args:
            rows: ``[..., n]``, leading dimensions broadcast with those of ``signs``; any float dtype and device.
        """
        rows = rows.to(torch.float64) * self.signs.to(rows.device)
        shape = rows.shape
        for factor in self.factors:
            # The foremost of the remaining factors meets its digit of the index, which then moves to the end.
            rows = rows.reshape(*shape[:-1], len(factor), -1).transpose(-1, -2) @ factor.to(rows.device)
        return rows.reshape(shape)


def make_factors(order: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Orthogonal matrices, float64, whose Kronecker product has this order: Hadamard where one is known."""
    known = hadamard_factors(order)
    if known is not None:
        return tuple(factor / len(factor) ** 0.5 for factor in known)
    normal = torch.randn(order, order, generator=generator, dtype=torch.float64)
    orthogonal, triangular = torch.linalg.qr(normal)
    return (orthogonal * triangular.diagonal().sign(),)  # the signs make it uniform over all orthogonal matrices


def random_signs(*shape: int, generator: torch.Generator) -> Tensor:
    """float64 +1 and -1."""
    return torch.randint(2, shape, generator=generator).to(torch.float64) * 2 - 1


def hadamard_factors(order: int) -> tuple[Tensor, ...] | None:
    """Hadamard matrices, float64 entries +-1, whose Kronecker product has this order; None where none is known."""
    twos = (order & -order).bit_length() - 1
    for power in range(twos, -1, -1):  # as much Sylvester as possible: it has the smallest factors
        rest = _paley(order >> power)
        if rest is not None:
            return (*_sylvester(1 << power), *([rest] if len(rest) > 1 else []))
    return None


def _sylvester(order: int) -> tuple[Tensor, ...]:
    """Factors of at most ``_SYLVESTER_FACTOR``; none for order 1."""
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    factors = []
    while order > 1:
        factor = torch.ones(1, 1, dtype=torch.float64)
        while len(factor) < min(order, _SYLVESTER_FACTOR):
            factor = torch.kron(factor, pair)
        factors.append(factor)
        order //= len(factor)
    return tuple(factors)


def _paley(order: int) -> Tensor | None:
    """The matrix of either of Paley's constructions, or of order 1."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if _is_prime(order - 1) and order % 4 == 0:
        return _conference(order - 1, skew=True) + torch.eye(order, dtype=torch.float64)
    if order % 4 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        conference = _conference(order // 2 - 1, skew=False)
        on_signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        on_zeros = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, on_signs) + torch.kron(torch.eye(order // 2, dtype=torch.float64), on_zeros)
    return None


def _conference(prime: int, *, skew: bool) -> Tensor:
    """``[q + 1, q + 1]`` with zero diagonal and ``C C^T = q I``: quadratic residues of differences, and a border."""
    numbers = torch.arange(prime)
    residues = torch.full((prime,), -1.0, dtype=torch.float64)
    residues[numbers**2 % prime] = 1
    residues[0] = 0
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    matrix[1:, 1:] = residues[(numbers[:, None] - numbers) % prime]
    matrix[0, 0] = 0
    if skew:
        matrix[1:, 0] = -1
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
