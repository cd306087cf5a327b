"""What a search is asked to do, as data; everything in it changes the answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from matgptq.errors import ConfigurationError
from matgptq.slicing import check_widths
from matgptq.width_search.evolution import EvolutionSettings, Stage
from matgptq.width_search.scoring import Fitness

Method = Literal["sensitivity", "evolution"]
Fuse = Literal["serving", "none"]
DEFAULT_TOKENS = 16384
DEFAULT_SEQLEN = 512
# Shares of the pool: what a table and the first round of a generation are scored on, what the last round is scored
# on, and how much text is held out beside the pool.
_FIRST_SHARE, _LAST_SHARE, _HELD_OUT_SHARE = 8, 2, 2
_FINALISTS = 4  # of so many candidates one goes on to the last round
_EVOLUTIONS: dict[str, dict[str, int]] = {
    "sensitivity": {"offspring": 24, "generations": 8, "patience": 2, "drawn": 8},
    # Of several budgets the curve is wanted, not the last percent of each.
    "sweep": {"offspring": 12, "generations": 4, "patience": 1, "drawn": 8},
    "evolution": {"offspring": 24, "generations": 40, "patience": 40, "drawn": 1},
}


@dataclass(frozen=True)
class SearchSettings:
    """A search, but for the checkpoint, the text and the budget.

    Attributes:
        method: ``sensitivity`` or ``evolution``.
        fitness: ``kl`` or ``ppl``.
        fuse: ``serving`` or ``none``.
        widths: that a group may have, ascending.
        seed: of the text and of the evolution.
        pool: windows to score candidates on.
        seqlen: tokens in a window.
        evolution: of the refinement.
    """

    method: Method
    fitness: Fitness
    fuse: Fuse
    widths: tuple[int, ...]
    seed: int
    pool: int
    seqlen: int
    evolution: EvolutionSettings

    @property
    def table_windows(self) -> int:
        """Windows that a table is measured on: the first of the pool."""
        return self.pool // _FIRST_SHARE

    @property
    def held_out(self) -> int:
        """Windows beside the pool, to measure winners on."""
        return self.pool // _HELD_OUT_SHARE


def make_settings(
    *,
    method: Method,
    fitness: Fitness,
    fuse: Fuse,
    widths: Iterable[int],
    seed: int,
    tokens: int,
    seqlen: int,
    generations: int | None,
    offspring: int | None,
    budgets: int = 1,
) -> SearchSettings:
    """Settings with the defaults of a method.

    Args:
        budgets: how many are searched; several are refined less, each.
        tokens: size of the pool.
        generations, offspring: None for the method's default; the others as in ``SearchSettings``.

    Raises:
        ConfigurationError: an option is out of range; names it.
    """
    allowed: dict[str, tuple[str, Any]] = {
        "method": (method, Method), "fitness": (fitness, Fitness), "fuse": (fuse, Fuse)
    }  # fmt: skip
    for name, (value, type_) in allowed.items():
        if value not in get_args(type_):
            raise ConfigurationError(f"{name} must be one of {', '.join(get_args(type_))}, not {value!r}")
    if seqlen < 2:
        raise ConfigurationError(f"seqlen must be at least 2, not {seqlen}")
    pool = tokens // seqlen
    if pool < _FIRST_SHARE:
        raise ConfigurationError(
            f"{tokens} tokens are too few to search on: {_FIRST_SHARE} windows of {seqlen} take {_FIRST_SHARE * seqlen}"
        )
    numbers = dict(_EVOLUTIONS["sweep" if method == "sensitivity" and budgets > 1 else method])
    if offspring is not None:
        numbers["offspring"] = offspring
    if generations is not None:
        numbers["generations"] = generations
    if numbers["offspring"] < 1 or numbers["generations"] < 0:
        raise ConfigurationError("offspring must be at least 1, and generations at least 0")
    finalists = max(1, numbers["offspring"] // _FINALISTS)
    stages = (Stage(pool // _FIRST_SHARE, finalists), Stage(pool // _LAST_SHARE, 1))
    return SearchSettings(
        method, fitness, fuse, check_widths(widths), seed, pool, seqlen, EvolutionSettings(stages, **numbers)
    )
