"""How much each group of layers loses at each width, measured on the whole model with all others at the largest width.

    small widths    one score for each group and width
    larger widths   one score for each kind of layer and width, with all groups of the kind at that width; a group's
                    share of it is its share of what the kind loses at the largest of the small widths

Losses fall by about a factor of four with each bit, and nearly in proportion for all groups of a kind, but the noise
of a score does not fall: a group alone at 6 bits loses less than bfloat16 rounds off, thirty of them together do not.
The second line is therefore more exact than measuring each group, and a fifth of the work.

The table is kept in a file that is written after each block, so that an interrupted measurement goes on where it
stopped, and every later search of the same checkpoint on the same text finds it done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from matgptq.files.atomic import write_text
from matgptq.width_search.budget import SearchSpace
from matgptq.width_search.optimum import Genome

Score = Callable[[Sequence[Genome]], list[float]]
_LARGEST_ALONE = 3  # width up to which each group is measured
_LEAST_LOSS = 1e-9  # noise must not make a smaller width look free


@dataclass
class SensitivityTable:
    """Scores of a model with all groups at the largest width but for one, or but for those of one kind.

    Attributes:
        base: score with all groups at the largest width; None before anything is measured.
        alone: ``{group: {width: score}}``.
        together: ``{kind: {width: score}}``.
    """

    base: float | None = None
    alone: dict[int, dict[int, float]] = field(default_factory=dict)
    together: dict[str, dict[int, float]] = field(default_factory=dict)

    def losses(self, space: SearchSpace) -> list[dict[int, float]]:
        """For each group ``{width: what it loses against the largest width}``, more at each smaller width."""
        assert self.base is not None
        widths = alone_widths(space.widths)
        anchor = widths[-1]
        at_anchor = [max(self.alone[index][anchor] - self.base, _LEAST_LOSS) for index in range(len(space.groups))]
        of_kind: dict[str, float] = {}
        for group, loss in zip(space.groups, at_anchor, strict=True):
            of_kind[group.kind] = of_kind.get(group.kind, 0.0) + loss
        losses = []
        for index, group in enumerate(space.groups):
            measured = {bits: self.alone[index][bits] - self.base for bits in widths}
            share = at_anchor[index] / of_kind[group.kind]
            for bits, score in self.together[group.kind].items():
                measured[bits] = (score - self.base) * share
            losses.append(_falling(measured, space.widths))
        return losses


def alone_widths(widths: Sequence[int]) -> list[int]:
    """The small widths, at which each group is measured: at least the smallest one."""
    return [bits for bits in widths[:-1] if bits <= _LARGEST_ALONE] or list(widths[:1])


def table_scores(space: SearchSpace) -> int:
    """Number of scores that a table takes."""
    alone = alone_widths(space.widths)
    kinds = len({group.kind for group in space.groups})
    return 1 + len(space.groups) * len(alone) + kinds * max(0, len(space.widths) - 1 - len(alone))


def measure_table(space: SearchSpace, score: Score, file: Path, tick: Callable[[int], None]) -> SensitivityTable:
    """Measure a table, or what a file of an earlier measurement lacks of it.

    Args:
        space: groups and widths.
        score: of some allocations, always on the same text.
        file: where it is kept; its name must stand for the checkpoint, the text and everything else that matters.
        tick: called with the number of scores that are there in addition.

    Raises:
        CheckpointError: the file cannot be written.
    """
    table = read_table(file)
    largest = space.uniform(space.widths[-1])
    alone = alone_widths(space.widths)
    if table.base is None:
        together = [
            (kind, bits)
            for kind in dict.fromkeys(group.kind for group in space.groups)
            for bits in space.widths[:-1]
            if bits not in alone
        ]
        genomes = [
            tuple(bits if group.kind == kind else other for group, other in zip(space.groups, largest, strict=True))
            for kind, bits in together
        ]
        table.base, *scores = score([largest, *genomes])
        for group in space.groups:
            table.together[group.kind] = {}
        for (kind, bits), value in zip(together, scores, strict=True):
            table.together[kind][bits] = value
        _write(file, table)
    tick(table_scores(space) - len(space.groups) * len(alone))
    for _, members in groupby(range(len(space.groups)), key=lambda index: space.groups[index].block):
        tried = [(index, bits) for index in members for bits in alone]
        if not all(index in table.alone for index, _ in tried):
            scores = score([(*largest[:index], bits, *largest[index + 1 :]) for index, bits in tried])
            for (index, bits), value in zip(tried, scores, strict=True):
                table.alone.setdefault(index, {})[bits] = value
            _write(file, table)
        tick(len(tried))
    return table


def _falling(measured: Mapping[int, float], widths: Sequence[int]) -> dict[int, float]:
    """Losses that rise with each step down from the largest width, which loses nothing."""
    losses = {widths[-1]: 0.0}
    least = _LEAST_LOSS
    for bits in sorted(measured, reverse=True):
        losses[bits] = max(measured[bits], least)
        least = losses[bits] * (1 + 1e-6)
    return losses


def _write(file: Path, table: SensitivityTable) -> None:
    write_text(file, json.dumps({"base": table.base, "alone": table.alone, "together": table.together}) + "\n")


def read_table(file: Path) -> SensitivityTable:
    """What an earlier measurement left; nothing if there was none, or the file is damaged."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return SensitivityTable(
            float(record["base"]),
            {int(group): _widths(scores) for group, scores in record["alone"].items()},
            {kind: _widths(scores) for kind, scores in record["together"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return SensitivityTable()


def _widths(scores: Mapping[str, float]) -> dict[int, float]:
    return {int(bits): float(value) for bits, value in scores.items()}
