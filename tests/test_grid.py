"""Group scales: storage precision, fallbacks of the group size, search and refit."""

from __future__ import annotations

import pytest
import torch
from brute_force import WIDTHS, code_costs, output_error, random_problem, slice_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from matgptq import native
from matgptq.core.grid import (
    MAX_SCALE,
    MIN_SCALE,
    initial_scales,
    refit_scales,
    resolve_group_size,
    search_scales,
    storable_scales,
)
from matgptq.core.solver import solve
from matgptq.errors import UnsupportedModelError
from matgptq.recipe import make_recipe
from matgptq.rounding import shared_table
from matgptq.slicing import slice_levels

light = settings(deadline=None, max_examples=50, derandomize=True)
scale_lists = st.lists(st.floats(-(2.0**20), 2.0**20, width=32), min_size=1, max_size=50)
tiny_lists = st.lists(st.floats(-(2.0**-12), 2.0**-12, width=32), min_size=1, max_size=50)


@light
@given(scale_lists | tiny_lists)
def test_storable_scales_survive_every_storage(values):
    scales = torch.tensor(values)
    stored = storable_scales(scales)
    assert stored.dtype == torch.float32
    assert torch.equal(stored.to(torch.float16).float(), stored)
    assert torch.equal(stored.to(torch.bfloat16).float(), stored)
    assert stored.abs().min() >= MIN_SCALE
    assert stored.abs().max() <= MAX_SCALE
    assert torch.equal(stored < 0, scales < 0)
    for bits in WIDTHS:
        factor = 2.0 ** (8 - bits)
        own = (stored * factor).to(torch.float16)
        assert torch.isfinite(own).all()
        assert torch.equal(own.float() / factor, stored)
    assert torch.equal(storable_scales(stored), stored)
    expected = scales.abs().clamp(MIN_SCALE, MAX_SCALE)
    assert ((stored.abs() - expected).abs() <= (expected * 2.0**-8).clamp_min(2.0**-24)).all()


def test_storable_scales_leaves_alone_what_needs_no_rounding():
    mantissas = torch.arange(128, 256).float()
    normal = torch.cat([mantissas * 2.0**exponent for exponent in range(-21, 3)])
    subnormal = torch.arange(1, 129).float() * 2.0**-24
    values = torch.cat([normal, subnormal])
    assert torch.equal(storable_scales(values), values)
    assert torch.equal(storable_scales(-values), -values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_storable_scales_of_other_types(dtype):
    assert storable_scales(torch.tensor([0.1, -3.0, 0.0], dtype=dtype)).tolist() == [0.10009765625, -3.0, MIN_SCALE]


@pytest.mark.parametrize(
    ("in_features", "requested", "expected"),
    [
        (576, 64, 64),
        (576, 128, 64),
        (1536, 128, 128),
        (96, 128, 32),
        (96, 48, 48),
        (128, 48, 32),
        (160, 48, 32),
        (512, 256, 256),
        (384, 256, 128),
        (37, -1, 37),
        (8, 8, 8),
    ],
)
def test_group_size_falls_back(in_features, requested, expected):
    assert resolve_group_size("layer", in_features, requested) == expected


@pytest.mark.parametrize(("in_features", "requested"), [(37, 128), (100, 64)])
def test_group_size_that_fits_nothing_is_refused_by_name(in_features, requested):
    with pytest.raises(UnsupportedModelError, match=f"layer blocks.3.up: {in_features} input features") as error:
        resolve_group_size("blocks.3.up", in_features, requested)
    assert "--group-size" in str(error.value)
    assert "--ignore blocks.3.up" in str(error.value)


def test_group_size_never_falls_back_to_a_larger_one():
    with pytest.raises(UnsupportedModelError):
        resolve_group_size("layer", 64, 24)


@pytest.mark.parametrize("signed", [True, False])
def test_absmax_grid_puts_the_largest_magnitude_on_the_edge(signed):
    weight, _ = random_problem(20, 64)
    scales = initial_scales(weight, 16, make_recipe(signed_scales=signed))
    groups = weight.view(20, 4, 16)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
    position = largest / scales
    assert ((position.abs() - 128).abs() <= 0.5).all()
    if signed:
        assert (position < 0).all()
        assert (scales < 0).any()
        assert (scales > 0).any()
    else:
        assert (scales > 0).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_minmax_grid_is_the_symmetric_grid_of_gptq(bits):
    weight, _ = random_problem(5, 32)
    scales = initial_scales(weight, 8, make_recipe("gptq", [bits]))
    spacing = 2 * weight.view(5, 4, 8).abs().amax(2) / (2**bits - 1)
    torch.testing.assert_close(scales * 2 ** (8 - bits), spacing, rtol=2.0**-8, atol=0)


def test_empty_groups_get_the_smallest_scale():
    assert initial_scales(torch.zeros(2, 8), 8, make_recipe()).abs().tolist() == [[MIN_SCALE], [MIN_SCALE]]
    _, hessian = random_problem(1, 8)
    assert torch.isfinite(search_scales(torch.zeros(2, 8), hessian.diagonal(), 8, make_recipe())).all()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [(2, 3, 4, 8), (3, 8), (3,)])
def test_search_finds_the_best_candidate(bits, signed):
    method = "matgptq" if 8 in bits else "gptq"
    recipe = make_recipe(method, bits, signed_scales=signed, scale_candidates=7, scale_min_shrink=0.4)
    weight, hessian = random_problem(6, 32)

    def group_errors(scales):
        position = weight.double() / scales.double().repeat_interleave(8, 1)
        widths = recipe.target_bits
        steps = code_costs(position.expand(len(widths), 6, 32), widths, recipe.bit_weights).amin(0)
        return (steps * hessian.diagonal()).view(6, 4, 8).sum(2) * scales.double().square()

    start = initial_scales(weight, 8, recipe)
    candidates = [storable_scales(start * shrink) for shrink in torch.linspace(1, 0.4, 7).tolist()]
    best = torch.stack([group_errors(scales) for scales in candidates]).amin(0)
    found = search_scales(weight, hessian.diagonal(), 8, recipe)
    torch.testing.assert_close(group_errors(found), best, rtol=1e-3, atol=0)
    assert (group_errors(found) <= group_errors(start) * (1 + 1e-3)).all()
    assert (found != start).any()


def test_search_reads_the_importance_of_each_column():
    weight, _ = random_problem(1, 8, seed=3)
    recipe = make_recipe("gptq", [2], scale_candidates=40, scale_min_shrink=0.2)
    found = []
    for column in range(8):
        importance = torch.full((8,), 1e-4)
        importance[column] = 1
        found.append(search_scales(weight, importance, 8, recipe).item())
    assert len(set(found)) > 2


def test_search_in_pieces_of_rows(monkeypatch):
    weight, hessian = random_problem(7, 32)
    whole = search_scales(weight, hessian.diagonal(), 8, make_recipe())
    monkeypatch.setattr("matgptq.core.grid._SEARCH_ELEMENTS", 70)
    assert torch.equal(search_scales(weight, hessian.diagonal(), 8, make_recipe()), whole)


def test_one_candidate_means_no_search():
    weight, hessian = random_problem(4, 16)
    recipe = make_recipe(scale_candidates=1)
    assert torch.equal(search_scales(weight, hessian.diagonal(), 8, recipe), initial_scales(weight, 8, recipe))


@pytest.mark.parametrize(("columns", "seed"), [(32, 0), (96, 1), (128, 2)])
def test_refit_never_raises_the_output_error_of_a_row(columns, seed):
    weight, hessian = random_problem(64, columns, seed)
    nested = solve(weight, hessian, make_recipe(refit=False), 32).weight
    scales = nested.scales[8]
    for bits in WIDTHS:
        refitted = refit_scales(weight, slice_levels(nested.codes, bits), scales, hessian).scales
        before = output_error(weight, slice_weights(nested.codes, scales, bits), hessian)
        after = output_error(weight, slice_weights(nested.codes, refitted, bits), hessian)
        assert torch.equal(storable_scales(refitted), refitted)
        assert torch.equal(refitted < 0, scales < 0)
        assert (after <= before * (1 + 1e-6)).all()
        assert after.sum() < before.sum()


def test_refit_sees_errors_far_below_the_output():
    _, hessian = random_problem(1, 96)
    hessian += 1e4 * hessian.diagonal().mean()  # a direction that all columns share dwarfs the error of 8 bits
    weight, _ = random_problem(64, 96, seed=1)
    recipe = make_recipe("gptq", [8], refit=False)
    nested = solve(weight, hessian, recipe, 32).weight
    scales = nested.scales[8]
    for _ in range(3):
        refitted = refit_scales(weight, slice_levels(nested.codes, 8), scales, hessian).scales
        before = output_error(weight, slice_weights(nested.codes, scales, 8), hessian)
        after = output_error(weight, slice_weights(nested.codes, refitted, 8), hessian)
        assert (after <= before * (1 + 1e-6)).all()
        scales = refitted


def test_refit_is_least_squares_over_all_groups_of_a_row():
    weight, hessian = random_problem(5, 24)
    nested = solve(weight, hessian, make_recipe(refit=False), 8).weight
    refitted = refit_scales(weight, slice_levels(nested.codes, 2), nested.scales[8], hessian).scales
    root = torch.linalg.cholesky(hessian.double()).T  # ||root d||^2 = d^T H d
    for row in range(5):
        current = slice_weights(nested.codes, nested.scales[8], 2)[row]
        parts = torch.block_diag(*current.view(3, 1, 8)).T  # [24, 3]
        target = root @ weight[row].double()
        multipliers = torch.linalg.lstsq(root @ parts, target.unsqueeze(1)).solution.squeeze(1)
        expected = nested.scales[8][row].double() * multipliers
        # Storage precision, and the ridge.
        torch.testing.assert_close(refitted[row].double(), expected, rtol=6e-3, atol=0)


@pytest.mark.parametrize(("multiplier", "taken"), [(-1, 1), (0.2, 1), (0.3125, 0.3125), (3, 3), (5, 1)])
def test_refit_does_not_take_a_wild_multiplier(multiplier, taken):
    levels = torch.linspace(-60, 60, 16).view(1, 16)
    scales = torch.tensor([[0.5, -0.25]])
    current = levels * scales.repeat_interleave(8, 1)
    refitted = refit_scales(multiplier * current, levels, scales, torch.eye(16)).scales
    torch.testing.assert_close(refitted, taken * scales, rtol=1e-2, atol=0)


def test_refit_leaves_empty_groups_alone():
    weight, hessian = random_problem(3, 16)
    levels = torch.zeros(3, 16)
    scales = torch.full((3, 2), 0.5)
    assert torch.equal(refit_scales(weight, levels, scales, hessian).scales, scales)
    levels[:, :8] = 100 * weight[:, :8]
    refitted = refit_scales(weight, levels, scales / 64, torch.eye(16)).scales
    torch.testing.assert_close(refitted[:, 0], torch.full((3,), 0.01), rtol=1e-2, atol=0)
    assert torch.equal(refitted[:, 1], scales[:, 1] / 64)


@pytest.mark.skipif(not native.available(), reason=native.reason() or "native library")
@pytest.mark.parametrize("widths", [(2, 3, 4, 8), (2, 3, 4, 5, 6, 7, 8), (4,), (2, 8)])
@pytest.mark.parametrize(("rows", "groups", "group_size"), [(1, 1, 9), (5, 3, 32), (17, 2, 64), (4, 1, 128)])
def test_native_search_takes_candidates_as_good(widths, rows, groups, group_size, monkeypatch):
    weight, hessian = random_problem(rows, groups * group_size, seed=rows)
    method = "gptq" if len(widths) == 1 else "matgptq"
    recipe = make_recipe(method, widths, scale_candidates=16, group_size=group_size)
    found = {}
    for engine in ("torch", "native"):
        monkeypatch.setenv("MATGPTQ_SOLVER", engine)
        found[engine] = search_scales(weight, hessian.diagonal(), group_size, recipe)
    table = shared_table(recipe.target_bits, recipe.bit_weights)
    importance = hessian.diagonal().view(groups, group_size)

    def error(scales):
        position = weight.view(rows, groups, group_size) / scales.unsqueeze(-1)
        return (table.error(position).double() * importance).sum(-1) * scales.double().square()

    torch.testing.assert_close(error(found["native"]), error(found["torch"]), rtol=1e-4, atol=0)
    assert (found["native"] == found["torch"]).double().mean() > 0.9
