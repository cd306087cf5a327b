"""Costs and budgets in integers, and layers that serving fuses."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matgptq.checkpoints.checkpoint import LayerInfo, open_checkpoint
from matgptq.errors import AllocationError, ConfigurationError
from matgptq.models.families import find_family
from matgptq.slicing import WIDTHS
from matgptq.width_search.budget import SearchSpace, bits_budget, parse_size, parse_sweep, size_budget
from matgptq.width_search.layer_groups import LayerGroup, group_layers

LLAMA = find_family("llama")


def make_space(*sizes: tuple[int, int], widths: tuple[int, ...] = WIDTHS, other: int = 1000) -> SearchSpace:
    groups = tuple(LayerGroup((f"layer{i}",), i, "layer", weights, scales) for i, (weights, scales) in enumerate(sizes))
    return SearchSpace(groups, widths, other)


def test_costs_are_those_of_the_checkpoint(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    for fuse in (True, False):
        space = SearchSpace(group_layers(opened.layers, LLAMA, fuse=fuse), WIDTHS, opened.other_bytes)
        assert len(space.groups) == (8 if fuse else 14)
        for bits in WIDTHS:
            assert space.cost(space.uniform(bits)) == opened.served_bits(bits)
            assert space.size(space.uniform(bits)) == opened.served_bytes(bits)
        mixed = tuple(2 + index % 7 for index in range(len(space.groups)))
        assert space.cost(mixed) == opened.served_bits(space.allocation(mixed))
        assert space.size(mixed) == opened.served_bytes(space.allocation(mixed))
        assert space.bits_per_weight(mixed) == opened.bits_per_weight(space.allocation(mixed))
        assert set(space.allocation(mixed)) == set(opened.layers)


def test_fused_layers_share_a_group(checkpoint: Path) -> None:
    groups = group_layers(open_checkpoint(checkpoint).layers, LLAMA)
    assert [(group.block, group.kind) for group in groups[:4]] == [
        (0, "self_attn.q_proj+k_proj+v_proj"),
        (0, "self_attn.o_proj"),
        (0, "mlp.gate_proj+up_proj"),
        (0, "mlp.down_proj"),
    ]
    assert groups[0].layers == tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert [group.block for group in groups] == sorted(group.block for group in groups)


def test_blocks_are_in_numerical_order_and_experts_together() -> None:
    info = LayerInfo(64, 128, 64)
    names = [
        *(
            f"model.layers.{block}.mlp.experts.{e}.{p}_proj"
            for block in (10, 2)
            for e in (1, 0)
            for p in ("up", "down")
        ),
        "model.layers.10.self_attn.o_proj",
        "other.head",
    ]
    groups = group_layers(dict.fromkeys(names, info), LLAMA)
    assert [(group.block, group.kind, len(group.layers)) for group in groups] == [
        (0, "other.head", 1),
        (2, "mlp.experts", 4),
        (10, "self_attn.o_proj", 1),
        (10, "mlp.experts", 4),
    ]
    assert groups[1].cost(3) == 4 * (64 * 128 * 3 + 64 * 2 * 16)
    assert len(group_layers(dict.fromkeys(names, info), LLAMA, fuse=False)) == len(names)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10**10), st.integers(0, 10**9)), min_size=1, max_size=6), st.data())
def test_budgets_are_exact(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    space = make_space(*sizes)
    genome = tuple(data.draw(st.sampled_from(WIDTHS)) for _ in sizes)
    exact = Fraction(space.cost(genome), space.weights)
    assert bits_budget(space, exact).bits == space.cost(genome)
    # A size in bytes lets in what rounds up to it, and not one bit more.
    budget = size_budget(space, space.size(genome))
    assert space.cost(genome) <= budget.bits < space.cost(genome) + 8
    assert (budget.bits + 7) // 8 + space.other_bytes == space.size(genome)


def test_decimal_targets_are_taken_as_written() -> None:
    space = make_space((10, 0))
    assert bits_budget(space, 2.3).bits == 23  # 2.3 in binary is a bit less
    assert bits_budget(space, "2.30").name == "2.3 bits per weight"
    assert bits_budget(space, Fraction(23, 10)).label == "2.3bpw"
    assert size_budget(space, 1003).label == "0.001003MB"


@pytest.mark.parametrize("target", [2.2499, 8.2501, 0, -1, 100])
def test_targets_out_of_reach_name_the_range(target: float) -> None:
    with pytest.raises(AllocationError, match=r"widths 2 to 8 take 2\.25 to 8\.25, scales included"):
        bits_budget(make_space((64, 16)), target)


def test_the_range_that_is_named_can_be_asked_for() -> None:
    space = make_space((7, 1), (13, 3))
    with pytest.raises(AllocationError, match=r"take 2\.2 to 8\.2,"):
        bits_budget(space, 2)
    uneven = make_space((7, 1))
    with pytest.raises(AllocationError, match=r"take 2\.1429 to 8\.1428,"):
        bits_budget(uneven, 2)
    assert bits_budget(uneven, 2.1429).bits == 15
    assert bits_budget(uneven, 8.1428).bits == 56


def test_sizes_out_of_reach_say_what_is_not_quantized() -> None:
    space = make_space((8000, 800), other=5000)
    with pytest.raises(AllocationError, match=r"not quantized \(embeddings, norms, head\) takes 5,000 bytes"):
        size_budget(space, "4.9KB")
    with pytest.raises(AllocationError, match="7,100 to 13,100 bytes, 5,000 of them not quantized"):
        size_budget(space, "7 KB")
    with pytest.raises(AllocationError, match="7,100 to 13,100 bytes"):
        size_budget(space, "14KB")
    assert size_budget(space, 7100).bits == 16800


@pytest.mark.parametrize("target", ["three", "3,25", "nan", "1/0", None])
def test_targets_that_are_no_numbers(target: object) -> None:
    with pytest.raises(ConfigurationError, match="must be a number"):
        bits_budget(make_space((64, 16)), target)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"),
    [("80MB", 80_000_000), ("0.5 GiB", 2**29), ("76mib", 76 * 2**20), ("1234", 1234), (99, 99), ("1.5kB", 1500)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "80 M B", "80TBB", "-3MB", "1e6"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ConfigurationError, match="a size is"):
        parse_size(text)


def test_sweeps_include_both_ends() -> None:
    assert [float(target) for target in parse_sweep("2.25:6:0.25")] == [2.25 + 0.25 * step for step in range(16)]
    assert parse_sweep("2.1:2.3:0.1") == [Fraction(21, 10), Fraction(22, 10), Fraction(23, 10)]
    assert parse_sweep("3:3:1") == [Fraction(3)]


@pytest.mark.parametrize("text", ["3", "3:4", "4:3:1", "3:4:0", "3:4:-1", "a:b:c", "0:4:1", "3:4:1/0"])
def test_bad_sweeps(text: str) -> None:
    with pytest.raises(ConfigurationError, match="a sweep"):
        parse_sweep(text)
