"""Recipes: the defaults of each method, the order of bit weights, what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from matgptq.errors import ConfigurationError
from matgptq.recipe import Recipe, make_recipe


def test_defaults_of_the_own_method():
    assert make_recipe() == Recipe(
        method="matgptq",
        target_bits=(2, 3, 4, 6, 8),
        bit_weights=(5.0, 13.0, 14.0, 28.0, 270.0),
        group_size=128,
        grid="absmax",
        signed_scales=True,
        scale_candidates=16,
        scale_min_shrink=0.45,
        compensation="per-width",
        column_order="hessian",
        coordinate_passes=2,
        refit=True,
        refit_bits=(2, 3, 4, 5, 6, 7, 8),
        refit_in_loop=True,
        damping=0.01,
        sink_weight=1.0,
        saliency=1.0,
        rows_together=4096,
        channel_scaling=0.25,
        rotate=False,
        tuned_bits=(),
        seed=0,
    )


def test_qualities():
    fast, balanced, best = (make_recipe(quality=quality) for quality in ("fast", "balanced", "best"))
    assert balanced == make_recipe()
    assert (fast.coordinate_passes, fast.saliency, fast.sink_weight) == (0, 0, 64)
    assert fast.bit_weights == (4.0, 8.0, 16.0, 256.0)
    own = ("bit_weights", "saliency", "tuned_bits", "tuning_steps")
    only_best = {name: getattr(best, name) for name in own}
    assert best == dataclasses.replace(balanced, rotate=True, **only_best)
    assert {2, 3} <= set(best.tuned_bits)
    # What is asked for beats what the quality chose.
    asked = {"rotate": False, "tuned_bits": (4,), "tuning_steps": 7}
    assert make_recipe(quality="best", **asked) == dataclasses.replace(best, **asked)
    json.dumps(best.to_dict())


@pytest.mark.parametrize(
    ("bits", "solved"),
    [
        ((2, 3, 4, 8), (2, 3, 4, 6, 8)),
        ((4, 8), (4, 6, 8)),
        ((3, 7, 8), (3, 7, 8)),
        ((8,), (8,)),
        ((5, 8), (5, 8)),
    ],
)
def test_a_width_between_the_targets_and_the_parent(bits, solved):
    for quality in ("balanced", "best"):
        recipe = make_recipe(bits=bits, quality=quality)
        assert recipe.target_bits == solved
        assert [*recipe.bit_weights] == sorted(recipe.bit_weights)
    assert make_recipe(bits=bits, quality="fast").target_bits == bits
    given = make_recipe(bits=bits, bit_weights=[1.0] * len(bits))
    assert given.target_bits == bits  # who weighs widths says which


def test_qualities_are_checked():
    with pytest.raises(ConfigurationError, match="fast, balanced, best, not 'good'"):
        make_recipe(quality="good")
    with pytest.raises(ConfigurationError, match="paper has only one"):
        make_recipe("paper", quality="best")
    with pytest.raises(ConfigurationError, match="tuned_bits"):
        make_recipe(tuned_bits=(3, 2))


def test_defaults_of_the_published_method():
    recipe = make_recipe("paper")
    assert recipe.target_bits == (2, 3, 4, 8)
    assert recipe.bit_weights == (1.0, 1.0, 1.0, 1.0)
    assert recipe.compensation == "mean"
    assert recipe.sink_weight == 1
    assert recipe.saliency == 0
    _assert_plain(recipe)


def test_defaults_of_one_width():
    recipe = make_recipe("gptq", [3])
    assert recipe.target_bits == (3,)
    assert recipe.bit_weights == (1.0,)
    assert recipe.compensation == "per-width"
    assert recipe.propagated_bits == 3
    assert recipe.sink_weight == 64
    _assert_plain(recipe)


@pytest.mark.parametrize("bits", [None, [8], [4, 2]])
def test_rounding_to_nearest_targets_the_parent_alone(bits):
    recipe = make_recipe("rtn", bits)
    assert recipe.target_bits == (8,)
    assert recipe.compensation == "none"
    assert not recipe.needs_calibration
    _assert_plain(recipe, column_order="hessian")


def _assert_plain(recipe, column_order="natural"):
    assert recipe.grid == "minmax"
    assert not recipe.signed_scales
    assert recipe.scale_candidates == 1
    assert recipe.column_order == column_order
    assert recipe.coordinate_passes == 0
    assert not recipe.refit


@pytest.mark.parametrize(
    "options",
    [{"compensation": "mean"}, {"scale_candidates": 2}, {"refit": True}, {"coordinate_passes": 1}],
    ids=lambda options: next(iter(options)),
)
def test_every_ingredient_that_reads_the_hessian_needs_calibration(options):
    assert make_recipe("rtn", **options).needs_calibration


@pytest.mark.parametrize("method", ["matgptq", "paper"])
def test_bit_weights_follow_the_widths_as_given(method):
    expected = (0.25, 1.0, 5.0)
    for bits, bit_weights in [
        ((8, 4, 3), (5, 1, 0.25)),
        ((3, 4, 8), (0.25, 1, 5)),
        ((4, 8, 3), iter([1.0, 5.0, 0.25])),
        ((8, 4, 3), {4: 1, 3: 0.25, 8: 5}),
        ((8, 4, 3), {"8": 5, "4": 1, "3": 0.25}),
    ]:
        recipe = make_recipe(method, bits, bit_weights)
        assert recipe.target_bits == (3, 4, 8)
        assert recipe.bit_weights == expected


def test_repeated_widths_count_once():
    assert make_recipe(bits=[8, 3, 3], quality="fast").bit_weights == (8.0, 256.0)


def test_options_override_the_defaults_of_a_method():
    recipe = make_recipe("paper", refit=True, group_size=-1, seed=7)
    assert (recipe.refit, recipe.group_size, recipe.seed) == (True, -1, 7)
    assert recipe.compensation == "mean"


def test_the_record_is_json_and_makes_the_recipe_again():
    recipe = make_recipe(bits=[2, 8], bit_weights=[1, 3], damping=0.05)
    record = json.loads(json.dumps(recipe.to_dict()))
    assert set(record) == {field.name for field in dataclasses.fields(Recipe)}
    again = make_recipe(record.pop("method"), record.pop("target_bits"), record.pop("bit_weights"), **record)
    assert again == recipe


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "awq"}, "method must be one of matgptq, paper, gptq, rtn, not 'awq'"),
        ({"groupsize": 64}, "unknown recipe option groupsize"),
        ({"bits": [2, 9]}, "from 2 to 8, not 9"),
        ({"bits": [1, 8]}, "from 2 to 8, not 1"),
        ({"bits": []}, "at least one width"),
        ({"bits": [2, 4]}, "add 8"),
        ({"method": "paper", "bits": [4]}, "method gptq"),
        ({"method": "gptq"}, "makes one width"),
        ({"method": "gptq", "bits": [3, 8]}, "makes one width"),
        ({"method": "rtn", "bits": [0]}, "from 2 to 8, not 0"),
        ({"bits": [3, 8], "bit_weights": [1]}, "1 bit weights for the 2 widths"),
        ({"bits": [3, 8], "bit_weights": [1, 1, 1]}, "3 bit weights for the 2 widths"),
        ({"bits": [3, 8], "bit_weights": {3: 1}}, "are given for"),
        ({"bits": [3, 8], "bit_weights": {3: 1, 4: 1, 8: 1}}, "are given for"),
        ({"bits": [3, 8], "bit_weights": [1, 0]}, "one positive number"),
        ({"bits": [3, 8], "bit_weights": [1, -1]}, "one positive number"),
        ({"bits": [3, 8], "bit_weights": [1, float("nan")]}, "one positive number"),
        ({"bits": [3, 8], "bit_weights": [1, float("inf")]}, "one positive number"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": 4}, "group_size"),
        ({"group_size": -2}, "group_size"),
        ({"grid": "mse"}, "unknown grid"),
        ({"compensation": "both"}, "unknown compensation"),
        ({"column_order": "random"}, "unknown column order"),
        ({"scale_candidates": 0}, "scale_candidates"),
        ({"scale_min_shrink": 0}, "scale_min_shrink"),
        ({"scale_min_shrink": 1.5}, "scale_min_shrink"),
        ({"coordinate_passes": -1}, "coordinate_passes"),
        ({"method": "paper", "coordinate_passes": 1}, "one copy of the weight per width"),
        ({"damping": -0.01}, "damping"),
        ({"damping": float("nan")}, "damping"),
        ({"damping": float("inf")}, "damping"),
        ({"sink_weight": 0}, "sink_weight must be at least 1"),
        ({"sink_weight": float("nan")}, "sink_weight"),
        ({"sink_weight": float("inf")}, "sink_weight"),
    ],
    ids=str,
)
def test_refuses(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        make_recipe(**arguments)


def test_a_recipe_made_by_hand_is_checked_too():
    with pytest.raises(ConfigurationError, match="ascend without repeats"):
        dataclasses.replace(make_recipe(), target_bits=(8, 4, 3, 2))
    with pytest.raises(ConfigurationError, match="method must be"):
        dataclasses.replace(make_recipe(), method="awq")


def test_one_width_may_compensate_by_the_mean_and_descend():
    recipe = make_recipe("gptq", [4], compensation="mean", coordinate_passes=2)
    assert recipe.coordinate_passes == 2


def test_weights_that_name_widths_choose_them():
    recipe = make_recipe(bit_weights={2: 5.0, 6: 28.0, 8: 270.0})
    assert recipe.target_bits == (2, 6, 8)
    assert recipe.bit_weights == (5.0, 28.0, 270.0)


@pytest.mark.parametrize("option", [{"rotate": "no"}, {"seed": -1}, {"seed": 2**32}, {"refit": 1}])
def test_flags_and_seeds_are_checked(option):
    with pytest.raises(ConfigurationError, match=next(iter(option))):
        make_recipe(**option)
