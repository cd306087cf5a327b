"""The GPU's column loop against the plain loops of ``test_sweep``, and its codes against PyTorch's.

On a GPU if there is one, else in Triton's interpreter, where a column takes a moment: the problems are small.
"""

from __future__ import annotations

import pytest
import torch
from brute_force import random_problem
from test_sweep import TIE, Sweep

from matgptq.core.output_hessian import OutputHessian
from matgptq.core.solver import solve
from matgptq.core.sweep import SweepGrid, compensate, descend
from matgptq.errors import ConfigurationError
from matgptq.gpu import support as gpu_support
from matgptq.recipe import make_recipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
reason = gpu_support.obstacle(DEVICE)
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))
DEFAULT = (2, 3, 4, 8), (4.0, 8.0, 16.0, 256.0)
# Widths and weights, rows, columns; 32 columns are one launch (16 where there are many copies), 32 rows one program.
PROBLEMS = [
    (*DEFAULT, 3, 9),
    ((3, 8), (1.0, 30.0), 2, 35),
    ((2, 8), (1.0, 1.0), 40, 4),
    ((2, 4, 5, 6, 8), (1.0,) * 5, 2, 3),
    ((3,), (2.0,), 5, 35),
    ((8,), (1.0,), 1, 1),
]


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    monkeypatch.setenv("MATGPTQ_SOLVER", "triton")


class DeviceSweep(Sweep):
    """The same problem with what the loops read on the device."""

    def __init__(self, *problem, mean=False):
        super().__init__(*problem, mean=mean)
        self.here = self.weight, self.compensation, self.grid
        self.grid = SweepGrid(self.scales.to(DEVICE), self.group_of, self.grid.target_bits, self.grid.bit_weights)

    def compensate(self, moved=None):
        moved = None if moved is None else moved.to(DEVICE)
        return compensate(self.weight.to(DEVICE), self.compensation.to(DEVICE), self.grid, moved).cpu()


@pytest.mark.parametrize(("widths", "bit_weights", "rows", "columns"), PROBLEMS)
def test_compensation_of_every_width(widths, bit_weights, rows, columns, monkeypatch):
    sweep = DeviceSweep(widths, bit_weights, rows, columns, 1)
    codes = sweep.compensate()
    assert codes.shape == (columns, rows)
    assert codes.dtype == torch.uint8
    assert sweep.follow_compensation(codes).max() <= TIE
    monkeypatch.setenv("MATGPTQ_SOLVER", "torch")
    assert (compensate(*sweep.here) == codes).double().mean() > (0.98 if DEVICE == "cuda" else 0.999)


@pytest.mark.parametrize(("widths", "bit_weights", "rows", "columns"), PROBLEMS)
def test_compensation_of_copies_that_were_moved(widths, bit_weights, rows, columns):
    sweep = DeviceSweep(widths, bit_weights, rows, columns, 1)
    assert sweep.follow_compensation(sweep.compensate(sweep.moves()), sweep.moves()).max() <= TIE


def test_compensation_by_the_plain_mean():
    sweep = DeviceSweep(*DEFAULT, 5, 35, 2, mean=True)
    assert sweep.follow_compensation(sweep.compensate()).max() <= TIE


@pytest.mark.parametrize(("widths", "bit_weights", "rows", "columns"), PROBLEMS)
def test_descent_minimises_one_column_after_the_other(widths, bit_weights, rows, columns):
    sweep = DeviceSweep(widths, bit_weights, rows, columns, 3)
    generator = torch.Generator().manual_seed(3)
    start = torch.randint(0, 256, (columns, rows), dtype=torch.uint8, generator=generator)
    tables = torch.stack([sweep.levels_of(start[j]) for j in range(columns)], 1)  # [R, in, rows]
    scales = torch.stack([sweep.scales_at(j) for j in range(columns)], 1)
    current = (tables * scales).permute(1, 0, 2).float()
    gradient = torch.einsum("jk,kcr->jcr", sweep.hessian, sweep.weight.unsqueeze(1) - current)
    # As the solver hands them over: transposed views.
    steps = gradient / sweep.hessian.diagonal().view(-1, 1, 1)
    flat = (tensor.reshape(columns, -1).T.contiguous().T.to(DEVICE) for tensor in (current, steps))
    codes = descend(*flat, sweep.descent.to(DEVICE), sweep.grid).cpu()
    assert sweep.follow_descent(start, codes).max() <= TIE


@pytest.mark.parametrize("joined", [False, True])
def test_a_whole_solve(joined, monkeypatch):
    monkeypatch.setattr("matgptq.core.joined_rows._ROWS", 2)
    weight, hessian = random_problem(4, 32, 5)
    recipe = make_recipe("matgptq", [2, 8], group_size=16)
    factor = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    outputs = OutputHessian({"a": 4}, factor @ factor.mT) if joined else None
    solved = solve(weight.to(DEVICE), hessian.to(DEVICE), recipe, 16, outputs=outputs).weight
    monkeypatch.setenv("MATGPTQ_SOLVER", "torch")
    expected = solve(weight, hessian, recipe, 16, outputs=outputs).weight
    assert (solved.codes.cpu() == expected.codes).double().mean() > 0.98


def test_what_it_refuses(monkeypatch):
    sweep = Sweep((3, 4), (1.0, 1.0), 1, 8, 0)
    with pytest.raises(ValueError, match="parent"):
        compensate(sweep.weight.to(DEVICE), sweep.compensation.to(DEVICE), sweep.grid)
    monkeypatch.setattr(gpu_support, "obstacle", lambda device: "there is none")
    with pytest.raises(ConfigurationError, match="MATGPTQ_SOLVER=triton: there is none"):
        compensate(sweep.weight.to(DEVICE), sweep.compensation.to(DEVICE), sweep.grid)
