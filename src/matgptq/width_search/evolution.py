"""Refinement of an allocation by evolution: nothing over budget is ever made, nothing is tried twice, the best stays.

Pure functions of a scoring function and a seed; models and text live in ``scoring`` and ``run``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from matgptq.width_search.optimum import Genome

Costs = Sequence[Mapping[int, int]]
Score = Callable[[Sequence[Genome], Sequence[int]], list[float]]
_ATTEMPTS = 10  # proposals for each one that is wanted, before a generation makes do with fewer
_MOST_EXCHANGES = 3


@dataclass(frozen=True)
class Stage:
    """One round of selection: all that are left are scored on windows drawn anew, the best are kept.

    Attributes:
        windows: number of windows.
        keep: how many go on, the parent not counted.
    """

    windows: int
    keep: int


@dataclass(frozen=True)
class EvolutionSettings:
    """How an evolution runs.

    Attributes:
        stages: rounds of a generation.
        offspring: candidates of a generation.
        generations: at most so many.
        patience: generations without a gain after which it stops.
        min_gain: smallest relative improvement that counts as one.
        drawn: proposals drawn for each candidate, of which the prediction picks the best; 1 without a prediction.
    """

    stages: tuple[Stage, ...]
    offspring: int
    generations: int
    patience: int
    min_gain: float = 2e-3
    drawn: int = 1


@dataclass(frozen=True)
class EvolutionState:
    """Where an evolution stands; with the settings and the seed all that is needed to go on.

    Attributes:
        best: the present allocation, a width for each group.
        fitness: its score on the windows that it was scored on last; None before the first generation.
        generation: generations done.
        idle: generations since the last gain.
        seen: every allocation that was ever scored.
    """

    best: Genome
    fitness: float | None = None
    generation: int = 0
    idle: int = 0
    seen: frozenset[Genome] = field(default=frozenset(), repr=False)


def next_generation(
    state: EvolutionState,
    costs: Costs,
    limit: int,
    score: Score,
    windows: int,
    settings: EvolutionSettings,
    seed: int,
    predict: Callable[[Genome], float] | None = None,
) -> EvolutionState:
    """One generation.

    The parent is scored beside its offspring in every stage, on the same windows, and stays unless one of them is
    better in the last. All choices depend on the seed and on the number of the generation only.

    Args:
        state: a parent within the limit.
        costs: for each group ``{width: cost}``, rising with the width.
        limit: on the total cost.
        score: mean loss of each of some allocations on some windows, named by number.
        windows: how many there are to draw from.
        settings: of the whole evolution.
        seed: of the whole evolution.
        predict: estimates a loss without scoring.
    """
    rng = random.Random(f"{seed}/{state.generation}")
    parent = state.best
    children = _propose(state, costs, limit, settings, rng, predict)
    seen = state.seen | {parent, *children}
    best, fitness, gained = parent, state.fitness, False
    for stage in settings.stages if children else ():
        unchanged, *losses = score([parent, *children], rng.sample(range(windows), stage.windows))
        ranked = sorted(zip(losses, children, strict=True))
        children = [child for _, child in ranked[: stage.keep]]
        fitness, best = min((unchanged, parent), ranked[0], key=lambda pair: pair[0])
        gained = fitness < unchanged * (1 - settings.min_gain)
    return EvolutionState(best, fitness, state.generation + 1, 0 if gained else state.idle + 1, seen)


def stopped(state: EvolutionState, settings: EvolutionSettings) -> str | None:
    """Why an evolution is over, or None if it goes on."""
    if state.idle >= settings.patience:
        return f"no gain in {_generations(state.idle)}"
    if state.generation >= settings.generations:
        return f"{_generations(state.generation)} done"
    return None


def _generations(count: int) -> str:
    return f"{count} generation{'' if count == 1 else 's'}"


def _propose(
    state: EvolutionState,
    costs: Costs,
    limit: int,
    settings: EvolutionSettings,
    rng: random.Random,
    predict: Callable[[Genome], float] | None,
) -> list[Genome]:
    """New allocations near the best one, none of them seen before; fewer than wanted where there are no more."""
    wanted = settings.offspring * settings.drawn
    proposals: dict[Genome, None] = {}  # in order, unlike a set
    for _ in range(_ATTEMPTS * wanted):
        child = state.best
        for _ in range(rng.randint(1, _MOST_EXCHANGES)):
            child = exchange(child, costs, limit, rng) or child
        if child != state.best and child not in state.seen:
            proposals[child] = None
        if len(proposals) == wanted:
            break
    if predict is None:
        return list(proposals)
    return sorted(proposals, key=predict)[: settings.offspring]


def exchange(genome: Genome, costs: Costs, limit: int, rng: random.Random) -> Genome | None:
    """Raise one group by a step, pay for it by lowering others, and spend what is left over on further raises.

    Groups may have any sizes: as many are lowered as it takes, and only what fits is raised.

    Args:
        genome: a width for each group, within the limit.
        costs: for each group ``{width: cost}``, rising with the width.
        limit: on the total cost.
        rng: of all choices.

    Returns:
        A genome within the limit, or None if there is nothing to exchange: no group can be raised, even if all others
        are lowered as far as they go.
    """
    ladder = _Ladder(genome, costs)
    order = list(range(len(genome)))
    rng.shuffle(order)
    slack = limit - ladder.spent
    reserve = sum(map(ladder.reserve, order))  # what lowering everything would free
    raised = next((g for g in order if 0 < ladder.step(g, 1) <= slack + reserve - ladder.reserve(g)), None)
    if raised is None:
        return None
    ladder.move(raised, 1)
    donors = [group for group in order if group != raised]
    rng.shuffle(donors)
    lowered = {raised}
    while ladder.spent > limit:
        donor = next(group for group in donors if ladder.step(group, -1))
        ladder.move(donor, -1)
        lowered.add(donor)
        donors.remove(donor)
        donors.append(donor)  # each pays once before one pays twice
    _fill(ladder, [group for group in order if group not in lowered], limit, rng)
    return tuple(ladder.widths)


def fill(genome: Genome, costs: Costs, limit: int, rng: random.Random) -> Genome:
    """Raise random groups step by step until no raise fits."""
    ladder = _Ladder(genome, costs)
    _fill(ladder, list(range(len(genome))), limit, rng)
    return tuple(ladder.widths)


class _Ladder:
    """The widths of a genome as steps that can be gone up and down, with their total cost."""

    def __init__(self, genome: Genome, costs: Costs) -> None:
        self.widths = list(genome)
        self.spent = sum(cost[bits] for cost, bits in zip(costs, genome, strict=True))
        self._costs = costs
        self._steps = [sorted(cost) for cost in costs]

    def _next(self, group: int, direction: int) -> int:
        steps = self._steps[group]
        position = steps.index(self.widths[group]) + direction
        return steps[position] if 0 <= position < len(steps) else self.widths[group]

    def step(self, group: int, direction: int) -> int:
        """What a step up (1) or down (-1) would add to the cost; 0 at the end of the ladder."""
        return self._costs[group][self._next(group, direction)] - self._costs[group][self.widths[group]]

    def reserve(self, group: int) -> int:
        """What going all the way down would free."""
        return self._costs[group][self.widths[group]] - self._costs[group][self._steps[group][0]]

    def move(self, group: int, direction: int) -> None:
        self.spent += self.step(group, direction)
        self.widths[group] = self._next(group, direction)


def _fill(ladder: _Ladder, groups: list[int], limit: int, rng: random.Random) -> None:
    while groups:
        group = rng.choice(groups)
        if 0 < ladder.step(group, 1) <= limit - ladder.spent:
            ladder.move(group, 1)
        else:
            groups.remove(group)
