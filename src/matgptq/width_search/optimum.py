"""The exact optimum of an additive model: a width for each group, least total loss, total cost within a limit.

This is the multiple-choice knapsack problem. Groups are added one after another; of all partial choices only those
are kept that no other one beats in both cost and loss, and that can still beat a feasible choice already known. The
bound behind the second test is Lagrange's: for any price per unit of cost, the loss of the remaining groups is at
least their least (loss + price * cost), minus the price of what is left to spend. Costs are integers and are never
rounded, so nothing is lost, whatever the sizes of the groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Genome = tuple[int, ...]
_Losses = list[NDArray[np.float64]]
_Costs = list[NDArray[np.int64]]
_PRICE_STEPS = 200


def optimum(losses: Sequence[Mapping[int, float]], costs: Sequence[Mapping[int, int]], limit: int) -> Genome:
    """The widths of least total loss among those whose total cost is at most ``limit``.

    Args:
        losses: for each group ``{width: loss}``; finite, any sign, not necessarily monotone.
        costs: for each group ``{width: cost}`` with the same widths.
        limit: at least the sum of the smallest costs.

    Returns:
        One width for each group.

    Raises:
        ValueError: nothing is within the limit.
    """
    widths = [sorted(own) for own in costs]
    loss = [np.array([own[bits] for bits in order]) for own, order in zip(losses, widths, strict=True)]
    cost = [np.array([own[bits] for bits in order], np.int64) for own, order in zip(costs, widths, strict=True)]
    if sum(int(own.min()) for own in cost) > limit:
        raise ValueError("no choice of widths is within the limit")
    price, picks = _best_price(loss, cost, limit)
    _spend_rest(picks, loss, cost, limit)
    known = sum(float(own[pick]) for own, pick in zip(loss, picks, strict=True))
    # What the groups from i on add at least: to loss + price * cost, and to the cost.
    least = _from_each([float((own + price * paid).min()) for own, paid in zip(loss, cost, strict=True)])
    cheapest = _from_each([int(own.min()) for own in cost])
    # Rounding of the sums must not cut off the known choice itself.
    rounding = 1e-12 * sum(float(np.abs(own).max() + price * paid.max()) for own, paid in zip(loss, cost, strict=True))
    if known > least[0] - price * limit + rounding:
        picks = _search(loss, cost, limit, price, known + rounding, least, cheapest)
    return tuple(order[pick] for order, pick in zip(widths, picks, strict=True))


def _spend_rest(picks: list[int], loss: _Losses, cost: _Costs, limit: int) -> None:
    """Improve a choice by single changes that fit, the largest gain first; a good choice makes the bound sharp."""
    while True:
        rest = limit - sum(int(own[pick]) for own, pick in zip(cost, picks, strict=True))
        gain, group, better = 0.0, -1, -1
        for index, (own_loss, own_cost, pick) in enumerate(zip(loss, cost, picks, strict=True)):
            gains = np.where(own_cost - own_cost[pick] <= rest, own_loss[pick] - own_loss, -np.inf)
            if gains.max() > gain:
                gain, group, better = float(gains.max()), index, int(gains.argmax())
        if group < 0:
            return
        picks[group] = better


def _search(
    loss: _Losses,
    cost: _Costs,
    limit: int,
    price: float,
    most: float,
    least: Sequence[float],
    cheapest: Sequence[float],
) -> list[int]:
    """Positions of the best choice of total loss at most ``most``, which exists."""
    total_cost, total_loss = np.zeros(1, np.int64), np.zeros(1)
    steps: list[NDArray[np.int64]] = []  # of each state the one it came from, times the widths, plus the width taken
    for index, (own_loss, own_cost) in enumerate(zip(loss, cost, strict=True), 1):
        new_cost = (total_cost[:, None] + own_cost).ravel()
        new_loss = (total_loss[:, None] + own_loss).ravel()
        bound = new_loss + least[index] - price * (limit - new_cost)
        states = np.flatnonzero((new_cost + cheapest[index] <= limit) & (bound <= most))
        # By cost, and by loss among equals; a state survives if it is better than everything that is cheaper.
        states = states[np.lexsort((new_loss[states], new_cost[states]))]
        best = np.minimum.accumulate(new_loss[states])
        states = states[np.concatenate(([True], new_loss[states][1:] < best[:-1]))]
        total_cost, total_loss = new_cost[states], new_loss[states]
        steps.append(states)
    state = int(np.argmin(total_loss))
    picks = []
    for states, own in zip(reversed(steps), reversed(cost), strict=True):
        state, pick = divmod(int(states[state]), len(own))
        picks.append(pick)
    return picks[::-1]


def _from_each(values: Sequence[float]) -> list[float]:
    """Sums of the values from each position on, and 0 behind the last."""
    sums = [0.0 if isinstance(values[0], float) else 0]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return sums[::-1]


def _best_price(loss: _Losses, cost: _Costs, limit: int) -> tuple[float, list[int]]:
    """The least price per unit of cost at which the best choice is within the limit, and that choice."""

    def choose(price: float) -> list[int]:
        # Among equals the cheapest: at price 0 what costs more for nothing could look infeasible.
        return [
            int(np.lexsort((paid, own + price * paid))[0]) if price == 0 else int(np.argmin(own + price * paid))
            for own, paid in zip(loss, cost, strict=True)
        ]

    def fits(picks: list[int]) -> bool:
        return sum(int(own[pick]) for own, pick in zip(cost, picks, strict=True)) <= limit

    picks = choose(0.0)
    if fits(picks):
        return 0.0, picks
    low, high = 0.0, 1.0 / max(1, limit)
    while not fits(picks := choose(high)):
        low, high = high, 2 * high
    for _ in range(_PRICE_STEPS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        chosen = choose(middle)
        if fits(chosen):
            high, picks = middle, chosen
        else:
            low = middle
    return high, picks
