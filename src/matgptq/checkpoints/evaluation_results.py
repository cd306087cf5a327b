"""What an evaluation found: figures of text and of tasks, a row for each width or allocation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Result:
    """One width or allocation.

    Attributes:
        bits: width of the codes; for an allocation the average over the weights.
        bits_per_weight: with all scales that serving reads.
        bytes: size of the whole model as served, everything that is not quantized included.
        perplexity: exp of the mean negative log-likelihood in nats per token.
        kl: mean ``KL(full || slice)`` in nats per token; None without a reference.
        top1: share of positions where both models prefer the same token; None without a reference.
        allocation: the name of a stored allocation, or of its file; None for a width.
    """

    bits: float
    bits_per_weight: float
    bytes: int
    perplexity: float
    kl: float | None
    top1: float | None
    allocation: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluation:
    """Results of several widths on the same text.

    Attributes:
        results: in the order asked for.
        protocol: how the text became windows.
        reference: the full-precision model compared with, if any.
        reference_perplexity: its perplexity on the same windows.
        settings: of the quantized model: what else changes its figures.
        measured_on: digits that another text or reference of the same name does not share.
    """

    results: list[Result]
    protocol: str
    reference: str | None = None
    reference_perplexity: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    measured_on: str | None = None


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        value: as the harness reports it: a share for accuracies, not a percentage.
        stderr: its standard error; None where the harness gives none.
        shots: worked examples in front of each question.
        documents: questions asked.
    """

    value: float
    stderr: float | None
    shots: int
    documents: int


# {task: {metric: score}}; a metric is called as in the harness, with its filter in brackets if it has one.
Scores = dict[str, dict[str, Score]]


@dataclass(frozen=True)
class TaskResult:
    """All tasks at one width or allocation.

    Attributes:
        bits: width of the codes; for an allocation the average over the weights.
        bits_per_weight: with all scales that serving reads.
        bytes: size of the whole model as served.
        scores: of all tasks and groups of tasks that ran, those inside a group included.
        allocation: the name of a stored allocation, or of its file; None for a width.
    """

    bits: float
    bits_per_weight: float
    bytes: int
    scores: Scores
    allocation: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class TaskEvaluation:
    """Results of several widths on the same tasks.

    Attributes:
        results: in the order asked for.
        shown: the tasks and groups that were asked for; the others are parts of them.
        protocol: harness, documents, batches.
        settings: of the quantized model: what else changes its figures.
        reference: the full-precision model, if it was measured too.
        reference_scores: its scores.
    """

    results: list[TaskResult]
    shown: tuple[str, ...]
    protocol: str
    settings: Mapping[str, Any]
    reference: str | None = None
    reference_scores: Scores | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)
