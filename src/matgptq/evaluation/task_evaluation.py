"""How good each width is at tasks: lm-evaluation-harness on one loaded parent, its width changed in place."""

from __future__ import annotations

import difflib
import gc
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.checkpoints.evaluation_results import Score, Scores, TaskEvaluation, TaskResult
from matgptq.errors import CalibrationError, ConfigurationError
from matgptq.evaluation.text_evaluation import CandidateModels, choose_candidates, served_settings
from matgptq.inference.reference_model import find_reference, load_reference
from matgptq.machine.devices import resolve_device
from matgptq.models.source import load_tokenizer
from matgptq.native import Activations
from matgptq.progress import Progress, Silent

DEFAULT_BATCH_SIZE = 8
# Resampling gives the standard errors of the few metrics that have no formula for it. The harness takes 100,000, which
# can cost more than the model; the error of the error is 2 percent here.
_BOOTSTRAP_SAMPLES = 1000


def evaluate_tasks(
    path: str | Path,
    tasks: Iterable[str],
    bits: Iterable[int] | int | None = None,
    *,
    allocation: Mapping[str, int] | str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    include_path: str | Path | None = None,
    reference: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    activations: Activations = "exact",
    head_bits: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> TaskEvaluation:
    """Run tasks of lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness) on widths of a checkpoint.

    The parent is loaded once. The full-precision model is loaded when all widths are done and the parent has gone,
    so that memory holds one of them at a time. Every width sees the same prompts.

    Args:
        path: checkpoint directory.
        tasks: names of tasks, groups or tags of the harness, or ``*`` patterns of them.
        bits: widths, 2..8; default 2,3,4,6,8, or none if an allocation is given.
        allocation: ``{layer: bits}``, the name of a stored allocation or a file, measured after the widths.
        num_fewshot: worked examples in front of each question; default: each task's own number.
        limit: questions of each task, from its start; default all.
        batch_size: sequences at a time.
        include_path: directory with tasks of your own (YAML files of the harness). Their ``!function`` code runs.
        reference: the full-precision model, measured only if it is given.
        device, dtype: of both models.
        activations, head_bits: of the quantized model; see ``matgptq.load``.
        trust_remote_code: allow code in the model's directory to run.
        progress: receives stages and notes.

    Raises:
        ConfigurationError: the harness is not installed, a task is unknown, or an option is out of range.
        CalibrationError: the data of a task cannot be had.
        MatGPTQError: another subclass that says what is wrong with the checkpoint or the reference.
    """
    progress = progress or Silent()
    checkpoint = open_checkpoint(path, slices=True)
    candidates = choose_candidates(checkpoint, bits, allocation)
    _check_counts(num_fewshot=num_fewshot, limit=limit, batch_size=batch_size)
    run_device = resolve_device(device)
    source = None
    if reference is not None:
        source = find_reference(checkpoint, reference, trust_remote_code=trust_remote_code)
    progress.start("load the tasks", 1)
    chosen = _load_tasks(list(tasks), include_path)
    progress.start("load the model", 1)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    models = CandidateModels(
        path, candidates, allocation,
        device=run_device, dtype=dtype, activations=activations, head_bits=head_bits,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    settings = served_settings(models.first, activations, head_bits)
    options = {"num_fewshot": num_fewshot, "limit": limit}

    results, shown = [], ()
    for candidate in candidates:
        widths = candidate.widths
        runner = _runner(models.serve(candidate), tokenizer, batch_size)
        average = checkpoint.average_bits(widths)
        progress.start(f"tasks at {average:g} bits", 1)
        scores, shown = _run(runner, chosen, **options)
        size = checkpoint.bits_per_weight(widths), checkpoint.served_bytes(widths)
        results.append(TaskResult(average, *size, scores, candidate.allocation))
    reference_scores = None
    if source is not None:
        del models, runner
        gc.collect()
        if run_device.type == "cuda":
            torch.cuda.empty_cache()
        progress.start("load the full-precision model", 1)
        full = load_reference(source, checkpoint, run_device, dtype)
        progress.start("tasks at full precision", 1)
        reference_scores, shown = _run(_runner(full, tokenizer, batch_size), chosen, **options)
    documents = "all documents" if limit is None else f"the first {limit} documents"
    shots = "each task's own number of" if num_fewshot is None else str(num_fewshot)
    protocol = (
        f"lm-evaluation-harness {version('lm_eval')}: {documents} of each task, {shots} examples, no chat template, "
        f"{batch_size} sequences at a time"
    )
    return TaskEvaluation(
        results, shown, protocol, settings, source.name if source is not None else None, reference_scores
    )


def _check_counts(num_fewshot: int | None, limit: int | None, batch_size: int) -> None:
    for name, value, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise ConfigurationError(f"{name} must be at least {least}, not {value}")


@dataclass(frozen=True)
class _Tasks:
    manager: Any  # the harness' index of all tasks; reading it takes seconds
    roots: list[Any]  # task and group objects, those inside of groups left to their groups


def _load_tasks(names: Sequence[str], include_path: str | Path | None) -> _Tasks:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigurationError(
            f'tasks need lm-evaluation-harness, which cannot be imported ({error}): pip install "matgptq[eval]"'
        ) from error
    if not names:
        raise ConfigurationError("no task is named")
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigurationError(f"{include_path}: no such directory of tasks")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    found: list[str] = []
    for name in names:
        matches = manager.match_tasks([name])
        if not matches:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            advice = f"did you mean {' or '.join(close)}? " if close else ""
            raise ConfigurationError(
                f"unknown task {name}: {advice}Tasks of your own are found in --include-path; "
                "`lm-eval ls tasks` lists the others"
            )
        found.extend(match for match in matches if match not in found)
    try:
        with _quiet_harness():
            loaded = manager.load(found)
    except Exception as error:  # whatever data sets, the hub and a task's own code raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CalibrationError(
            f"the tasks {', '.join(found)} cannot be loaded ({type(error).__name__}: {reason}); their data comes from "
            "the Hugging Face Hub unless it was fetched before"
        ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigurationError(f"task {name} runs code that the model writes, which matgptq does not do")
        if getattr(task, "MULTIMODAL", False):
            raise ConfigurationError(f"task {name} has images or sound, which the model does not take")
    parts = {name for members in loaded["group_map"].values() for name in members}
    roots = [each for kind in ("groups", "tasks") for name, each in loaded[kind].items() if name not in parts]
    return _Tasks(manager, roots)


def _runner(model: Any, tokenizer: Any, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    with _quiet_harness():
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Keep back warnings that each default of a task was taken, and that a model which is there is not loaded."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _run(runner: Any, tasks: _Tasks, *, num_fewshot: int | None, limit: int | None) -> tuple[Scores, Any]:
    """Scores of all tasks and groups, and the names of those that stand for themselves in a table."""
    from lm_eval import simple_evaluate

    try:
        record = simple_evaluate(
            model=runner,
            tasks=list(tasks.roots),
            task_manager=tasks.manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=_BOOTSTRAP_SAMPLES,
            log_samples=False,
        )
    except (ValueError, AssertionError) as error:  # more examples than a task has documents, for one
        raise CalibrationError(f"the harness cannot run the tasks: {error}") from error
    scores: Scores = {}
    for task, metrics in record["results"].items():
        shots, documents = record["n-shot"].get(task), metrics.get("sample_len", 0)
        found: dict[str, Score] = {}
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            found[name] = Score(
                float(value), float(stderr) if isinstance(stderr, int | float) else None, shots, documents
            )
        if found:
            scores[task] = found
    members: Mapping[str, Sequence[str]] = record["group_subtasks"]
    inside = {name for names in members.values() for name in names}

    def visible(name: str) -> list[str]:
        if name in scores:
            return [name]
        return [each for part in members.get(name, ()) for each in visible(part)]  # a group without a score of its own

    roots = [name for name in (*record["results"], *members) if name not in inside]
    return scores, tuple(dict.fromkeys(each for root in roots for each in visible(root)))
