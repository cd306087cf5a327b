"""The long part of a search: tables and evolutions, kept in files so that neither is measured twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matgptq.files.atomic import write_text
from matgptq.files.run_log import RunLog
from matgptq.progress import Progress
from matgptq.width_search.budget import Budget, SearchSpace
from matgptq.width_search.evolution import EvolutionState, fill, next_generation, stopped
from matgptq.width_search.optimum import Genome, optimum
from matgptq.width_search.scoring import Scorer
from matgptq.width_search.sensitivity import measure_table, table_scores
from matgptq.width_search.settings import SearchSettings

Losses = Sequence[Mapping[int, float]]


class SearchRun:
    """Tables, evolutions and final measurements of one checkpoint on one text.

    Args:
        space: what an allocation can be.
        settings: of the search.
        scorer: of the pool's windows, and the held-out ones behind them.
        identity: JSON-ready; all that a score depends on but the text and the allocation: checkpoint, full model,
            fitness, how layers are grouped, device, dtype.
        directory: where tables and states are kept.
        log: receives events.
        progress: receives stages and notes.

    Attributes:
        tokens_scored: tokens that candidates were scored on, in this run and in those that it goes on with.
    """

    def __init__(
        self,
        space: SearchSpace,
        settings: SearchSettings,
        scorer: Scorer,
        identity: Mapping[str, Any],
        directory: Path,
        log: RunLog,
        progress: Progress,
    ) -> None:
        self._space = space
        self._settings = settings
        self._scorer = scorer
        self._identity = identity
        self._directory = directory
        self._log = log
        self._progress = progress
        self.tokens_scored = 0

    def table(self) -> Losses:
        """For each group what it loses at each width, measured now or before."""
        settings, space = self._settings, self._space
        windows, candidates = settings.table_windows, table_scores(space)
        self._progress.start("sensitivity of each group", candidates)
        file = self._file("sensitivity", windows, widths=space.widths)
        table = measure_table(
            space, lambda genomes: self._scorer.score(genomes, range(windows)), file, self._progress.advance
        )
        tokens = candidates * windows * settings.seqlen
        self.tokens_scored += tokens
        self._log.write("table", file=file.name, base=table.base, tokens=tokens)
        return table.losses(space)

    def refine(self, budget: Budget, losses: Losses | None, *, resume: bool) -> EvolutionState:
        """The best allocation found within a budget.

        Args:
            budget: within the range of the space.
            losses: of ``table``; None starts from the best of some random allocations near a uniform width.
            resume: go on with an earlier run of the same settings, if there is one.
        """
        settings, evolution, costs = self._settings, self._settings.evolution, self._space.costs
        kept = {field: value for field, value in dataclasses.asdict(settings).items() if field != "evolution"}
        file = self._file("state", settings.pool, **kept, budget=budget.bits, offspring=evolution.offspring)
        self._progress.start(f"refine {budget.name}", evolution.generations)
        state, tokens = (_read_state(file) if resume else None) or self._start(budget, losses)
        self._progress.advance(state.generation)
        predict = None if losses is None else partial(_predicted, losses)
        while (reason := stopped(state, evolution)) is None:
            counted = _Counted(self._scorer, settings.seqlen)
            state = next_generation(
                state, costs, budget.bits, counted, settings.pool, evolution, settings.seed, predict
            )
            tokens += counted.tokens
            write_text(file, _state_text(state, tokens))
            self._log.write(
                "generation", budget=budget.name, generation=state.generation, fitness=state.fitness, idle=state.idle,
                tokens=tokens, candidates=len(state.seen), best=_digits(state.best),
            )  # fmt: skip
            self._progress.advance()
        self._progress.note(f"{budget.name}: stopped, {reason}")
        self.tokens_scored += tokens
        return state

    def held_out(self, genomes: Sequence[Genome]) -> list[float]:
        """Scores on the windows behind the pool."""
        pool = self._settings.pool
        self._progress.start("measure on other text", 1)
        return self._scorer.score(genomes, range(pool, pool + self._settings.held_out))

    def _start(self, budget: Budget, losses: Losses | None) -> tuple[EvolutionState, int]:
        """What the evolution starts from, and the tokens it took to find it."""
        space, evolution, costs = self._space, self._settings.evolution, self._space.costs
        if losses is not None:
            return EvolutionState(optimum(losses, costs, budget.bits)), 0
        rng = random.Random(self._settings.seed)
        uniform = max(bits for bits in space.widths if space.cost(space.uniform(bits)) <= budget.bits)
        filled = [fill(space.uniform(uniform), costs, budget.bits, rng) for _ in range(evolution.offspring)]
        candidates = list(dict.fromkeys(filled))
        counted = _Counted(self._scorer, self._settings.seqlen)
        windows = rng.sample(range(self._settings.pool), evolution.stages[0].windows)
        scores = counted(candidates, windows) if len(candidates) > 1 else [0.0]
        best = candidates[scores.index(min(scores))]
        return EvolutionState(best, seen=frozenset(candidates)), counted.tokens

    def _file(self, role: str, windows: int, **more: Any) -> Path:
        """Where something is kept that depends on the identity, the first windows and what else is named."""
        tokens = hashlib.sha256(self._scorer.windows[:windows].numpy().tobytes()).hexdigest()
        key = json.dumps({**self._identity, "tokens": tokens, "windows": windows, **more}, sort_keys=True)
        return self._directory / f"{role}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


class _Counted:
    """A scoring function that counts tokens."""

    def __init__(self, scorer: Scorer, seqlen: int) -> None:
        self._scorer = scorer
        self._seqlen = seqlen
        self.tokens = 0

    def __call__(self, genomes: Sequence[Genome], rows: Sequence[int]) -> list[float]:
        self.tokens += len(genomes) * len(rows) * self._seqlen
        return self._scorer.score(genomes, rows)


def _predicted(losses: Losses, genome: Genome) -> float:
    return sum(own[bits] for own, bits in zip(losses, genome, strict=True))


def _digits(genome: Genome) -> str:
    """A genome as text: all widths have one digit."""
    return "".join(map(str, genome))


def _state_text(state: EvolutionState, tokens: int) -> str:
    record = dataclasses.asdict(state)
    record |= {"best": _digits(state.best), "seen": sorted(map(_digits, state.seen)), "tokens": tokens}
    return json.dumps(record) + "\n"


def _read_state(file: Path) -> tuple[EvolutionState, int] | None:
    """An earlier run's state and the tokens that it took; None if there was none, or its file is damaged."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        tokens = int(record.pop("tokens"))
        best = tuple(map(int, record.pop("best")))
        seen = frozenset(tuple(map(int, text)) for text in record.pop("seen"))
        return EvolutionState(best=best, seen=seen, **record), tokens
    except (OSError, ValueError, KeyError, TypeError):
        return None
