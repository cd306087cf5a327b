"""What was measured on a checkpoint, kept beside it in ``evaluation.json``: its card is made from this.

    {"texts": [...], "tasks": [...]}

Each entry is one way of measuring (``protocol``, ``reference``, ``settings``) with a row for each width. Measuring the
same way again replaces the rows of the widths measured and keeps the others; the last measured entry comes last.
Allocations are not kept: they are no part of the checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matgptq.checkpoint import replace_file
from matgptq.errors import CheckpointError, SourceError
from matgptq.evaluation import Evaluation
from matgptq.source import public_name, read_json
from matgptq.task_evaluation import TaskEvaluation

RECORD_NAME = "evaluation.json"
_IDENTITY = ("protocol", "reference", "settings")


def read_record(directory: str | Path) -> dict[str, list[dict[str, Any]]]:
    """What is recorded of a checkpoint; empty lists if nothing is.

    Raises:
        CheckpointError: the file is damaged; names it.
    """
    file = Path(directory) / RECORD_NAME
    if not file.exists():
        return {"texts": [], "tasks": []}
    try:
        record = read_json(file)
    except SourceError as error:
        raise CheckpointError(f"{error}; delete it to measure anew") from error
    for kind in ("texts", "tasks"):
        entries = record.get(kind)
        if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and isinstance(entry.get("results"), list) for entry in entries
        ):
            raise CheckpointError(f"{file}: {kind} is not a list of results; delete the file to measure anew")
    return {"texts": record["texts"], "tasks": record["tasks"]}


def record_evaluation(directory: str | Path, evaluation: Evaluation | TaskEvaluation) -> None:
    """Add results to the record of a checkpoint. The file is replaced at once or not at all.

    Raises:
        CheckpointError: the record is damaged, or the directory cannot be written.
    """
    results = [result.to_dict() for result in evaluation.results if isinstance(result.bits, int)]
    if not results:
        return
    record = read_record(directory)
    entry: dict[str, Any] = {
        "protocol": evaluation.protocol,
        "reference": None if evaluation.reference is None else public_name(evaluation.reference),
        "settings": dict(evaluation.settings),
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
    replace_file(Path(directory) / RECORD_NAME, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of both by width; of one width the new row, with the scores of tasks that only the old one has."""
    rows = {row["bits"]: row for row in old}
    for row in new:
        before = rows.get(row["bits"], {})
        rows[row["bits"]] = row | ({"scores": before.get("scores", {}) | row["scores"]} if "scores" in row else {})
    return [rows[bits] for bits in sorted(rows)]
