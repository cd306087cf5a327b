"""Rows that are solved together: the Hessian of outputs, its factor, and what the solver makes of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from brute_force import random_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from matgptq import native
from matgptq.core import joined_rows
from matgptq.core.output_hessian import (
    OutputHessian,
    count_parts,
    damp_outputs,
    loosely_joined,
    matrix_bytes,
)
from matgptq.core.row_problem import Draft, RowProblem
from matgptq.core.solver import solve
from matgptq.errors import ConfigurationError
from matgptq.machine.workers import Workers
from matgptq.nested_weight import NestedWeight
from matgptq.recipe import Recipe, make_recipe

ROWS, COLUMNS, GROUP_SIZE, SIZE = 96, 40, 8, 48


def completed(layers: dict[str, int], most: int, gradients: Sequence[Tensor], exponent: float = 2.0) -> OutputHessian:
    outputs = OutputHessian.empty(layers, most)
    outputs.add([gradients], exponent)
    outputs.complete()
    return outputs


def correlated(layers: dict[str, int], most: int, seed: int = 0, tokens: int = 200) -> OutputHessian:
    """An output Hessian of gradients that mostly lie in a few directions."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(layers.values())
    few = torch.randn(tokens, 4, generator=generator) @ torch.randn(4, rows, generator=generator)
    gradients = few + 0.5 * torch.randn(tokens, rows, generator=generator)
    return completed(layers, most, (gradients / tokens**0.5).split([*layers.values()], 1))


def work_on(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """So many at a time."""
    monkeypatch.setattr(joined_rows, "_ROWS", rows)
    monkeypatch.setattr(joined_rows, "_STEPS", SIZE)


def whole(outputs: OutputHessian) -> Tensor:
    """``[rows, rows]``, in the order in which layers are stacked."""
    rows = sum(outputs.layers.values())
    full = torch.zeros(rows, rows, dtype=torch.float64)
    for index, block in zip(outputs.rows(), outputs.matrix, strict=True):
        full[index.unsqueeze(1), index] = block.double()
    return full


def objective(weight: Tensor, nested: NestedWeight, hessian: Tensor, outputs: Tensor, recipe: Recipe) -> float:
    """``sum_r lambda_r trace(G D_r H D_r^T)``."""
    total = 0.0
    for bits, weight_of_bits in zip(recipe.target_bits, recipe.bit_weights, strict=True):
        change = weight.double() - nested.dequantize(bits).double()
        total += weight_of_bits * float((outputs * (change @ hessian.double() @ change.T)).sum())
    return total


@given(rows=st.lists(st.sampled_from([1, 6, 16, 24, 64, 192, 576, 1536, 11008, 97]), min_size=1, max_size=3),
       most=st.integers(0, 5000))  # fmt: skip
def test_layers_are_cut_into_as_many_equal_parts(rows: list[int], most: int) -> None:
    parts = count_parts(rows, most)
    assert all(each % parts == 0 for each in rows)
    fewer = [each for each in range(1, parts) if all(of_layer % each == 0 for of_layer in rows)]
    assert all(sum(rows) // each > most for each in fewer)
    if sum(rows) // parts > most:
        assert parts == math.gcd(*rows)
    assert matrix_bytes(rows, most) == 4 * parts * (sum(rows) // parts) ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5, 2.0])
def test_products_of_gradients(exponent: float, dtype: torch.dtype) -> None:
    gradients = torch.randn(30, 36, generator=torch.Generator().manual_seed(0)).to(dtype)
    gradients[7] = 0
    found = completed({"a": 24, "b": 12}, 12, gradients.split([24, 12], 1), exponent)
    rows = gradients.double()
    norms = rows.norm(dim=1)
    expected = sum(
        torch.outer(row, row) * norm ** (exponent - 2) for row, norm in zip(rows, norms, strict=True) if norm > 0
    )
    assert found.rows().tolist() == [[*range(8 * i, 8 * i + 8), *range(24 + 4 * i, 28 + 4 * i)] for i in range(3)]
    # bfloat16 rounds both factors and their product, each by half a unit of its last place.
    rounding = 3 * 2.0**-9 if dtype == torch.bfloat16 else 2e-6
    most = (expected.diagonal().unsqueeze(0) * expected.diagonal().unsqueeze(1)).sqrt() * rounding
    for index, block in zip(found.rows(), found.matrix, strict=True):
        assert torch.equal(block, block.T)
        place = index.unsqueeze(1), index
        assert bool(((block.double() - expected[place]).abs() <= most[place]).all())
    total = float(sum(each.trace() for each in found.matrix))
    assert total == pytest.approx(float((norms**exponent).sum()), rel=rounding)


def test_products_add_up() -> None:
    gradients = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    outputs = OutputHessian.empty({"a": 24}, 8)
    for part in gradients.split(20):
        outputs.add([[part]], 1.0)
    outputs.complete()
    at_once = completed({"a": 24}, 8, [gradients], 1.0)
    torch.testing.assert_close(outputs.matrix, at_once.matrix)
    torch.testing.assert_close(outputs.fourth_powers, at_once.fourth_powers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_may_be_given_together_and_shared_out(dtype: torch.dtype) -> None:
    windows = torch.randn(3, 20, 600, generator=torch.Generator().manual_seed(0)).to(dtype)
    one_by_one, together = OutputHessian.empty({"a": 600}, 300), OutputHessian.empty({"a": 600}, 300)
    for window in windows:
        one_by_one.add([[window]], 1.0)
    workers = Workers(3)
    together.add([[window] for window in windows], 1.0, workers)
    workers.close()
    assert torch.equal(together.matrix, one_by_one.matrix)
    assert torch.equal(together.fourth_powers, one_by_one.fourth_powers)


@pytest.mark.parametrize(("name", "first"), [("a", 14), ("b", 24)])
def test_outputs_that_are_divided(name: str, first: int) -> None:
    gradients = torch.randn(50, 36, generator=torch.Generator().manual_seed(0))
    layers = {"a": 24, "b": 12}
    last = 24 if name == "a" else 36
    factors = torch.rand(last - first, generator=torch.Generator().manual_seed(1)) + 0.5
    found = completed(layers, 12, gradients.split([24, 12], 1))
    found.divide_outputs(name, factors)
    # What reaches the loss through y / s depends on it s times as much.
    gradients[:, first:last] *= factors
    expected = completed(layers, 12, gradients.split([24, 12], 1))
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [100, 1000])
@pytest.mark.parametrize("directions", [1, 8])
def test_a_matrix_is_trusted_as_far_as_tokens_go(tokens: int, directions: int) -> None:
    """What is added to the diagonal does about as well as what is best for all draws from one covariance."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(directions, 48, generator=generator)
    truth = (few.T @ few + torch.eye(48)).double()
    draws = []
    for _ in range(40):
        vectors = torch.randn(tokens, directions, generator=generator) @ few
        draws.append(completed({"a": 48}, 48, [vectors + torch.randn(tokens, 48, generator=generator)]))

    def loss(drawn: OutputHessian, damping: float) -> float:
        matrix = drawn.matrix[0].double() / tokens
        shrunk = (matrix + damping * matrix.diagonal().mean() * torch.eye(48)) / (1 + damping)
        return float((shrunk - truth).square().sum())

    asked = sum(loss(drawn, float(drawn.dampings(0.0))) for drawn in draws)
    assert asked < 1.1 * min(sum(loss(drawn, 0.001 * 1.5**step) for drawn in draws) for step in range(25))
    if directions > 1:  # for one alone there is next to nothing to gain
        assert asked < sum(loss(drawn, 0.0) for drawn in draws)
    assert float(draws[0].dampings(100.0)) == 100.0


def test_weighty_tokens_are_few() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(1000, 3, generator=generator) @ torch.randn(3, 24, generator=generator)
    even = float(completed({"a": 24}, 24, [gradients]).dampings(0.0))
    gradients[:10] *= 30
    assert float(completed({"a": 24}, 24, [gradients]).dampings(0.0)) > 10 * even


@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e9])
def test_damping_has_no_unit(factor: float) -> None:
    gradients = torch.randn(100, 36, generator=torch.Generator().manual_seed(0))
    layers = {"a": 24, "b": 12}
    one = completed(layers, 12, gradients.split([24, 12], 1))
    other = completed(layers, 12, (gradients * factor**0.5).split([24, 12], 1))
    torch.testing.assert_close(one.dampings(0.01), other.dampings(0.01), rtol=1e-3, atol=0)
    other.divide_outputs("a", torch.full((24,), 5.0))
    other.divide_outputs("b", torch.full((12,), 5.0))
    torch.testing.assert_close(one.dampings(0.01), other.dampings(0.01), rtol=1e-3, atol=0)


def test_damping_where_nothing_is_known() -> None:
    matrix = correlated({"a": 16}, 8).matrix
    assert OutputHessian({"a": 16}, matrix).dampings(0.1).tolist() == pytest.approx([0.1, 0.1])
    powers = torch.tensor([0.0, float(matrix[1].square().sum())])  # of the second, as much noise as there is
    for value in (0.0, torch.nan, torch.inf):
        matrix[0] = value
        nothing, noise = OutputHessian({"a": 16}, matrix, powers).dampings(0.1).tolist()
        assert math.isfinite(nothing)
        assert noise == 1000


def test_what_is_kept_comes_back() -> None:
    outputs = correlated({"a": 24, "b": 12}, 12)
    kept = outputs.tensors()
    again = OutputHessian.of_tensors(outputs.layers, kept.__getitem__)
    assert torch.equal(again.matrix, outputs.matrix)
    assert torch.equal(again.dampings(0.0), outputs.dampings(0.0))


def test_damping_and_factor() -> None:
    matrix = correlated({"a": 48}, 16).matrix * torch.tensor([1.0, 1e-12, 1e9]).view(3, 1, 1)
    damped = damp_outputs(matrix, torch.full((len(matrix),), 0.1))
    assert torch.equal(damped.upper, damped.upper.triu())
    for own, found, factor in zip(matrix.double(), damped.matrix.double(), damped.upper.double(), strict=True):
        expected = own + 0.1 * own.diagonal().mean() * torch.eye(16)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(factor.T @ factor @ expected, torch.eye(16).double(), rtol=0, atol=1e-4)


def test_a_block_is_damped_as_much_as_its_factor_takes() -> None:
    matrix = torch.full((1, 8, 8), -0.5)
    matrix.diagonal(dim1=1, dim2=2).fill_(1.0)  # indefinite by far
    damped = damp_outputs(matrix, torch.full((len(matrix),), 0.1))
    assert float(damped.matrix[0, 0, 0]) > 2
    inverse = (damped.upper.mT @ damped.upper).double()
    torch.testing.assert_close(inverse @ damped.matrix.double(), torch.eye(8).double()[None], rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_blocks_that_say_nothing_join_nothing(value: float) -> None:
    matrix = correlated({"a": 16}, 8).matrix
    matrix[1] = value
    damped, alone = damp_outputs(matrix, torch.full((len(matrix),), 0.1)), damp_outputs(matrix[:1], torch.tensor([0.1]))
    assert torch.equal(damped.matrix[1], torch.eye(8))
    assert torch.equal(damped.upper[1], torch.eye(8))
    assert torch.equal(damped.matrix[:1], alone.matrix)
    assert torch.equal(damped.upper[:1], alone.upper)


@settings(deadline=None)
@given(rows=st.integers(1, 50), size=st.integers(1, 60), seed=st.integers(0, 9))
def test_every_row_is_in_one_stretch(rows: int, size: int, seed: int) -> None:
    matrix = correlated({"a": rows}, rows, seed).matrix[0]
    order = loosely_joined(matrix, size)
    assert sorted(order.tolist()) == [*range(rows)]
    assert torch.equal(order, loosely_joined(matrix, size))


def test_rows_that_are_joined_are_kept_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    # 12 groups of 4 rows with one direction each, groups in any order
    directions = torch.eye(12).repeat_interleave(4, 0) * (torch.rand(48, 1, generator=generator) + 0.5)
    order = torch.randperm(48, generator=generator)
    gradients = directions[order]
    matrix = gradients @ gradients.T + 0.01 * torch.eye(48)
    for stretch in loosely_joined(matrix, 12).split(12):
        assert len({int(order[row]) // 4 for row in stretch}) == 12


def test_rows_that_nothing_joins_are_solved_as_if_alone() -> None:
    weight, hessian = random_problem(ROWS, COLUMNS)
    recipe = make_recipe()
    matrix = torch.diag_embed(torch.rand(ROWS // SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    outputs = OutputHessian({"a": ROWS}, matrix)
    alone = solve(weight, hessian, recipe, GROUP_SIZE)
    together = solve(weight, hessian, recipe, GROUP_SIZE, outputs=outputs)
    assert torch.equal(alone.weight.codes, together.weight.codes)
    for bits, scales in alone.weight.scales.items():
        assert torch.equal(scales, together.weight.scales[bits])
    assert alone.errors is not None
    assert together.errors is not None
    for bits, errors in alone.errors.errors.items():
        torch.testing.assert_close(errors, together.errors.errors[bits], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"coordinate_passes": 0}, {"refit": False}, {"rows_together": 0}])
@pytest.mark.parametrize("engine", ["torch", "native"])
def test_rows_together_lower_what_they_are_solved_for(
    engine: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "native" and not native.available():
        pytest.skip(f"no native library: {native.reason()}")
    monkeypatch.setenv("MATGPTQ_SOLVER", engine)
    monkeypatch.setattr(joined_rows, "_ROWS", 8)
    weight, hessian = random_problem(ROWS, COLUMNS)
    recipe = make_recipe(**options)
    outputs = correlated({"a": ROWS}, SIZE)
    measure = partial(objective, weight, hessian=hessian, outputs=whole(outputs), recipe=recipe)
    alone = measure(solve(weight, hessian, recipe, GROUP_SIZE).weight)
    together = measure(solve(weight, hessian, recipe, GROUP_SIZE, outputs=outputs).weight)
    assert together < 0.8 * alone


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_one_width(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_rows, "_ROWS", 8)
    weight, hessian = random_problem(ROWS, COLUMNS)
    recipe = make_recipe("gptq", bits)
    outputs = correlated({"a": ROWS}, SIZE)
    measure = partial(objective, weight, hessian=hessian, outputs=whole(outputs), recipe=recipe)
    alone = measure(solve(weight, hessian, recipe, GROUP_SIZE).weight)
    assert measure(solve(weight, hessian, recipe, GROUP_SIZE, outputs=outputs).weight) < 0.8 * alone


@pytest.mark.parametrize("at_a_time", [1, 5, 8, 48])
def test_what_is_left_of_rows_moves_those_behind_them(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets of every row in the sweep, against the definition: row after row, as GPTQ goes over columns."""
    work_on(monkeypatch, at_a_time)
    weight, hessian = random_problem(SIZE, COLUMNS)
    recipe = make_recipe(coordinate_passes=0)
    rows, targets = [], []
    original = RowProblem.begin

    def watched(problem: RowProblem, own: Tensor, moved: Tensor | None = None) -> Draft:
        assert moved is not None
        rows.append(own)
        targets.append(moved)
        return original(problem, own, moved)

    monkeypatch.setattr(RowProblem, "begin", watched)
    outputs = correlated({"a": SIZE}, SIZE)
    nested = solve(weight, hessian, recipe, GROUP_SIZE, outputs=outputs).weight
    order = outputs.matrix[0].diagonal().argsort(descending=True)
    assert torch.equal(torch.cat(rows), weight[order])
    ordered = outputs.matrix[:, order.unsqueeze(1), order]
    upper = damp_outputs(ordered, outputs.dampings(recipe.output_damping)).upper[0].double()
    found = torch.cat(targets, 1).double()
    for copy, bits in enumerate(recipe.target_bits):
        rounded = nested.dequantize(bits)[order].double()
        moving = weight[order].double()
        for row in range(SIZE):
            if row % at_a_time == 0:
                behind = slice(row, row + at_a_time)
                torch.testing.assert_close(found[copy, behind], moving[behind], rtol=1e-3, atol=1e-4)
            left = (moving[row] - rounded[row]) / upper[row, row]
            moving[row + 1 :] -= torch.outer(upper[row, row + 1 :], left)


@pytest.mark.parametrize("at_a_time", [1, 5, 8, 48])
def test_a_pass_goes_on_from_what_is_left_of_all_other_rows(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets of every row in two passes, against the least of the objective with the other rows as they are."""
    work_on(monkeypatch, at_a_time)
    weight, hessian = random_problem(SIZE, COLUMNS)
    recipe = make_recipe(coordinate_passes=2)
    visits = []
    original = RowProblem.refit

    def watched(problem: RowProblem, targets: Tensor, draft: Draft) -> tuple[Draft, dict[int, Tensor]]:
        found = original(problem, targets, draft)
        visits.append((targets, problem.values(found[0])))
        return found

    monkeypatch.setattr(RowProblem, "refit", watched)
    outputs = correlated({"a": SIZE}, SIZE)
    nested = solve(weight, hessian, recipe, GROUP_SIZE, outputs=outputs).weight
    order = outputs.matrix[0].diagonal().argsort(descending=True)
    matrix = (
        damp_outputs(outputs.matrix[:, order.unsqueeze(1), order], outputs.dampings(recipe.output_damping))
        .matrix[0]
        .double()
    )
    ordered, parts = weight[order].double(), -(-SIZE // at_a_time)
    assert len(visits) == 3 * parts
    values = torch.cat([each for _, each in visits[:parts]], 1).double()
    visited = loosely_joined(matrix.float(), at_a_time).split(at_a_time)
    for part, (targets, found) in zip([*visited, *visited], visits[parts:], strict=True):
        left = ordered - values
        left[:, part] = 0
        expected = ordered[part] + torch.linalg.solve(matrix[part][:, part], matrix[part] @ left)
        torch.testing.assert_close(targets.double(), expected, rtol=1e-3, atol=1e-4)
        values[:, part] = found.double()
    for copy, bits in enumerate(recipe.target_bits):
        torch.testing.assert_close(values[copy], nested.dequantize(bits)[order].double())


def test_no_pass_makes_it_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    work_on(monkeypatch, 1)
    weight, hessian = random_problem(ROWS, COLUMNS)
    outputs = correlated({"a": ROWS}, SIZE)
    damped = OutputHessian(outputs.layers, damp_outputs(outputs.matrix, outputs.dampings(0.1)).matrix)
    found = []
    for passes in range(5):
        recipe = make_recipe(coordinate_passes=passes)
        nested = solve(weight, hessian, recipe, GROUP_SIZE, outputs=outputs).weight
        found.append(objective(weight, nested, hessian, whole(damped), recipe))
    assert found[1] < 0.95 * found[0]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(found))


@settings(max_examples=10, deadline=None)
@given(blocks=st.integers(1, 6), size=st.integers(1, 40), elements=st.integers(1, 9000), threads=st.integers(1, 3))
def test_pieces_and_threads_change_nothing(blocks: int, size: int, elements: int, threads: int) -> None:
    weight, hessian = random_problem(blocks * size, 16)
    recipe = make_recipe(coordinate_passes=1)
    outputs = correlated({"a": blocks * size}, size)
    expected = solve(weight, hessian, recipe, 8, outputs=outputs).weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joined_rows, "MOVED_ELEMENTS", elements)
        workers = Workers(threads)
        try:
            found = solve(weight, hessian, recipe, 8, workers, outputs).weight
        finally:
            workers.close()
    assert torch.equal(found.codes, expected.codes)


def test_layers_that_are_cut_are_put_together_again() -> None:
    weight, hessian = random_problem(72, COLUMNS)
    recipe = make_recipe()
    outputs = correlated({"a": 48, "b": 24}, 36)
    assert outputs.matrix.shape == (2, 36, 36)
    found = solve(weight, hessian, recipe, GROUP_SIZE, outputs=outputs)
    for index, block in zip(outputs.rows(), outputs.matrix, strict=True):
        alone = solve(weight[index], hessian, recipe, GROUP_SIZE, outputs=OutputHessian({"a": 36}, block.unsqueeze(0)))
        assert torch.equal(found.weight.codes[index], alone.weight.codes)
        assert found.errors is not None
        assert alone.errors is not None
        torch.testing.assert_close(found.errors.energy[index], alone.errors.energy)
        for bits, scales in alone.weight.scales.items():
            assert torch.equal(found.weight.scales[bits][index], scales)
            torch.testing.assert_close(found.errors.errors[bits][index], alone.errors.errors[bits])


def test_output_hessians_of_other_rows_are_refused() -> None:
    weight, hessian = random_problem(ROWS, COLUMNS)
    with pytest.raises(ConfigurationError, match=r"an output Hessian of 48 rows does not fit a weight \(96, 40\)"):
        solve(weight, hessian, make_recipe(), GROUP_SIZE, outputs=correlated({"a": 48}, 48))


def test_recipe() -> None:
    assert make_recipe().joins_rows
    assert not make_recipe(rows_together=1).joins_rows
    assert not make_recipe(saliency=0.0).joins_rows
    assert not make_recipe(quality="fast").joins_rows
    assert not make_recipe("gptq", 4).joins_rows
    assert not make_recipe(compensation="mean", coordinate_passes=0).joins_rows
    with pytest.raises(ConfigurationError, match="rows_together cannot be negative, it is -1"):
        make_recipe(rows_together=-1)
    for damping in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigurationError, match="output_damping must be positive"):
            make_recipe(output_damping=damping)
