"""Tune the scales of one width or allocation after another: ask the full model, tune, write what is better."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from matgptq.checkpoints.allocation_scales import save_scales
from matgptq.checkpoints.checkpoint import Checkpoint
from matgptq.checkpoints.scale_replacement import replace_scales
from matgptq.errors import UnsupportedModelError
from matgptq.inference.loading import load
from matgptq.inference.nested_linear import nested_layers
from matgptq.machine.workers import Workers
from matgptq.models.blocks import Block, block_modules, capture_inputs, complete
from matgptq.models.families import find_family
from matgptq.models.logits import output_head
from matgptq.models.teacher import Teacher, observe
from matgptq.progress import Progress
from matgptq.report import Refinement
from matgptq.slicing import slice_levels
from matgptq.text.windows import Windows
from matgptq.tuning.blocks import tune_blocks
from matgptq.tuning.goals import Goal, by_layer, stored_scales
from matgptq.tuning.scales import ModelObjective, ScaleVector, Schedule, TunedLinear, TuningState, fast_dtype, tune
from matgptq.tuning.text import HELD_OUT
from matgptq.tuning.workspace import TuningWorkspace, digest_of

Scope = Literal["model", "block"]


@dataclass(frozen=True)
class TuningJob:
    """What all goals of one call share.

    Attributes:
        checkpoint: whose scales are tuned.
        workspace: that keeps what is done.
        text: windows to train on, then the held-out ones.
        device, dtype: where and in what precision the quantized model runs.
        trust_remote_code: allow code in the checkpoint's directory to run.
        progress: receives stages.
        workers: that windows are shared out among.
    """

    checkpoint: Checkpoint
    workspace: TuningWorkspace
    text: Windows
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool
    progress: Progress
    workers: Workers


class TuningRun(ABC):
    """One call's work.

    Args:
        full: the full model. Of a run of scope ``model`` no more than its output head is kept.
        job: everything else.
    """

    scope: ClassVar[Scope]

    def __init__(self, full: Any, job: TuningJob) -> None:
        self.job = job
        self.head = output_head(full)

    @property
    @abstractmethod
    def home(self) -> torch.device:
        """Where the quantized model lies."""

    @abstractmethod
    def tune(self, student: Any, goal: Goal, schedule: Schedule, state: TuningState | None) -> TuningState:
        """Tune one goal, from a state that an interrupted run left, if there is one."""

    def refine(self, goal: Goal, schedule: Schedule) -> Refinement:
        """Tune one width or allocation and write it."""
        started = time.monotonic()
        state = self.job.workspace.state(goal)
        if state is None or not state.finished:
            widths = goal.widths
            student = load(
                self.job.checkpoint.path,
                widths if isinstance(widths, int) else None,
                None if isinstance(widths, int) else widths,  # not its name: scales of its own would fix the model
                device=self.home,
                dtype=self.job.dtype,
                trust_remote_code=self.job.trust_remote_code,
            ).requires_grad_(False)
            state = self.tune(student, goal, schedule, state)
        stored = digest_of(stored_scales(self.job.checkpoint.path, goal))
        if state.loss_after < state.loss_before and stored != digest_of(state.best):
            self._write(goal, state, schedule)
        return Refinement(
            bits=self.job.checkpoint.average_bits(goal.widths),
            kl_before=state.loss_before,
            kl_after=state.loss_after,
            steps=state.step,
            history=state.history,
            seconds=round(time.monotonic() - started, 3),
            allocation=goal.allocation,
        )

    def _ask(self, full: Any, windows: Tensor) -> Tensor:
        """What the full model says about windows, or said when this run was interrupted."""
        hidden = self.job.workspace.teacher_states()
        if hidden is None:
            self.job.progress.start("ask the full model", len(windows))
            hidden = observe(full, windows, self.job.progress.advance, self.job.workers).hidden
            self.job.workspace.keep_teacher_states(hidden)
        return hidden

    def _tunable(self, student: Any, goal: Goal, start: Tensor, prefix: str = "") -> dict[str, TunedLinear]:
        """Replace the nested layers under a prefix; ``{layer: replacement}`` in the checkpoint's order."""
        tuned = {}
        nested, scales = nested_layers(student), by_layer(self.job.checkpoint, start)
        for name in self.job.checkpoint.layers:
            if not name.startswith(prefix):
                continue
            layer = nested[name]
            levels = slice_levels(layer.nested_weight.codes, layer.bits, torch.int8)
            own = scales[name].to(levels.device)
            product_dtype = fast_dtype(self.job.device, self.job.dtype)
            tuned[name] = TunedLinear(levels, own, layer.bias, product_dtype, goal.pace(layer.bits))
            student.set_submodule(name, tuned[name])
        return tuned

    def _write(self, goal: Goal, state: TuningState, schedule: Schedule) -> None:
        record = {
            "scope": self.scope,
            "steps": state.step,
            "learning_rate": schedule.learning_rate,
            "windows_per_step": schedule.windows_per_step,
            "text": self.job.text.protocol,
            "held_out_windows": HELD_OUT,
            "kl_before": state.loss_before,
            "kl_after": state.loss_after,
        }
        scales = by_layer(self.job.checkpoint, state.best)
        if not isinstance(goal.widths, int):
            assert goal.allocation is not None
            save_scales(self.job.checkpoint, goal.allocation, goal.widths, scales, record)
        else:
            replace_scales(self.job.checkpoint.path, goal.widths, scales, record, staging=self.job.workspace.staging)


class ModelTuning(TuningRun):
    """End to end: the loss is the KL to the full model's predictions."""

    scope = "model"

    def __init__(self, full: Any, job: TuningJob) -> None:
        super().__init__(full, job)
        windows = self.job.text.tokens
        hidden = self._ask(full, windows)
        self._training = Teacher(windows[:-HELD_OUT], hidden[:-HELD_OUT], self.head)
        self._held_out = Teacher(windows[-HELD_OUT:], hidden[-HELD_OUT:], self.head)

    @property
    def home(self) -> torch.device:
        return self.job.device

    def tune(self, student: Any, goal: Goal, schedule: Schedule, state: TuningState | None) -> TuningState:
        scales = ScaleVector(self._tunable(student, goal, stored_scales(self.job.checkpoint.path, goal)))
        head = output_head(student)
        objective = ModelObjective(student, head, scales, self._training, self._held_out, self.job.workers)
        self.job.progress.start(f"tune {goal.name}", schedule.steps)
        self.job.progress.advance(0 if state is None else state.step)
        return tune(
            scales,
            len(self._training.windows),
            objective.gradient,
            objective.held_out_loss,
            schedule,
            state=state,
            save=lambda present: self.job.workspace.keep_state(goal, present),
            tick=self.job.progress.advance,
        )


class BlockTuning(TuningRun):
    """Block by block: the loss is the error of the block's output. Both models stay on the CPU but for a block."""

    scope = "block"

    def __init__(self, full: Any, job: TuningJob) -> None:
        super().__init__(full, job)
        windows = self.job.text.tokens[-HELD_OUT:]
        self._full = full
        self._held_out = Teacher(windows, self._ask(full, windows), self.head)

    @property
    def home(self) -> torch.device:
        return torch.device("cpu")

    def tune(self, student: Any, goal: Goal, schedule: Schedule, state: TuningState | None) -> TuningState:
        blocks, full_blocks = _blocks(student), _blocks(self._full)
        inputs, full_inputs = (
            capture_inputs(model, each, self.job.text.tokens)
            for model, each in ((student, blocks), (self._full, full_blocks))
        )
        if not torch.allclose(inputs.hidden[0], full_inputs.hidden[0], rtol=1e-2, atol=1e-3):
            raise UnsupportedModelError(
                f"{self.job.checkpoint.path}: its blocks do not see what the full model's see (a rotated checkpoint?), "
                "so their outputs cannot be matched; use --scope model"
            )
        start = stored_scales(self.job.checkpoint.path, goal)
        present = state or TuningState.begin(start)

        def save(done: Mapping[str, Tensor]) -> None:
            present.step += 1
            kept = {**by_layer(self.job.checkpoint, start), **done}
            present.best = torch.cat([kept[name].cpu().flatten() for name in self.job.checkpoint.layers])
            self.job.workspace.keep_state(goal, present)

        finished = tuple(f"{block.name}." for block in blocks[: present.step])
        self.job.progress.start(f"tune {goal.name}", len(blocks))
        _, untuned = tune_blocks(
            blocks,
            full_blocks,
            inputs,
            full_inputs,
            held_out=HELD_OUT,
            schedule=schedule,
            prepare=lambda block: self._tunable(student, goal, start, f"{block.name}."),
            finished={
                name: scales
                for name, scales in by_layer(self.job.checkpoint, present.best).items()
                if name.startswith(finished)
            },
            save=save,
            tick=self.job.progress.advance,
            device=self.job.device,
            workers=self.job.workers,
        )
        for step, hidden in ((0, untuned), (len(blocks), inputs.hidden[-HELD_OUT:])):
            with torch.no_grad():
                states = [complete(student, blocks, each)[0] for each in hidden]
            present.history.append((step, self._held_out.mean_kl(states.__getitem__, self.head)))
        present.finished = True
        self.job.workspace.keep_state(goal, present)
        return present


TUNINGS: Mapping[Scope, type[ModelTuning] | type[BlockTuning]] = {"model": ModelTuning, "block": BlockTuning}


def _blocks(model: Any) -> list[Block]:
    """The blocks of a model whose layers are of no concern here."""
    family = find_family(model.config.model_type)
    return [Block(f"{family.blocks}.{index}", each, ()) for index, each in enumerate(block_modules(model, family))]
