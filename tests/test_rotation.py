"""Hadamard matrices, and rotations made of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matgptq.core.rotation import Rotation, hadamard_factors, make_factors, random_signs

# Hidden and head sizes of real models; 52 has a Hadamard matrix, but not by these constructions.
KNOWN = (2, 12, 28, 64, 80, 96, 128, 576, 640, 896, 960, 1152, 1536, 2048, 2304, 2560, 3072, 3584, 4096, 5120, 14336)
UNKNOWN = (3, 6, 22, 52, 92, 65)


def dense(factors) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for factor in factors:
        matrix = torch.kron(matrix, factor)
    return matrix


@pytest.mark.parametrize("order", KNOWN)
def test_known_hadamard_matrices(order):
    factors = hadamard_factors(order)
    product = 1
    for factor in factors:
        assert (factor.abs() == 1).all()
        assert torch.equal(factor @ factor.T, len(factor) * torch.eye(len(factor), dtype=torch.float64))
        product *= len(factor)
    assert product == order


@settings(deadline=None, max_examples=60, derandomize=True)
@given(order=st.integers(1, 300))
def test_every_order_is_hadamard_or_refused(order):
    factors = hadamard_factors(order)
    if order > 2 and order % 4:
        assert factors is None  # no such matrix exists
    if factors is not None:
        matrix = dense(factors)
        assert matrix.shape == (order, order)
        assert (matrix.abs() == 1).all()
        assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", UNKNOWN)
def test_orders_without_a_construction_get_a_random_matrix(order):
    assert hadamard_factors(order) is None
    (first,) = make_factors(order, torch.Generator().manual_seed(0))
    (again,) = make_factors(order, torch.Generator().manual_seed(0))
    (other,) = make_factors(order, torch.Generator().manual_seed(1))
    torch.testing.assert_close(first @ first.T, torch.eye(order, dtype=torch.float64))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("order", [1, 2, 24, 52, 128, 576])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_rotation_is_its_matrix(order, dtype):
    generator = torch.Generator().manual_seed(order)
    rotation = Rotation(make_factors(order, generator), random_signs(order, generator=generator))
    matrix = rotation.signs[:, None] * dense(rotation.factors)
    rows = torch.randn(3, 5, order, generator=generator, dtype=torch.float64).to(dtype)
    torch.testing.assert_close(rotation.apply(rows), rows.double() @ matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order, dtype=torch.float64))


def test_one_large_channel_becomes_many_small_ones():
    generator = torch.Generator().manual_seed(0)
    rotation = Rotation(make_factors(576, generator), random_signs(576, generator=generator))
    spike = torch.zeros(576)
    spike[7] = 24.0
    torch.testing.assert_close(rotation.apply(spike).abs(), torch.ones(576, dtype=torch.float64))
