"""What was measured on a checkpoint, kept beside it in ``evaluation.json``: its card is made from this.

    {"checkpoint": identity, "texts": [...], "tasks": [...]}

Each entry is one way of measuring (``protocol``, ``reference``, ``settings``, of a text ``measured_on``) with a row
for each width and for each allocation that lies with the checkpoint. Measuring the same way again replaces the rows
measured and keeps the others; the last measured entry comes last. Figures of codes or scales that have changed since
are not shown any more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from matgptq.allocation import format_lines
from matgptq.allocation_scales import SCALES
from matgptq.allocation_store import stored_allocations
from matgptq.atomic_files import json_text, write_text
from matgptq.checkpoint import Checkpoint
from matgptq.errors import CheckpointError, SourceError
from matgptq.evaluation_results import Evaluation, TaskEvaluation
from matgptq.format import RECORD_NAME
from matgptq.json_files import read_json
from matgptq.source import public_name

Record = dict[str, list[dict[str, Any]]]
_KINDS = ("texts", "tasks")
_ROW = {"bits", "bits_per_weight", "allocation", "layers"}
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
    if record.get("checkpoint") != checkpoint.identity:  # refined since, or copied from another one
        return {kind: [] for kind in _KINDS}
    present = _present_allocations(checkpoint)
    for entry in (entry for kind in _KINDS for entry in record[kind]):
        entry["results"] = [
            row for row in entry["results"] if row.get("layers") == present.get(row.get("allocation"), "gone")
        ]
    return {kind: [entry for entry in record[kind] if entry["results"]] for kind in _KINDS}


def record_evaluation(checkpoint: Checkpoint, evaluation: Evaluation | TaskEvaluation) -> None:
    """Add results to the record of a checkpoint. The file is replaced at once or not at all.

    Raises:
        CheckpointError: the record is damaged, or the directory cannot be written.
    """
    present = _present_allocations(checkpoint)
    results = [
        {**result.to_dict(), "layers": present[result.allocation]}
        for result in evaluation.results
        if result.allocation in present
    ]
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
    write_text(checkpoint.path / RECORD_NAME, json_text({"checkpoint": checkpoint.identity, **record}))


def _is_entry(entry: Any) -> bool:
    """Whether an entry has what the card is made from."""
    if not isinstance(entry, dict) or not {"protocol", "settings", "results"} <= entry.keys():
        return False
    rows = entry["results"]
    return isinstance(rows, list) and all(isinstance(row, dict) and row.keys() >= _ROW for row in rows)


def _present_allocations(checkpoint: Checkpoint) -> dict[str | None, str | None]:
    """A fingerprint of widths and own scales of each stored allocation by name; None, for a width, has none."""
    prints: dict[str | None, str | None] = {None: None}
    for name, record in stored_allocations(checkpoint).items():
        own = record.get(SCALES)
        text = format_lines(record.get("layers", record)) + (own.get("sha256", "") if isinstance(own, dict) else "")
        prints[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return prints


def _merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of both by size; of one width the new row, with the scores of tasks that only the old one has."""
    rows = {_key(row): row for row in old}
    for row in new:
        before = rows.get(_key(row), {})
        rows[_key(row)] = row | ({"scores": before.get("scores", {}) | row["scores"]} if "scores" in row else {})
    return sorted(rows.values(), key=lambda row: float(row["bits_per_weight"]))


def _key(row: Mapping[str, Any]) -> Any:
    return row.get("allocation") or row["bits"]
