"""The optimum of the additive model against exhaustive search."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matgptq.width_search.optimum import optimum

Table = list[dict[int, int]]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Table, Table, int]:
    """Losses (integers, so that sums are exact), costs and a limit that something fits into."""
    widths = sorted(draw(st.sets(st.integers(2, 8), min_size=1, max_size=4)))
    groups = draw(st.integers(1, 5))
    costs: Table = [{bits: draw(st.integers(0, 40)) for bits in widths} for _ in range(groups)]
    losses: Table = [{bits: draw(st.integers(-5, 30)) for bits in widths} for _ in range(groups)]
    least = sum(min(cost.values()) for cost in costs)
    return losses, costs, least + draw(st.integers(0, 120))


def total(table: Table, genome: tuple[int, ...]) -> int:
    return sum(own[bits] for own, bits in zip(table, genome, strict=True))


@settings(max_examples=300, deadline=None)
@given(problems())
def test_equals_exhaustive_search(problem: tuple[Table, Table, int]) -> None:
    losses, costs, limit = problem
    found = optimum(losses, costs, limit)
    assert total(costs, found) <= limit
    choices = itertools.product(*(list(loss) for loss in losses))
    assert total(losses, found) == min(total(losses, each) for each in choices if total(costs, each) <= limit)


def test_ends_of_the_range() -> None:
    rng = random.Random(0)
    costs = [{bits: size * bits for bits in range(2, 9)} for size in (5, 3, 16, 8) * 10]
    losses = [{bits: factor * 4.0**-bits for bits in range(2, 9)} for factor in (rng.random() for _ in costs)]
    assert optimum(losses, costs, sum(cost[2] for cost in costs)) == (2,) * len(costs)
    assert optimum(losses, costs, sum(cost[8] for cost in costs)) == (8,) * len(costs)


def test_large_tables_are_exact_in_the_last_unit() -> None:
    """Groups of sizes without a common divisor; the limit is the cost of a known choice, to the bit."""
    rng = random.Random(1)
    sizes = [rng.randint(10**6, 10**8) for _ in range(200)]
    costs = [{bits: size * bits for bits in range(2, 9)} for size in sizes]
    # Losses that make one choice optimal at any price between its neighbours: convex in the cost with equal slopes.
    chosen = tuple(rng.randint(3, 7) for _ in sizes)
    losses = [
        {bits: abs(bits - own) * size * (2.0 if bits < own else -0.5) for bits in range(2, 9)}
        for own, size in zip(chosen, sizes, strict=True)
    ]
    assert optimum(losses, costs, sum(cost[bits] for cost, bits in zip(costs, chosen, strict=True))) == chosen


def test_nothing_fits() -> None:
    with pytest.raises(ValueError, match="limit"):
        optimum([{2: 1.0, 3: 0.0}], [{2: 10, 3: 15}], 9)
