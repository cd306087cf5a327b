"""What was measured on a checkpoint, kept beside it in ``evaluation.json``: its card is made from this.

    {"texts": [...], "tasks": [...]}

Each entry is one way of measuring (``protocol``, ``reference``, ``settings``, of a text ``measured_on``) with a row
for each width and for each allocation that lies with the checkpoint. Measuring the same way again replaces the rows
measured and keeps the others; the last measured entry comes last. Figures of codes or scales that have changed since
are not shown any more.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

from matgptq.allocation import format_lines
from matgptq.checkpoints.allocation_scales import SCALES
from matgptq.checkpoints.allocation_store import stored_allocations
from matgptq.checkpoints.checkpoint import Checkpoint
from matgptq.checkpoints.evaluation_results import Evaluation, TaskEvaluation
from matgptq.checkpoints.format import RECORD_NAME
from matgptq.errors import CheckpointError, SourceError
from matgptq.files.atomic import json_text, write_text
from matgptq.files.json_files import read_json
from matgptq.models.source import public_name

Record = dict[str, list[dict[str, Any]]]
_KINDS = ("texts", "tasks")
_ROW = {"bits", "bits_per_weight", "allocation"}
_IDENTITY = ("protocol", "reference", "settings", "measured_on")


def read_record(checkpoint: Checkpoint) -> Record:
    """What is recorded of a checkpoint as it is now: ``texts`` and ``tasks``, empty lists if nothing is.

    Raises:
        CheckpointError: the file is damaged; names it.
    """
    file = checkpoint.path / RECORD_NAME
    if not file.exists():
        return {kind: [] for kind in _KINDS}
    try:
        record = read_json(file)
    except SourceError as error:
        raise CheckpointError(f"{error}; delete it to measure anew") from error
    for kind in _KINDS:
        entries = record.get(kind)
        if not isinstance(entries, list) or not all(map(_is_entry, entries)):
            raise CheckpointError(f"{file}: {kind} is not a list of results; delete the file to measure anew")
    present = _Present(checkpoint)
    for entry in (entry for kind in _KINDS for entry in record[kind]):
        entry["results"] = [row for row in entry["results"] if row.get("weights") == present.weights(row)]
    return {kind: [entry for entry in record[kind] if entry["results"]] for kind in _KINDS}


def record_evaluation(checkpoint: Checkpoint, evaluation: Evaluation | TaskEvaluation) -> None:
    """Add results to the record of a checkpoint. The file is replaced at once or not at all.

    Raises:
        CheckpointError: the record is damaged, or the directory cannot be written.
    """
    present = _Present(checkpoint)
    rows = [result.to_dict() for result in evaluation.results]
    results = [row | {"weights": weights} for row in rows if (weights := present.weights(row)) is not None]
    if not results:
        return
    record = read_record(checkpoint)
    entry: dict[str, Any] = {
        "protocol": evaluation.protocol,
        "reference": None if evaluation.reference is None else public_name(evaluation.reference),
        "settings": dict(evaluation.settings),
        "measured_on": evaluation.measured_on if isinstance(evaluation, Evaluation) else None,
    }
    kind = "tasks" if isinstance(evaluation, TaskEvaluation) else "texts"
    known = next((old for old in record[kind] if all(old.get(key) == entry[key] for key in _IDENTITY)), None)
    if known is not None:
        record[kind].remove(known)
        results = _merge(known["results"], results)
    if isinstance(evaluation, TaskEvaluation):
        before = known or {}
        entry["shown"] = list(dict.fromkeys([*before.get("shown", ()), *evaluation.shown]))
        full = evaluation.to_dict()["reference_scores"]
        entry["reference_scores"] = None if full is None else {**(before.get("reference_scores") or {}), **full}
    else:
        entry["reference_perplexity"] = evaluation.reference_perplexity
    record[kind].append(entry | {"results": results})
    write_text(checkpoint.path / RECORD_NAME, json_text(dict(record)))


def _is_entry(entry: Any) -> bool:
    """Whether an entry has what the card is made from."""
    if not isinstance(entry, dict) or not {"protocol", "settings", "results"} <= entry.keys():
        return False
    rows = entry["results"]
    return isinstance(rows, list) and all(isinstance(row, dict) and row.keys() >= _ROW for row in rows)


class _Present:
    """The weights that a checkpoint serves now."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._stored = stored_allocations(checkpoint)
        self._of_width = functools.cache(checkpoint.width_identity)

    def weights(self, row: Mapping[str, Any]) -> str | None:
        """Digits that stand for the weights of a row; None for an allocation that does not lie with the checkpoint."""
        name = row.get("allocation")
        if name is None:
            bits = row["bits"]
            return self._of_width(bits) if isinstance(bits, int) else self._checkpoint.identity  # a mixed slice
        if name not in self._stored:
            return None
        record = self._stored[name]
        own = record.get(SCALES)
        layers = dict.fromkeys(self._checkpoint.layers, self._checkpoint.settings.bits) | record.get("layers", record)
        # Those without scales of their own read those of their widths.
        read = [self._of_width(bits) for bits in sorted({*layers.values()})]
        if isinstance(own, dict):
            read = [own.get("sha256", "")]
        text = f"{self._checkpoint.codes_identity} {read}\n{format_lines(layers)}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of both by size; of one width the new row, with the scores of tasks that only the old one has."""
    rows = {_key(row): row for row in old}
    for row in new:
        before = rows.get(_key(row), {})
        rows[_key(row)] = row | ({"scores": before.get("scores", {}) | row["scores"]} if "scores" in row else {})
    return sorted(rows.values(), key=lambda row: float(row["bits_per_weight"]))


def _key(row: Mapping[str, Any]) -> Any:
    return row.get("allocation") or row["bits"]
