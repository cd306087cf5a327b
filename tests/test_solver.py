"""The whole solve of a matrix: against exhaustive search on tiny problems, its ingredients, its fallbacks."""

from __future__ import annotations

import itertools

import pytest
import torch
from brute_force import LEVELS, WIDTHS, code_costs, excess, output_error, random_problem, slice_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from matgptq.core.grid import initial_scales, search_scales, storable_scales
from matgptq.core.output_errors import output_errors
from matgptq.core.solver import solve
from matgptq.errors import ConfigurationError
from matgptq.nested_weight import NestedWeight
from matgptq.recipe import make_recipe

light = settings(deadline=None, max_examples=25, derandomize=True)
METHODS = {"matgptq": None, "paper": None, "gptq": [3], "rtn": None}


def joint_error(weight, nested, hessian, recipe):
    """``sum_r lambda_r (w - w_r) H (w - w_r)^T`` of each row."""
    return sum(
        bit_weight * output_error(weight, slice_weights(nested.codes, nested.scales_for(bits), bits), hessian)
        for bits, bit_weight in zip(recipe.target_bits, recipe.bit_weights, strict=True)
    )


def exhaustive_error(weight, scales, hessian, recipe):
    """The least joint error of one row with fixed scales over every combination of codes."""
    distinct = torch.stack([LEVELS[bits] for bits in recipe.target_bits]).T.unique(dim=0)  # [choices, R]
    columns = weight.shape[1]
    choices = torch.tensor(list(itertools.product(range(len(distinct)), repeat=columns)))
    spread = scales.double().repeat_interleave(columns // scales.shape[1], 1)
    return sum(
        bit_weight * output_error(weight, distinct[choices, index] * spread, hessian)
        for index, bit_weight in enumerate(recipe.bit_weights)
    ).min()


def tiny_problem(columns, seed):
    weight, hessian = random_problem(1, columns, seed, samples=columns + 1)
    return weight, hessian + 0.05 * hessian.diagonal().mean() * torch.eye(columns)


TINY = [("gptq", [2], 3), ("gptq", [3], 2), ("gptq", [4], 2), ("matgptq", [2, 3, 8], 2), ("matgptq", [3, 8], 2)]


@pytest.mark.parametrize(("method", "bits", "columns"), TINY)
def test_tiny_problems_lie_between_the_optimum_and_fewer_passes(method, bits, columns):
    at_optimum = 0
    for seed in range(12):
        weight, hessian = tiny_problem(columns, seed)
        errors = []
        for passes in (0, 1, 10):
            recipe = make_recipe(method, bits, coordinate_passes=passes, refit=False, damping=0.0)
            nested = solve(weight, hessian, recipe, columns).weight
            errors.append(float(joint_error(weight, nested, hessian, recipe)))
        least = float(exhaustive_error(weight, nested.scales[8], hessian, recipe))
        plain, once, settled = errors
        assert least * (1 - 1e-6) <= settled <= once * (1 + 1e-5)
        assert once <= plain * (1 + 1e-5)
        at_optimum += settled <= least * 1.0001
    assert at_optimum >= 6


@pytest.mark.parametrize(("method", "bits", "columns"), TINY)
def test_columns_that_do_not_interact_get_the_optimum(method, bits, columns):
    for seed in range(5):
        weight, hessian = tiny_problem(columns, seed)
        hessian = torch.diag(hessian.diagonal())
        recipe = make_recipe(method, bits, coordinate_passes=0, refit=False)
        nested = solve(weight, hessian, recipe, columns).weight
        least = float(exhaustive_error(weight, nested.scales[8], hessian, recipe))
        assert float(joint_error(weight, nested, hessian, recipe)) == pytest.approx(least, rel=1e-3)


def visiting_order(hessian, recipe):
    if recipe.column_order == "natural":
        return list(range(len(hessian)))
    return hessian.diagonal().sort(descending=True, stable=True).indices.tolist()


def plain_solve(weight, hessian, recipe, scales):
    """GPTQ from its definition, float64: codes ``[rows, in]`` and how clearly each was the best of 256."""
    rows, columns = weight.shape
    lambdas = torch.tensor(recipe.bit_weights, dtype=torch.float64)
    order = visiting_order(hessian, recipe)
    damped = hessian.double() + recipe.damping * hessian.double().diagonal().mean() * torch.eye(columns)
    spread = scales.double().repeat_interleave(columns // scales.shape[1], 1)
    copies = weight.double().repeat(len(lambdas), 1, 1)
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    margins = torch.zeros(rows, columns, dtype=torch.float64)
    for place, column in enumerate(order):
        left = order[place:]
        costs = code_costs(copies[..., column] / spread[:, column], recipe.target_bits, lambdas) / lambdas.sum()
        codes[:, column] = costs.argmin(0)
        lowest = costs.sort(0).values
        different = lowest > lowest[0] + 1e-9
        margins[:, column] = (lowest - lowest[0]).masked_fill(~different, torch.inf).amin(0)
        rounded = torch.stack([LEVELS[bits][codes[:, column].long()] for bits in recipe.target_bits])
        residual = copies[..., column] - rounded * spread[:, column]
        if recipe.compensation == "mean":
            residual = residual.mean(0, keepdim=True)
        # The inverse Hessian of the columns not yet rounded: what the factor's row stands for.
        inverse = torch.linalg.inv(damped[left][:, left])
        for later, influence in zip(left[1:], inverse[0, 1:] / inverse[0, 0], strict=True):
            copies[..., later] -= residual * influence
    return codes, margins


@pytest.mark.parametrize("order", ["hessian", "natural"])
@pytest.mark.parametrize(
    ("method", "bits", "bit_weights"),
    [("matgptq", [2, 3, 4, 8], None), ("matgptq", [3, 8], [1, 1]), ("paper", [2, 3, 4, 8], None), ("gptq", [3], None)],
)
def test_the_sweep_is_gptq_as_defined(method, bits, bit_weights, order):
    weight, hessian = random_problem(6, 40, seed=len(bits))
    recipe = make_recipe(method, bits, bit_weights, column_order=order, coordinate_passes=0, refit=False)
    nested = solve(weight, hessian, recipe, 8).weight
    scales = nested.scales[8]
    codes, margins = plain_solve(weight, hessian, recipe, scales)
    same = torch.stack([LEVELS[b][codes.long()] == LEVELS[b][nested.codes.long()] for b in bits]).all(0)
    for row in range(len(weight)):
        differing = [column for column in visiting_order(hessian, recipe) if not same[row, column]]
        # Only a tie may start a difference; what comes after it may follow.
        assert not differing or margins[row, differing[0]] < 1e-2
    assert same.double().mean() > 0.9


def test_rounding_to_nearest_needs_no_hessian():
    weight, hessian = random_problem(4, 24)
    recipe = make_recipe("rtn")
    solution = solve(weight, None, recipe, 8)
    nested = solution.weight
    assert not solution.rounded_to_nearest
    assert list(nested.scales) == [8]
    assert torch.equal(nested.scales[8], initial_scales(weight, 8, recipe))
    position = weight.double() / nested.scales[8].double().repeat_interleave(8, 1)
    assert excess(code_costs(position.unsqueeze(0), (8,), [1.0]), nested.codes).max() < 1e-3
    assert torch.equal(solve(weight, hessian, recipe, 8).weight.codes, nested.codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_one_width_reads_the_same_at_every_larger_width(bits):
    weight, hessian = random_problem(4, 32)
    for options in ({}, {"refit": True, "coordinate_passes": 2, "signed_scales": True, "scale_candidates": 8}):
        nested = solve(weight, hessian, make_recipe("gptq", [bits], **options), 16).weight
        assert list(nested.scales) == [8]
        own = nested.dequantize(bits)
        for larger in range(bits, 9):
            assert torch.equal(nested.dequantize(larger), own)


@light
@given(
    method=st.sampled_from(list(METHODS)),
    rows=st.integers(1, 6),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([1, 8, 13]),
    order=st.sampled_from(["hessian", "natural"]),
    seed=st.integers(0, 99),
)
def test_every_shape(method, rows, groups, group_size, order, seed):
    weight, hessian = random_problem(rows, groups * group_size, seed)
    recipe = make_recipe(method, METHODS[method], column_order=order)
    nested = solve(weight, hessian, recipe, group_size).weight
    assert nested.codes.shape == weight.shape
    assert nested.codes.is_contiguous()
    assert set(nested.scales) == set(recipe.scale_bits)
    for scales in nested.scales.values():
        assert scales.shape == (rows, groups)
        assert scales.dtype == torch.float32
        assert torch.equal(storable_scales(scales), scales)


@pytest.mark.parametrize("method", METHODS)
def test_one_scale_for_37_columns(method):
    weight, hessian = random_problem(3, 37)
    recipe = make_recipe(method, METHODS[method], group_size=-1)
    nested = solve(weight, hessian, recipe, 37).weight
    assert nested.scales[8].shape == (3, 1)
    errors = output_errors(weight, nested, hessian).relative()
    assert errors[3] < 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_and_hessians_of_other_types(dtype):
    weight, hessian = random_problem(3, 16)
    weight = weight.to(dtype)
    solution = solve(weight, hessian.double(), make_recipe(), 8)
    expected = solve(weight.float(), hessian, make_recipe(), 8)
    assert torch.equal(solution.weight.codes, expected.weight.codes)


def test_leaves_its_arguments_alone():
    weight, hessian = random_problem(3, 16)
    hessian[2] = 0
    hessian[:, 2] = 0
    before = weight.clone(), hessian.clone()
    solve(weight, hessian, make_recipe(coordinate_passes=2, refit_in_loop=True), 8)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


@pytest.mark.parametrize("options", [{}, {"coordinate_passes": 2, "refit_in_loop": True}, {"column_order": "natural"}])
@pytest.mark.parametrize("method", METHODS)
def test_pieces_of_rows_make_the_same_codes(monkeypatch, method, options):
    weight, hessian = random_problem(11, 40)
    if method in ("paper", "rtn"):
        options = {key: value for key, value in options.items() if key == "column_order"}
    recipe = make_recipe(method, METHODS[method], **options)
    whole = solve(weight, hessian, recipe, 8).weight
    monkeypatch.setattr("matgptq.core.solver._SWEEP_ELEMENTS", 40 * 4 * 3)
    pieces = solve(weight, hessian, recipe, 8).weight
    assert (pieces.codes == whole.codes).double().mean() > 0.99
    assert pieces.scales.keys() == whole.scales.keys()
    for bits, scales in whole.scales.items():
        torch.testing.assert_close(pieces.scales[bits], scales, rtol=2.0**-6, atol=0)


def test_stacked_layers_are_solved_as_if_alone():
    weight, hessian = random_problem(12, 32)
    stacked = solve(weight, hessian, make_recipe(), 8).weight.split_rows([5, 7])
    for part, rows in zip(stacked, weight.split([5, 7]), strict=True):
        alone = solve(rows, hessian, make_recipe(), 8).weight
        assert (part.codes == alone.codes).double().mean() > 0.99


ABLATIONS = {
    "grid": {"grid": "minmax"},
    "signed_scales": {"signed_scales": False},
    "scale_candidates": {"scale_candidates": 1},
    "scale_min_shrink": {"scale_min_shrink": 0.95},
    "no compensation": {"compensation": "none"},
    "mean compensation": {"compensation": "mean", "coordinate_passes": 0},
    "column_order": {"column_order": "natural"},
    "no pass": {"coordinate_passes": 0},
    "one pass": {"coordinate_passes": 1},
    "refit": {"refit": False},
    "refit_in_loop": {"refit_in_loop": False},
    "damping": {"damping": 1.0},
    "bit_weights": {"bit_weights": [1, 1, 1, 1]},
    "bits": {"bits": [2, 8]},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ingredient_has_an_effect(name):
    weight, hessian = random_problem(32, 64)
    full = solve(weight, hessian, make_recipe(), 16).weight
    recipe = make_recipe(**ABLATIONS[name])
    ablated = solve(weight, hessian, recipe, 16).weight
    assert not torch.equal(ablated.dequantize(2), full.dequantize(2))
    assert set(ablated.scales) == (set(range(2, 9)) if recipe.refit else {8})
    errors = output_errors(weight, ablated, hessian).relative()
    for bits, error in ((bits, errors[bits]) for bits in (2, 4, 8)):
        assert error < {2: 0.2, 4: 0.03, 8: 0.005}[bits]


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        ({"compensation": "none", "coordinate_passes": 0, "refit": False}, {"coordinate_passes": 0, "refit": False}),
        ({"coordinate_passes": 0, "refit": False}, {"refit": False}),
        ({"scale_candidates": 1}, {}),
        ({"signed_scales": False}, {}),
        ({"refit": False}, {}),
        ({"coordinate_passes": 2, "refit_in_loop": False}, {"coordinate_passes": 2}),
    ],
    ids=["compensation", "coordinate pass", "scale search", "signed scales", "refit", "refit in the loop"],
)
def test_every_ingredient_pays(worse, better):
    totals = []
    for options in (worse, better):
        recipe = make_recipe(**options)
        total = 0.0
        for seed in range(3):
            weight, hessian = random_problem(48, 64, seed)
            total += float(joint_error(weight, solve(weight, hessian, recipe, 16).weight, hessian, recipe).sum())
        totals.append(total)
    assert totals[1] < totals[0]


def test_passes_with_the_refit_in_the_loop_end_where_no_single_code_can_be_better():
    weight, hessian = random_problem(400, 8)
    options = {"bits": [2, 3, 8], "bit_weights": [1, 1, 1], "refit_in_loop": True, "scale_candidates": 1}
    recipe = make_recipe(coordinate_passes=40, **options)
    nested = solve(weight, hessian, recipe, 8).weight
    again = solve(weight, hessian, make_recipe(coordinate_passes=41, **options), 8).weight
    settled = (nested.codes == again.codes).all(1)
    assert settled.double().mean() > 0.8
    reached = joint_error(weight, nested, hessian, recipe)
    for column in range(8):
        for code in range(256):
            codes = nested.codes.clone()
            codes[:, column] = code
            other = joint_error(weight, NestedWeight(codes, nested.scales), hessian, recipe)
            assert (other >= reached * (1 - 1e-5))[settled].all()


def test_bit_weights_trade_one_width_against_another():
    weight, hessian = random_problem(48, 64)
    for_low, for_high = (
        output_errors(weight, solve(weight, hessian, make_recipe(bit_weights=w), 16).weight, hessian).relative()
        for w in ([1, 1, 1, 1], [1, 4, 16, 4096])
    )
    assert for_low[2] < for_high[2]
    assert for_low[8] > for_high[8]


def test_scales_keep_the_order_of_the_model_whatever_the_order_of_columns():
    weight, hessian = random_problem(5, 32)
    for method in ("paper", "matgptq"):
        natural, ordered = (
            solve(weight, hessian, make_recipe(method, refit=False, column_order=order), 8).weight
            for order in ("natural", "hessian")
        )
        expected = search_scales(weight, hessian.diagonal(), 8, make_recipe(method))
        assert torch.equal(natural.scales[8], expected)
        assert torch.equal(ordered.scales[8], expected)
        assert not torch.equal(natural.codes, ordered.codes)
        close = (ordered.dequantize(8) - weight).abs() <= 3 * 32 * expected.abs().repeat_interleave(8, 1)
        assert close.double().mean() > 0.95


def test_a_singular_hessian_is_damped():
    weight, hessian = random_problem(4, 32, samples=5)
    solution = solve(weight, hessian, make_recipe(), 8)
    assert (solution.damping, solution.damping_steps, solution.dead_columns) == (0.01, 0, 0)
    assert not solution.rounded_to_nearest
    assert output_errors(weight, solution.weight, hessian).relative()[8] < 1e-3


def test_an_indefinite_hessian_raises_the_damping():
    weight, _ = random_problem(4, 32)
    hessian = torch.eye(32) - 1.05 / 32  # eigenvalues 1 and -0.05
    solution = solve(weight, hessian, make_recipe(), 8)
    assert solution.damping == pytest.approx(0.1)
    assert solution.damping_steps == 1
    assert not solution.rounded_to_nearest


@pytest.mark.parametrize("broken", ["nan", "inf", "indefinite"])
@pytest.mark.parametrize("method", ["matgptq", "paper", "gptq"])
def test_a_hopeless_hessian_rounds_to_nearest_and_says_so(method, broken):
    weight, hessian = random_problem(4, 32)
    if broken == "indefinite":
        hessian[3, 5] = hessian[5, 3] = 1e6
    else:
        hessian[3, 5] = float(broken)
    recipe = make_recipe(method, METHODS[method])
    solution = solve(weight, hessian, recipe, 8)
    nested = solution.weight
    assert solution.rounded_to_nearest
    assert tuple(nested.scales) == recipe.scale_bits
    assert torch.equal(nested.scales[8], initial_scales(weight, 8, recipe))
    position = weight.double() / nested.scales[8].double().repeat_interleave(8, 1)
    widths = recipe.target_bits
    costs = code_costs(position.expand(len(widths), 4, 32), widths, recipe.bit_weights)
    assert excess(costs, nested.codes).max() <= 1e-3 * sum(recipe.bit_weights)


def test_dead_columns_are_counted_rounded_and_disturb_nothing():
    weight, _ = random_problem(6, 32)
    inputs = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[3, 17, 31]] = True
    inputs[:, dead] = 0
    hessian = inputs.T @ inputs
    recipe = make_recipe(refit=False)
    solution = solve(weight, hessian, recipe, 8)
    assert solution.dead_columns == 3
    assert not solution.rounded_to_nearest
    position = weight.double() / solution.weight.scales[8].double().repeat_interleave(8, 1)
    costs = code_costs(position.expand(len(recipe.target_bits), 6, 32), recipe.target_bits, recipe.bit_weights)
    assert excess(costs, solution.weight.codes)[:, dead].max() <= 1e-3 * sum(recipe.bit_weights)
    moved = weight.clone()
    moved[:, dead] *= 0.9
    fixed = make_recipe(refit=False, scale_candidates=1)
    first, second = (solve(w, hessian, fixed, 32).weight for w in (weight, moved))
    untouched = (first.scales[8] == second.scales[8]).all(1)
    assert untouched.any()
    assert torch.equal(first.codes[untouched][:, ~dead], second.codes[untouched][:, ~dead])


def test_inputs_that_were_never_excited_are_rounded_to_nearest():
    weight, _ = random_problem(3, 16)
    solution = solve(weight, torch.zeros(16, 16), make_recipe(), 8)
    assert solution.dead_columns == 16
    assert torch.isfinite(solution.weight.dequantize(8)).all()
    assert (solution.weight.dequantize(8) - weight).abs().max() < weight.abs().max() / 50


def test_a_weight_of_zeros_stays_zero():
    _, hessian = random_problem(1, 16)
    nested = solve(torch.zeros(2, 16), hessian, make_recipe(), 8).weight
    for bits in WIDTHS:
        assert (nested.dequantize(bits) == 0).all()
    assert set(output_errors(torch.zeros(2, 16), nested, hessian).relative().values()) == {0.0}


def test_refuses_what_does_not_fit():
    weight, hessian = random_problem(2, 24)
    with pytest.raises(ConfigurationError, match="group size 16 does not divide 24"):
        solve(weight, hessian, make_recipe(), 16)
    with pytest.raises(ConfigurationError, match="does not fit a weight"):
        solve(weight, hessian[:8, :8], make_recipe(), 8)
    with pytest.raises(ConfigurationError, match="needs a Hessian"):
        solve(weight, None, make_recipe(), 8)
    with pytest.raises(ConfigurationError, match="needs a Hessian"):
        solve(weight, None, make_recipe("rtn", refit=True), 8)


def test_relative_errors_are_those_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 24, generator=generator, dtype=torch.float64)
    weight, _ = random_problem(5, 24)
    codes = torch.randint(0, 256, (5, 24), dtype=torch.uint8, generator=generator)
    nested = NestedWeight(codes, {bits: 0.001 * torch.rand(5, 3, generator=generator) for bits in (2, 4, 8)})
    errors = output_errors(weight, nested, 2 / 200 * inputs.T @ inputs).relative()
    assert list(errors) == list(WIDTHS)
    for bits, error in errors.items():
        difference = weight.double() - slice_weights(codes, nested.scales_for(bits), bits)
        expected = (difference @ inputs.T).square().sum() / (weight.double() @ inputs.T).square().sum()
        assert error == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("method", ["matgptq", "gptq"])
@pytest.mark.parametrize("dead", [0, 3])
def test_a_solution_knows_its_errors(method, dead):
    weight, hessian = random_problem(300, 64, seed=5)
    hessian[:dead] = hessian[:, :dead] = 0
    recipe = make_recipe(method, METHODS[method], group_size=32, refit=True, damping=0.1)
    solution = solve(weight, hessian, recipe, 32)
    expected = output_errors(weight, solution.weight, hessian)
    assert solution.dead_columns == dead
    torch.testing.assert_close(solution.errors.energy, expected.energy)
    for bits in WIDTHS:
        torch.testing.assert_close(solution.errors.errors[bits], expected.errors[bits], rtol=1e-4, atol=0)
    parts = [solution.errors.relative(rows)[3] for rows in (slice(0, 100), slice(100, 300))]
    assert min(parts) <= solution.errors.relative()[3] <= max(parts)


def test_other_widths_may_be_refitted_too() -> None:
    weight, hessian = random_problem(6, 64, seed=11)
    plain, refitted = (
        solve(weight, hessian, make_recipe(quality="fast", group_size=32, refit_bits=more), 32).weight
        for more in ((), (5, 6))
    )
    assert sorted(refitted.scales) == [2, 3, 4, 5, 6, 8]
    assert torch.equal(plain.codes, refitted.codes)
    before = output_errors(weight, plain, hessian).relative()
    after = output_errors(weight, refitted, hessian).relative()
    assert after[5] < before[5]
    assert after[6] < before[6]
    assert after[7] == before[7]
