"""Exchanges keep the budget, generations keep the best, and every budget comes to an end."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matgptq.width_search.evolution import (
    EvolutionSettings,
    EvolutionState,
    Stage,
    exchange,
    fill,
    next_generation,
    stopped,
)

Genome = tuple[int, ...]
SETTINGS = EvolutionSettings((Stage(2, 3), Stage(4, 1)), offspring=6, generations=30, patience=3)


@st.composite
def spaces(draw: st.DrawFn) -> tuple[list[dict[int, int]], int]:
    """Costs of groups of any sizes with a share that does not depend on the width, and a limit in their range."""
    widths = sorted(draw(st.sets(st.integers(2, 8), min_size=1)))
    sizes = draw(st.lists(st.integers(1, 10**9), min_size=1, max_size=8))
    fixed = draw(st.integers(0, 10**6))
    costs = [{bits: size * bits + fixed for bits in widths} for size in sizes]
    low, high = (sum(cost[bits] for cost in costs) for bits in (widths[0], widths[-1]))
    return costs, draw(st.integers(low, high))


def spent(costs: Sequence[dict[int, int]], genome: Genome) -> int:
    return sum(cost[bits] for cost, bits in zip(costs, genome, strict=True))


@settings(max_examples=300, deadline=None)
@given(spaces(), st.randoms(use_true_random=False))
def test_exchanges_keep_the_budget(space: tuple[list[dict[int, int]], int], rng: random.Random) -> None:
    costs, limit = space
    genome = fill(tuple(min(cost) for cost in costs), costs, limit, rng)
    for _ in range(5):
        assert spent(costs, genome) <= limit
        # Filled: no single raise fits any more.
        for cost, bits in zip(costs, genome, strict=True):
            larger = [other for other in cost if other > bits]
            assert not larger or spent(costs, genome) - cost[bits] + cost[min(larger)] > limit
        child = exchange(genome, costs, limit, rng)
        if child is None:
            return
        assert set(child) <= set(costs[0])
        assert spent(costs, child) <= limit
        genome = fill(child, costs, limit, rng)


def test_exchanges_reach_groups_of_other_sizes() -> None:
    costs = [{bits: size * bits for bits in range(2, 9)} for size in (16, 5, 3)]
    start = (4, 4, 4)
    found = {exchange(start, costs, spent(costs, start), random.Random(seed)) for seed in range(200)}
    assert any(child is not None and child[0] > 4 for child in found)
    assert any(child is not None and child[0] < 4 and child[1] > 4 for child in found)


def test_nothing_to_exchange_at_the_ends() -> None:
    costs = [{bits: size * bits for bits in (2, 4, 8)} for size in (5, 3)]
    assert exchange((2, 2), costs, 16, random.Random(0)) is None
    assert exchange((8, 8), costs, 64, random.Random(0)) is None


class Landscape:
    """A loss that is a sum over groups with noise of the windows, and a record of what was scored."""

    def __init__(self, groups: int, seed: int = 0) -> None:
        rng = random.Random(seed)
        self.weights = [rng.lognormvariate(0, 1) for _ in range(groups)]
        self.scored: list[Genome] = []
        self.calls: list[tuple[list[Genome], tuple[int, ...]]] = []

    def true(self, genome: Genome) -> float:
        return sum(weight * 4.0**-bits for weight, bits in zip(self.weights, genome, strict=True))

    def __call__(self, genomes: Sequence[Genome], rows: Sequence[int]) -> list[float]:
        self.calls.append((list(genomes), tuple(rows)))
        return [self.true(genome) * (1 + 0.1 * random.Random(sum(rows)).random()) for genome in genomes]


def run(landscape: Landscape, costs: list[dict[int, int]], limit: int, state: EvolutionState, seed: int = 0,
        settings: EvolutionSettings = SETTINGS) -> list[EvolutionState]:  # fmt: skip
    states = [state]
    while stopped(states[-1], settings) is None:
        states.append(next_generation(states[-1], costs, limit, landscape, 16, settings, seed))
    return states


@pytest.fixture
def costs() -> list[dict[int, int]]:
    return [{bits: size * bits for bits in range(2, 9)} for size in (5, 3, 16, 8) * 3]


@pytest.mark.parametrize("bits", [2, 3.3, 8])
def test_evolution_ends_and_never_gets_worse(costs: list[dict[int, int]], bits: float) -> None:
    limit = int(bits * 96)
    landscape = Landscape(len(costs))
    start = fill((2,) * len(costs), costs, limit, random.Random(0))
    states = run(landscape, costs, limit, EvolutionState(start))
    losses = [landscape.true(state.best) for state in states]
    assert losses == sorted(losses, reverse=True)
    assert all(spent(costs, genome) <= limit for genomes, _ in landscape.calls for genome in genomes)
    if bits in (2, 8):
        assert not landscape.calls
        assert stopped(states[-1], SETTINGS) == "no gain in 3 generations"
    else:
        assert losses[-1] < 0.8 * losses[0]


def test_nothing_is_proposed_twice_and_windows_are_fresh(costs: list[dict[int, int]]) -> None:
    landscape = Landscape(len(costs))
    start = (3,) * len(costs)
    states = run(landscape, costs, 3 * 96, EvolutionState(start))
    first_rounds = [genomes for genomes, rows in landscape.calls if len(rows) == SETTINGS.stages[0].windows]
    children = [genome for genomes in first_rounds for genome in genomes[1:]]
    assert len(children) == len(set(children))
    assert start not in children
    assert [genomes[0] for genomes in first_rounds] == [state.best for state in states[:-1]]  # the parent stays
    rows = [rows for _, rows in landscape.calls]
    assert len(set(rows)) == len(rows)
    assert all(len(set(each)) == len(each) and max(each) < 16 for each in rows)


def test_going_on_gives_the_uninterrupted_answer(costs: list[dict[int, int]]) -> None:
    start = EvolutionState((3,) * len(costs))
    states = run(Landscape(len(costs)), costs, 3 * 96, start, seed=5)
    for middle in (1, len(states) // 2):
        assert run(Landscape(len(costs)), costs, 3 * 96, states[middle], seed=5)[-1] == states[-1]
    assert run(Landscape(len(costs)), costs, 3 * 96, start, seed=6)[-1] != states[-1]


def test_prediction_chooses_among_proposals(costs: list[dict[int, int]]) -> None:
    guided = EvolutionSettings(SETTINGS.stages, offspring=6, generations=1, patience=3, drawn=8)
    plain, predicted = Landscape(len(costs)), Landscape(len(costs))
    start = EvolutionState((3,) * len(costs))
    next_generation(start, costs, 3 * 96, plain, 16, SETTINGS, 0)
    next_generation(start, costs, 3 * 96, predicted, 16, guided, 0, predict=predicted.true)
    best = [min(landscape.true(child) for child in landscape.calls[0][0][1:]) for landscape in (plain, predicted)]
    assert best[1] < best[0]
    assert len(predicted.calls[0][0]) == 7
