"""Tune the scales of widths or of an allocation after the solve.

The checkpoint changes once for each width, as a whole; an allocation gets scales of its own, and the checkpoint stays
as it is. Progress lies beside it (``tuning.workspace``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.errors import ConfigurationError
from matgptq.inference.reference_model import find_reference, load_reference, reference_dtype
from matgptq.machine.devices import exact_products, resolve_device
from matgptq.machine.workers import one_thread_each
from matgptq.progress import Progress, Silent
from matgptq.report import Refinement
from matgptq.text.self_text import model_fingerprint
from matgptq.tuning.goals import choose_goals
from matgptq.tuning.run import TUNINGS, Scope, TuningJob
from matgptq.tuning.scales import Schedule
from matgptq.tuning.text import load_tuning_text
from matgptq.tuning.workspace import TuningWorkspace, digest_of

DEFAULT_STEPS: Mapping[Scope, int] = {"model": 128, "block": 16}


def refine(
    path: str | Path,
    bits: Iterable[int] | int | None = None,
    *,
    allocation: str | None = None,
    steps: int | None = None,
    scope: Scope = "model",
    dataset: str | Path | Tensor | None = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    reference: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[Refinement]:
    """Tune the group scales of widths, or of an allocation, so that the predictions come closer to the full model's.

    Codes and all other widths stay as they are. Interrupted, the same call goes on where it was; each width is
    written as soon as it is done, and none is written that is not better on held-out text.

    Args:
        path: the checkpoint; changed in place.
        bits: widths, 2..8; default 2 and 3. A width without scales of its own gets them.
        allocation: instead of widths, the name of an allocation that lies with the checkpoint. It gets scales of its
            own, which are used wherever it is named; all widths keep theirs.
        steps: of Adam, for each width; default 128, or 16 for each block.
        scope: ``model`` minimises the KL to the full model end to end. ``block`` matches the output of each block to
            the full model's; it needs gradients of one block at a time only, and gains less.
        dataset: as for ``matgptq.quantize``; default: the text that the checkpoint was calibrated with if it can be
            read again, else ``self``.
        nsamples: windows to train on; 4 more are held out. Default 128 or what a shorter text has, 32 for ``self``.
        seqlen: tokens in a window, default 512.
        learning_rate: largest relative change of a scale in a step; default by width.
        seed: of the choice and order of windows.
        reference: the full-precision model; default the one that the checkpoint was made from.
        device, dtype: where and in what precision the models run; see ``matgptq.machine.devices``.
        trust_remote_code: allow code in the model's directory to run.
        progress: receives stages and notes.

    Returns:
        What was done, by width.

    Raises:
        MatGPTQError: a subclass that says what is wrong; the checkpoint is then as it was, or has the new scales of
            the widths that were done.
    """
    progress = progress or Silent()
    checkpoint = open_checkpoint(path)
    goals = choose_goals(checkpoint, bits, allocation)
    if scope not in TUNINGS:
        raise ConfigurationError(f"scope must be {' or '.join(TUNINGS)}, not {scope!r}")
    steps = DEFAULT_STEPS[scope] if steps is None else steps
    schedules = [Schedule(steps, goal.rate if learning_rate is None else learning_rate, seed=seed) for goal in goals]
    source = find_reference(checkpoint, reference, trust_remote_code=trust_remote_code)
    run_device = resolve_device(device)
    run_dtype = reference_dtype(source, checkpoint, run_device, dtype)
    with TuningWorkspace(checkpoint, progress) as workspace:
        progress.start("load the full model", 1)
        full = load_reference(source, checkpoint, run_device if scope == "model" else torch.device("cpu"), run_dtype)
        text = load_tuning_text(
            checkpoint, full, dataset, nsamples=nsamples, seqlen=seqlen, seed=seed,
            trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
        options = {
            "goals": [goal.key for goal in goals],
            "schedule": [asdict(schedule) for schedule in schedules],
            "scope": scope,
            "dtype": str(run_dtype),
            "text": digest_of(text.tokens),
            "reference": model_fingerprint(full),
        }
        workspace.begin(goals, options)
        with one_thread_each(run_device) as workers, exact_products(run_device):
            job = TuningJob(checkpoint, workspace, text, run_device, run_dtype, trust_remote_code, progress, workers)
            run = TUNINGS[scope](full, job)
            del full  # the run keeps what it needs of it
            return [run.refine(goal, schedule) for goal, schedule in zip(goals, schedules, strict=True)]
