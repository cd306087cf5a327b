"""Slow, independent definitions that the numeric core is compared with, and random problems to compare on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

WIDTHS = range(2, 9)


def slice_code(code: int, bits: int) -> int:
    """The code divided by what is cut off, rounded half up, saturated."""
    rounded = math.floor(Fraction(code, 2 ** (8 - bits)) + Fraction(1, 2))
    return min(rounded, 2**bits - 1)


LEVELS = {
    bits: torch.tensor([slice_code(code, bits) * 2 ** (8 - bits) - 128 for code in range(256)], dtype=torch.float64)
    for bits in WIDTHS
}


def code_costs(positions: Tensor, widths: Sequence[int], weights: Tensor | Sequence[float]) -> Tensor:
    """``sum_r a_r (p_r - L_r(q))^2`` of every code, ``[256, ...]``, for positions ``[R, ...]``."""
    weights = torch.as_tensor(weights, dtype=torch.float64)
    total = torch.zeros(256, *positions.shape[1:], dtype=torch.float64)
    for position, bits, weight in zip(positions.double(), widths, weights, strict=True):
        levels = LEVELS[bits].view(256, *[1] * position.dim())
        total += weight * (position - levels).square()
    return total


def excess(costs: Tensor, codes: Tensor) -> Tensor:
    """How much worse than the best code the chosen ones are."""
    return costs.gather(0, codes.long().unsqueeze(0)).squeeze(0) - costs.amin(0)


def slice_weights(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """float64 ``[rows, in]`` weights of codes ``[rows, in]`` and scales ``[rows, groups]``."""
    group_size = codes.shape[1] // scales.shape[1]
    return LEVELS[bits][codes.long()] * scales.double().repeat_interleave(group_size, 1)


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """``(w - w_r) H (w - w_r)^T`` of each row."""
    difference = weight.double() - rounded.double()
    return ((difference @ hessian.double()) * difference).sum(-1)


def random_problem(rows: int, columns: int, seed: int = 0, samples: int | None = None) -> tuple[Tensor, Tensor]:
    """A weight ``[rows, columns]`` with a few large entries, and the Hessian of correlated inputs; both float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = 0.02 * normal(rows, columns) * (1 + 3 * (normal(rows, columns) > 2))
    mixing = torch.eye(columns, dtype=torch.float64) + normal(columns, columns) / columns**0.5
    inputs = normal(samples or 4 * columns, columns) @ (mixing * normal(columns).exp())
    return weight.float(), (2 / len(inputs) * inputs.T @ inputs).float()
