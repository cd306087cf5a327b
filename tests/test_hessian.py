"""The layer Hessian: sums, dead columns, damping, the factor."""

from __future__ import annotations

import pytest
import torch
from brute_force import random_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from summed_hessian import accumulate_hessian

from matgptq.core.finiteness import all_finite
from matgptq.core.hessian import DAMPING_STEPS, factorize, prepare_hessian, quadratic_forms


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found_anywhere(bad):
    assert all_finite(torch.zeros(0, 3))
    for place in range(12):
        matrix = normal(3, 4)
        assert all_finite(matrix)
        matrix.view(-1)[place] = bad
        assert not all_finite(matrix)


@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (1, 1), (5, 255), (4, 256), (3, 257), (7, 700)])
def test_quadratic_forms(rows, columns):
    x, other = normal(rows, columns), normal(columns + 9, columns, seed=1)
    hessian = other.T @ other
    expected = ((x.double() @ hessian.double()) * x.double()).sum(-1)
    torch.testing.assert_close(quadratic_forms(x, hessian).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(50, 7), (2, 25, 7), (7,)])
def test_accumulates_the_sum_of_outer_products(dtype, shape):
    inputs = normal(*shape, dtype=dtype)
    rows = inputs.double().view(-1, 7)
    for total_dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        total = torch.zeros(7, 7, dtype=total_dtype)
        accumulate_hessian(total, inputs)
        accumulate_hessian(total, inputs, weight=0.25)
        torch.testing.assert_close(total.double(), 1.25 * rows.T @ rows, rtol=tolerance, atol=tolerance)


def test_accumulates_one_row_after_the_other():
    inputs = normal(40, 5)
    whole, parts = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.float64)
    accumulate_hessian(whole, inputs)
    for part in inputs.split(7):
        accumulate_hessian(parts, part)
    torch.testing.assert_close(parts, whole)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(columns=st.integers(1, 40), damping=st.floats(1e-3, 1), seed=st.integers(0, 100))
def test_factor_of_the_damped_inverse(columns, damping, seed):
    _, hessian = random_problem(1, columns, seed)
    factor = factorize(hessian, damping)
    assert (factor.damping, factor.steps) == (damping, 0)
    assert factor.upper.dtype == torch.float32
    assert torch.equal(factor.upper, factor.upper.triu())
    assert (factor.upper.diagonal() > 0).all()
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(columns)
    upper = factor.upper.double()
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(columns).double(), rtol=0, atol=1e-3)


def test_no_damping_is_needed_for_a_definite_hessian():
    _, hessian = random_problem(1, 12)
    factor = factorize(hessian, 0.0)
    assert (factor.damping, factor.steps) == (0.0, 0)
    upper = factor.upper.double()
    torch.testing.assert_close(upper.T @ upper @ hessian.double(), torch.eye(12).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("lowest", "damping", "expected", "steps"),
    [
        (-0.00005, 0.0, 1e-4, 1),
        (-0.05, 0.01, 0.1, 1),
        (-0.5, 0.01, 1.0, 2),
        (-3.0, 0.01, 10.0, 3),
        (-5.0, 0.01, 100.0, 4),
    ],
)
def test_damping_is_raised_in_steps(lowest, damping, expected, steps):
    rotation = torch.linalg.qr(normal(10, 10, dtype=torch.float64)).Q
    eigenvalues = torch.ones(10, dtype=torch.float64)
    eigenvalues[0] = lowest
    factor = factorize(rotation @ torch.diag(eigenvalues) @ rotation.T, damping)
    assert factor.damping == pytest.approx(expected)
    assert factor.steps == steps


def test_gives_up_on_what_no_damping_helps():
    hopeless = torch.eye(4)
    hopeless[0, 1] = hopeless[1, 0] = 1e4
    assert factorize(hopeless, 0.01) is None
    assert 0.01 * 10**DAMPING_STEPS < 1e4
    assert factorize(-torch.eye(4), 0.01) is None
    assert factorize(torch.zeros(4, 4), 0.01) is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_gives_up_on_values_that_are_not_finite(value, place):
    broken = torch.eye(4)
    broken[place] = value
    assert factorize(broken, 0.01) is None


def test_dead_columns_get_a_harmless_unit():
    inputs = normal(30, 6)
    inputs[:, [1, 4]] = 0
    matrix = inputs.T @ inputs
    matrix[1, 2] = matrix[2, 1] = 3.0
    given = matrix.clone()
    prepared = prepare_hessian(matrix)
    alive = torch.tensor([0, 2, 3, 5])
    assert prepared.dead.tolist() == [False, True, False, False, True, False]
    assert torch.equal(prepared.matrix[alive][:, alive], given[alive][:, alive])
    for column in (1, 4):
        unit = torch.zeros(6)
        unit[column] = given.diagonal()[alive].mean()
        assert torch.equal(prepared.matrix[column], unit)
        assert torch.equal(prepared.matrix[:, column], unit)
    assert torch.equal(matrix, given)


def test_columns_of_negative_or_unknown_energy_are_dead():
    matrix = torch.diag(torch.tensor([1.0, -2.0, torch.nan, 3.0]))
    prepared = prepare_hessian(matrix)
    assert prepared.dead.tolist() == [False, True, True, False]
    assert prepared.matrix.diagonal().tolist() == [1.0, 2.0, 2.0, 3.0]


def test_a_hessian_without_any_energy_becomes_the_identity():
    prepared = prepare_hessian(torch.zeros(3, 3, dtype=torch.float64))
    assert prepared.dead.all()
    assert torch.equal(prepared.matrix, torch.eye(3))


def test_a_live_hessian_is_only_copied():
    _, hessian = random_problem(1, 9)
    prepared = prepare_hessian(hessian)
    assert not prepared.dead.any()
    assert torch.equal(prepared.matrix, hessian)
    assert prepared.matrix.data_ptr() != hessian.data_ptr()
