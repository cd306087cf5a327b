"""The column loop against a plain loop in float64 that tries all 256 codes for every weight."""

from __future__ import annotations

import pytest
import torch
from brute_force import LEVELS, code_costs, excess, random_problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matgptq import native
from matgptq.core.sweep import SweepGrid, code_levels, compensate, compensation_coupling, descend, descent_coupling
from matgptq.errors import ConfigurationError
from matgptq.slicing import level_table

GROUP_SIZE = 8
TIE = 1e-3
light = settings(
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the engine stays the same for all examples
)


@pytest.fixture(params=["torch", "native"], autouse=True)
def engine(request, monkeypatch):
    if request.param == "native" and not native.available():
        pytest.skip(native.reason())
    monkeypatch.setenv("MATGPTQ_SOLVER", request.param)
    return request.param


class Sweep:
    """A random problem in processing order, and the plain loops that follow the choices of the fast ones."""

    def __init__(self, widths, bit_weights, rows, columns, seed, *, mean=False):
        self.widths, self.mean = widths, mean
        self.lambdas = torch.tensor(bit_weights, dtype=torch.float64)
        weight, hessian = random_problem(rows, columns, seed)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(columns, generator=generator)
        self.group_of = (order // GROUP_SIZE).tolist()
        self.weight, self.hessian = weight.T.contiguous(), hessian
        damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(columns)
        self.upper = torch.linalg.cholesky(torch.linalg.inv(damped)).mH.float()
        self.compensation, self.descent = compensation_coupling(self.upper), descent_coupling(hessian)
        copies = 1 if mean or len(widths) == 1 else len(widths)
        spread = 0.8 + 0.4 * torch.rand(columns // GROUP_SIZE + 1, copies, rows, generator=generator)
        sign = torch.randint(0, 2, (len(spread), 1, rows), generator=generator) * 2 - 1
        self.scales = 2.0**-11 * spread * sign
        self.grid = SweepGrid(self.scales, self.group_of, widths, bit_weights)

    def scales_at(self, column):
        """``[R, rows]``"""
        scales = self.scales[self.group_of[column]].double()
        return scales.expand(len(self.widths), -1)

    def levels_of(self, codes):
        return torch.stack([LEVELS[bits][codes.long()] for bits in self.widths])

    def excess(self, targets, column, codes):
        """How much worse than the best one each code serves the targets ``[R, rows]``, in squared steps."""
        scales = self.scales_at(column)
        weights = self.lambdas.unsqueeze(1) * (scales / scales[-1]).square()
        lost = excess(code_costs(targets / scales, self.widths, weights), codes)
        return lost / (weights.sum(0) * (1 + (targets / scales).square().amax(0) * TIE))

    def moves(self):
        """``[in, C * rows]``, for copies that begin elsewhere than at the weight."""
        shape = (len(self.weight), self.scales.shape[1] * self.scales.shape[2])
        return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(7))

    def follow_compensation(self, codes, moved=None):
        targets = self.weight.double().expand(len(self.widths), -1, -1).clone()  # [R, in, rows]
        if moved is not None:
            targets += moved.double().view(len(codes), -1, codes.shape[1]).transpose(0, 1)
        upper = self.upper.double()
        lost = []
        for column in range(len(codes)):
            lost.append(self.excess(targets[:, column], column, codes[column]))
            rounded = self.levels_of(codes[column]) * self.scales_at(column)
            residual = (targets[:, column] - rounded) / upper[column, column]
            if self.mean:
                residual = residual.mean(0, keepdim=True)
            for later in range(column + 1, len(codes)):
                targets[:, later] -= residual * upper[column, later]
        return torch.stack(lost)

    def follow_descent(self, start, codes):
        hessian = self.hessian.double()
        current = torch.stack([self.levels_of(start[j]) * self.scales_at(j) for j in range(len(start))], 1)
        lost = []
        for column in range(len(codes)):
            slope = torch.einsum("k,rko->ro", hessian[column], self.weight.double() - current)
            target = current[:, column] + slope / hessian[column, column]
            lost.append(self.excess(target, column, codes[column]))
            current[:, column] = self.levels_of(codes[column]) * self.scales_at(column)
        return torch.stack(lost)

    def descend(self, start):
        scales = torch.stack([self.scales[group] for group in self.group_of])  # [in, copies, rows]
        copies = scales.shape[1]
        levels = torch.stack([level_table(bits) for bits in self.widths])[:copies, start.long()]
        current = levels.permute(1, 0, 2) * scales
        gradient = torch.einsum("jk,kcr->jcr", self.hessian, self.weight.unsqueeze(1) - current)
        steps = gradient / self.hessian.diagonal().view(-1, 1, 1)
        flat = (tensor.reshape(len(start), -1).clone() for tensor in (current, steps))
        return descend(*flat, self.descent, self.grid)

    def objective(self, codes):
        total = 0.0
        for index, bits in enumerate(self.widths):
            scales = torch.stack([self.scales_at(j)[index] for j in range(len(codes))])
            difference = self.weight.double() - LEVELS[bits][codes.long()] * scales
            total += self.lambdas[index] * (difference * (self.hessian.double() @ difference)).sum(0)
        return total  # [rows]


SETS = [
    ((2, 3, 4, 8), (4.0, 8.0, 16.0, 256.0)),
    ((2, 3, 4, 8), (1.0, 1.0, 1.0, 1.0)),
    ((3, 8), (1.0, 30.0)),
    ((2, 3, 4, 5, 6, 7, 8), (1.0,) * 7),
    ((3,), (2.0,)),
    ((8,), (1.0,)),
]
problems = st.tuples(
    st.sampled_from(SETS), st.integers(1, 5), st.sampled_from([1, 7, 31, 32, 33, 70]), st.integers(0, 99)
)


@light
@given(problems)
def test_compensation_of_every_width(problem):
    (widths, bit_weights), rows, columns, seed = problem
    sweep = Sweep(widths, bit_weights, rows, columns, seed)
    codes = compensate(sweep.weight, sweep.compensation, sweep.grid)
    assert codes.shape == (columns, rows)
    assert codes.dtype == torch.uint8
    assert sweep.follow_compensation(codes).max() <= TIE


@light
@given(problems)
def test_compensation_of_copies_that_were_moved(problem):
    (widths, bit_weights), rows, columns, seed = problem
    sweep = Sweep(widths, bit_weights, rows, columns, seed)
    codes = compensate(sweep.weight, sweep.compensation, sweep.grid, sweep.moves())
    assert sweep.follow_compensation(codes, sweep.moves()).max() <= TIE


@light
@given(problems)
def test_compensation_by_the_plain_mean(problem):
    (widths, bit_weights), rows, columns, seed = problem
    sweep = Sweep(widths, bit_weights, rows, columns, seed, mean=True)
    codes = compensate(sweep.weight, sweep.compensation, sweep.grid)
    assert sweep.follow_compensation(codes).max() <= TIE


@light
@given(problems)
def test_descent_minimises_one_column_after_the_other(problem):
    (widths, bit_weights), rows, columns, seed = problem
    sweep = Sweep(widths, bit_weights, rows, columns, seed)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 256, (columns, rows), dtype=torch.uint8, generator=generator)
    codes = sweep.descend(start)
    assert sweep.follow_descent(start, codes).max() <= TIE
    assert (sweep.objective(codes) <= sweep.objective(start) * (1 + 1e-6)).all()


@light
@given(problems)
def test_descent_never_raises_the_objective(problem):
    (widths, bit_weights), rows, columns, seed = problem
    sweep = Sweep(widths, bit_weights, rows, columns, seed)
    codes = compensate(sweep.weight, sweep.compensation, sweep.grid)
    reached = sweep.objective(codes)
    for _ in range(3):
        codes = sweep.descend(codes)
        lower = sweep.objective(codes)
        assert (lower <= reached * (1 + 1e-5)).all()
        reached = lower


@pytest.mark.parametrize("widths", [(2, 3, 4, 8), (3,)])
def test_descent_ends_where_no_single_code_can_be_better(widths):
    sweep = Sweep(widths, (1.0,) * len(widths), 3, 8, 5)
    codes = compensate(sweep.weight, sweep.compensation, sweep.grid)
    for _ in range(50):
        before, codes = codes, sweep.descend(codes)
        if torch.equal(before, codes):
            break
    else:
        pytest.fail("no fixed point")
    reached = sweep.objective(codes)
    for column in range(8):
        for code in range(256):
            other = codes.clone()
            other[column] = code
            assert (sweep.objective(other) >= reached * (1 - 1e-5)).all()


def test_rows_do_not_meet():
    widths, bit_weights = SETS[0]
    sweep = Sweep(widths, bit_weights, 5, 40, 1)
    changed = sweep.weight.clone()
    changed[:, 2] *= -3
    codes = compensate(sweep.weight, sweep.compensation, sweep.grid)
    others = compensate(changed, sweep.compensation, sweep.grid)
    same = [0, 1, 3, 4]
    assert torch.equal(codes[:, same], others[:, same])
    assert not torch.equal(codes[:, 2], others[:, 2])


def test_code_levels():
    codes = torch.randint(0, 256, (3, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    table = torch.stack([level_table(bits) for bits in (2, 5, 8)])
    levels = code_levels(codes, table)
    expected = torch.stack([LEVELS[bits][codes.long()] for bits in (2, 5, 8)])
    assert torch.equal(levels.double(), expected)


def test_an_unknown_engine_is_refused(monkeypatch):
    monkeypatch.setenv("MATGPTQ_SOLVER", "abacus")
    sweep = Sweep((2, 8), (1.0, 4.0), 2, 8, 0)
    with pytest.raises(ConfigurationError, match="abacus"):
        compensate(sweep.weight, sweep.compensation, sweep.grid)
