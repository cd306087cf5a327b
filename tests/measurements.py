"""Results as an evaluation returns them, without a model."""

from __future__ import annotations

from matgptq.checkpoints.evaluation_results import Evaluation, Result, Score, TaskEvaluation, TaskResult

SETTINGS = {"dtype": "float32", "activations": "exact", "head_bits": None}


def on_text(widths: dict[float, float], protocol: str = "some text", allocation: str | None = None) -> Evaluation:
    """``{bits: perplexity}``."""
    results = [Result(bits, bits + 0.25, 100, value, value / 10, 0.9, allocation) for bits, value in widths.items()]
    return Evaluation(results, protocol, "owner/name", 1.5, SETTINGS)


def on_tasks(task: str, widths: dict[float, float], full: float | None = None) -> TaskEvaluation:
    """``{bits: accuracy}``."""

    def score(value: float) -> dict[str, dict[str, Score]]:
        return {task: {"acc": Score(value, 0.01, 0, 100)}}

    results = [TaskResult(bits, bits + 0.25, 100, score(value)) for bits, value in widths.items()]
    reference = None if full is None else "owner/name"
    return TaskEvaluation(results, (task,), "harness", SETTINGS, reference, None if full is None else score(full))
