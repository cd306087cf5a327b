"""Cholesky factor and inverse in panels, against LAPACK."""

from __future__ import annotations

import pytest
import torch
from brute_force import random_problem
from summed_hessian import accumulate_hessian

from matgptq.core.hessian import factorize
from matgptq.core.triangular import PANEL, factorize_lower, invert_lower, panels
from matgptq.machine.workers import INLINE, Workers

SIZES = [1, 2, 17, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL, 2 * PANEL + 88]


@pytest.fixture(scope="module")
def workers():
    made = Workers(3)
    yield made
    made.close()


def positive(size: int) -> torch.Tensor:
    rows = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return rows.T @ rows / size


@pytest.mark.parametrize("size", SIZES)
def test_factor_and_inverse_are_lapacks(size, workers):
    matrix = positive(size)
    expected = torch.linalg.cholesky(matrix)
    lower = matrix.clone()
    assert factorize_lower(lower, workers)
    torch.testing.assert_close(lower.tril(), expected, rtol=1e-9, atol=1e-9)
    inverse = invert_lower(lower, workers)
    assert inverse.dtype == torch.float32
    assert torch.equal(inverse, inverse.tril())
    torch.testing.assert_close(inverse.double(), torch.linalg.inv(expected), rtol=1e-4, atol=1e-5)


def test_only_the_lower_triangle_is_read(workers):
    matrix = positive(PANEL + 30)
    spoiled = matrix.tril() + torch.full_like(matrix, torch.nan).triu(1)
    assert factorize_lower(matrix, workers)
    # cholesky_ex itself looks at no more than a triangle, but a product with what is above would spread the NaN.
    assert factorize_lower(spoiled, workers)
    assert torch.equal(matrix.tril(), spoiled.tril())
    assert torch.equal(invert_lower(matrix, workers), invert_lower(spoiled, workers))


@pytest.mark.parametrize("place", [0, PANEL - 1, PANEL, 2 * PANEL + 5])
def test_a_matrix_that_is_not_definite_is_found_in_any_panel(place, workers):
    matrix = positive(2 * PANEL + 6)
    matrix[place, place] = -1.0
    assert not factorize_lower(matrix, workers)


@pytest.mark.parametrize("size", [40, PANEL + 44, 3 * PANEL])
def test_the_factor_does_not_depend_on_the_workers(size, workers):
    _, hessian = random_problem(1, size)
    assert torch.equal(factorize(hessian, 0.01, workers).upper, factorize(hessian, 0.01, INLINE).upper)


@pytest.mark.parametrize("size", [PANEL - 1, PANEL + 1, 2 * PANEL + 60])
def test_tiles_make_the_whole_hessian(size):
    rows = torch.randn(100, size, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(size, size, dtype=torch.float64)
    accumulate_hessian(total, rows[:50])
    accumulate_hessian(total, rows[50:], 2.0)
    assert torch.equal(total, total.T)
    expected = rows[:50].double().T @ rows[:50].double() + 2 * rows[50:].double().T @ rows[50:].double()
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("first", "stop", "count"), [(0, 0, 0), (0, 1, 1), (5, 5 + PANEL, 1), (PANEL, 3 * PANEL + 1, 3)]
)
def test_panels_cover_everything_once(first, stop, count):
    found = panels(first, stop)
    assert len(found) == count
    assert [number for panel in found for number in range(panel.start, panel.stop)] == [*range(first, stop)]
