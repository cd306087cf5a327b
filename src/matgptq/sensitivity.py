"""How much each group of layers loses at each width, measured on the whole model, one group at a time.

The table is what a search starts from. It is kept in a file that is written after each block, so that an interrupted
measurement goes on where it stopped, and every later search of the same checkpoint on the same text finds it done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from matgptq.atomic_files import write_text
from matgptq.budget import SearchSpace
from matgptq.optimum import Genome

Score = Callable[[Sequence[Genome]], list[float]]
# The error of a grid is a quarter with each bit more, in the square, and KL is quadratic in small errors.
_PER_BIT = 4.0
_LEAST_LOSS = 1e-9  # noise must not make a smaller width look free
# What lies between and above these is so close to them that rounding noise would decide; it is interpolated.
_MEASURED = (2, 3, 4, 6)


@dataclass
class SensitivityTable:
    """Scores of a model with all groups at the largest width, and with one group at another.

    Attributes:
        base: score with all groups at the largest width.
        scores: for each group measured so far ``{width: score}``.
    """

    base: float | None = None
    scores: dict[int, dict[int, float]] = field(default_factory=dict)

    def losses(self, widths: Sequence[int]) -> list[dict[int, float]]:
        """For each group ``{width: what it loses against the largest width}``, never less at a smaller width."""
        assert self.base is not None
        base = self.base
        in_order = (own for _, own in sorted(self.scores.items()))
        return [_complete({bits: value - base for bits, value in own.items()}, widths) for own in in_order]


def _complete(measured: Mapping[int, float], widths: Sequence[int]) -> dict[int, float]:
    """All widths from the measured ones; the largest loses nothing, and each smaller one more than the next."""
    losses = {widths[-1]: 0.0}
    least = _LEAST_LOSS
    for bits in sorted(measured, reverse=True):
        losses[bits] = max(measured[bits], least)
        least = losses[bits] * (1 + 1e-6)
    for bits in sorted(set(widths) - set(losses), reverse=True):
        below = max(width for width in losses if width < bits)
        above = min(width for width in losses if width > bits)
        if losses[above] > 0:
            losses[bits] = losses[below] * (losses[above] / losses[below]) ** ((bits - below) / (above - below))
        else:
            losses[bits] = losses[below] / _PER_BIT ** (bits - below)
    return losses


def measured_widths(widths: Sequence[int]) -> list[int]:
    """The widths that a table measures: the smallest, and all that are not interpolated."""
    return [bits for bits in widths[:-1] if bits in _MEASURED or bits == widths[0]]


def measure_table(space: SearchSpace, score: Score, file: Path, tick: Callable[[int], None]) -> SensitivityTable:
    """Measure a table, or what a file of an earlier measurement lacks of it.

    Args:
        space: groups and widths.
        score: of some allocations, always on the same text.
        file: where it is kept; its name must stand for the checkpoint, the text and everything else that matters.
        tick: called with the number of scores that are there now in addition.

    Raises:
        CheckpointError: the file cannot be written.
    """
    table = _read(file)
    widths = measured_widths(space.widths)
    largest = space.uniform(space.widths[-1])
    for _, members in groupby(range(len(space.groups)), key=lambda index: space.groups[index].block):
        groups = list(members)
        tried = [(group, bits) for group in groups for bits in widths]
        if not all(group in table.scores for group in groups):
            genomes = [(*largest[:group], bits, *largest[group + 1 :]) for group, bits in tried]
            if table.base is None:
                table.base, *scores = score([largest, *genomes])
            else:
                scores = score(genomes)
            for (group, bits), value in zip(tried, scores, strict=True):
                table.scores.setdefault(group, {})[bits] = value
            write_text(file, json.dumps({"base": table.base, "scores": table.scores}) + "\n")
        tick(len(tried))
    return table


def _read(file: Path) -> SensitivityTable:
    """What an earlier measurement left; nothing if there was none, or the file is damaged."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        scores = {
            int(group): {int(bits): float(v) for bits, v in own.items()} for group, own in record["scores"].items()
        }
        return SensitivityTable(float(record["base"]), scores)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return SensitivityTable()
