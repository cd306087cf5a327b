"""Tune the scales of widths or of an allocation after the solve: text, teacher, tuning, commit, and going on later.

Progress lives in a directory beside the checkpoint, ``.OUT.refine``: what the run is, the teacher, and the state of
each width. It goes away when all are done. The checkpoint itself changes once for each width, as a whole; an allocation
gets scales of its own, and the checkpoint stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor

from matgptq.allocation_scales import find_scales, save_scales, widths_scales
from matgptq.allocation_store import find_allocation, stored_allocations
from matgptq.atomic_files import json_text, save_tensors, write_text
from matgptq.block_tuning import tune_blocks
from matgptq.blocks import Block, capture_inputs, complete
from matgptq.calibration import SELF, Windows, load_windows, takes_self
from matgptq.checkpoint import Checkpoint, open_checkpoint
from matgptq.devices import resolve_device
from matgptq.errors import CalibrationError, ConfigurationError, SourceError, UnsupportedModelError
from matgptq.families import find_family
from matgptq.loading import load
from matgptq.model_config import check_window, longest_window
from matgptq.nested_linear import nested_layers
from matgptq.progress import Progress, Silent
from matgptq.reference_model import find_reference, reference_dtype
from matgptq.scale_replacement import replace_scales
from matgptq.scale_tuning import (
    ModelObjective,
    ScaleVector,
    Schedule,
    TunedLinear,
    TuningState,
    fast_dtype,
    tune,
)
from matgptq.self_text import model_fingerprint
from matgptq.slicing import check_widths, slice_levels
from matgptq.source import load_tokenizer, read_json
from matgptq.teacher import Teacher, observe, output_head
from matgptq.workers import Workers, one_thread_each

Scope = Literal["model", "block"]

DEFAULT_WIDTHS = (2, 3)
DEFAULT_STEPS: Mapping[Scope, int] = {"model": 128, "block": 16}
DEFAULT_SEQLEN = 512
DEFAULT_NSAMPLES = 128
SELF_NSAMPLES = 32  # text that the model must write first is dear
HELD_OUT = 4  # windows, beside those trained on


def default_learning_rate(bits: int) -> float:
    """Largest relative change of a scale in one step. The finer the slice, the less its scales may move."""
    return 2.0**-bits * 0.016


@dataclass(frozen=True)
class Refinement:
    """What tuning did to one width or allocation.

    Attributes:
        bits: the width; for an allocation the average over the weights.
        kl_before, kl_after: mean KL(full || slice) in nats a token on text that tuning did not see, with the scales
            as stored. The checkpoint has new scales exactly if the second is smaller.
        steps: taken; fewer than asked for if the held-out text stopped it. For scope ``block``: blocks.
        history: ``(steps taken, held-out KL)``.
        seconds: of this call.
        allocation: its name; None for a width.
    """

    bits: float
    kl_before: float
    kl_after: float
    steps: int
    history: list[tuple[int, float]]
    seconds: float
    allocation: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def refine(
    path: str | Path,
    bits: Iterable[int] | None = None,
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
        device, dtype: where and in what precision the models run; see ``matgptq.devices``.
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
    goals = _goals(checkpoint, bits, allocation)
    if scope not in get_args(Scope):
        raise ConfigurationError(f"scope must be model or block, not {scope!r}")
    steps = DEFAULT_STEPS[scope] if steps is None else steps
    schedules = [Schedule(steps, goal.rate if learning_rate is None else learning_rate, seed=seed) for goal in goals]
    source = find_reference(checkpoint, reference, trust_remote_code=trust_remote_code)
    run_device = resolve_device(device)
    run_dtype = reference_dtype(source, checkpoint, run_device, dtype)
    progress.start("load the full model", 1)
    home = run_device if scope == "model" else torch.device("cpu")
    full = source.load_model(run_dtype, home)
    text = _load_text(checkpoint, full, dataset, nsamples, seqlen, seed, trust_remote_code, progress)

    options = {
        "goals": [goal.key for goal in goals],
        "schedule": [asdict(schedule) for schedule in schedules],
        "scope": scope,
        "dtype": str(run_dtype),
        "text": _digest(text.tokens),
        "reference": model_fingerprint(full),
    }
    workspace = _Workspace(checkpoint, goals, options, progress)
    try:
        with one_thread_each(run_device) as workers:
            run = _Run(checkpoint, workspace, text, run_device, run_dtype, trust_remote_code, progress, workers)
            run.observe(full, with_training=scope == "model")
            whole = full if scope == "block" else None
            del full  # scope "model" needs no more than its output head
            results = [run.refine(goal, schedule, whole) for goal, schedule in zip(goals, schedules, strict=True)]
    except (KeyboardInterrupt, SystemExit):
        progress.note(f"what is done is kept in {workspace.directory}; the same command goes on from there")
        raise
    workspace.remove()
    return results


@dataclass(frozen=True)
class _Goal:
    """What is tuned: the scales of a width, or those of an allocation.

    Attributes:
        widths: the width, or that of each layer.
        allocation: the name of the latter.
    """

    widths: int | Mapping[str, int]
    allocation: str | None = None

    @property
    def key(self) -> str:
        """For file names; widths have digits and allocations a prefix."""
        return str(self.widths) if self.allocation is None else f"allocation-{self.allocation}"

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.widths} bits" if self.allocation is None else self.allocation

    @property
    def rate(self) -> float:
        """Default learning rate: that of its smallest width."""
        return default_learning_rate(self.widths if isinstance(self.widths, int) else min(self.widths.values()))

    def pace(self, bits: int) -> float:
        """The rate of layers of a width as a share of ``rate``."""
        return default_learning_rate(bits) / self.rate


def _goals(checkpoint: Checkpoint, bits: Iterable[int] | None, allocation: str | None) -> list[_Goal]:
    if allocation is None:
        return [_Goal(width) for width in check_widths(DEFAULT_WIDTHS if bits is None else bits)]
    if bits is not None:
        raise ConfigurationError("tune either widths or an allocation")
    widths = find_allocation(checkpoint, allocation)
    if allocation not in stored_allocations(checkpoint):
        raise ConfigurationError(
            f"{allocation}: only an allocation that matgptq search saved with the checkpoint can have scales of its own"
        )
    return [_Goal(widths, allocation)]


class _Run:
    """What all widths of one call share."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        workspace: _Workspace,
        text: Windows,
        device: torch.device,
        dtype: torch.dtype,
        trust_remote_code: bool,
        progress: Progress,
        workers: Workers,
    ) -> None:
        self.checkpoint = checkpoint
        self.workspace = workspace
        self.text = text
        self.device = device
        self.dtype = dtype
        self.trust_remote_code = trust_remote_code
        self.progress = progress
        self.workers = workers
        self.training: Teacher | None = None
        self.held_out: Teacher

    def observe(self, full: Any, *, with_training: bool) -> None:
        """Ask the full model about the windows, or read what it said when this run was interrupted."""
        windows = self.text.tokens if with_training else self.text.tokens[-HELD_OUT:]
        hidden = self.workspace.teacher_states()
        if hidden is None:
            self.progress.start("ask the full model", len(windows))
            hidden = observe(full, windows, self.progress.advance, self.workers).hidden
            self.workspace.keep_teacher_states(hidden)
        head = output_head(full)
        self.held_out = Teacher(windows[-HELD_OUT:], hidden[-HELD_OUT:], head)
        if with_training:
            self.training = Teacher(windows[:-HELD_OUT], hidden[:-HELD_OUT], head)

    def refine(self, goal: _Goal, schedule: Schedule, full: Any) -> Refinement:
        """Tune one width or allocation and write it; ``full`` is given for scope ``block``."""
        started = time.monotonic()
        state = self.workspace.state(goal)
        if state is None or not state.finished:
            widths = goal.widths
            student = load(
                self.checkpoint.path,
                widths if isinstance(widths, int) else None,
                None if isinstance(widths, int) else widths,  # not its name: scales of its own would fix the model
                device=self.device if full is None else "cpu",
                dtype=self.dtype,
                trust_remote_code=self.trust_remote_code,
            ).requires_grad_(False)
            tuner = self._tune_model if full is None else self._tune_blocks
            state = tuner(student, full, goal, schedule, state)
        if state.loss_after < state.loss_before and _digest(stored_scales(self.checkpoint.path, goal)) != _digest(
            state.best
        ):
            self._write(goal, state, schedule, "model" if full is None else "block")
        return Refinement(
            bits=self.checkpoint.average_bits(goal.widths),
            kl_before=state.loss_before,
            kl_after=state.loss_after,
            steps=state.step,
            history=state.history,
            seconds=round(time.monotonic() - started, 3),
            allocation=goal.allocation,
        )

    def _tune_model(
        self, student: Any, _: Any, goal: _Goal, schedule: Schedule, state: TuningState | None
    ) -> TuningState:
        assert self.training is not None
        tuned = self._tunable(student, goal, stored_scales(self.checkpoint.path, goal))
        scales = ScaleVector(tuned)
        objective = ModelObjective(student, output_head(student), scales, self.training, self.held_out, self.workers)
        self.progress.start(f"tune {goal.name}", schedule.steps)
        self.progress.advance(0 if state is None else state.step)
        return tune(
            scales,
            len(self.training.windows),
            objective.gradient,
            objective.held_out_loss,
            schedule,
            state=state,
            save=lambda present: self.workspace.keep_state(goal, present),
            tick=self.progress.advance,
        )

    def _tune_blocks(
        self, student: Any, full: Any, goal: _Goal, schedule: Schedule, state: TuningState | None
    ) -> TuningState:
        blocks, full_blocks = _blocks(student), _blocks(full)
        inputs, full_inputs = (
            capture_inputs(model, each, self.text.tokens) for model, each in ((student, blocks), (full, full_blocks))
        )
        if not torch.allclose(inputs.hidden[0], full_inputs.hidden[0], rtol=1e-2, atol=1e-3):
            raise UnsupportedModelError(
                f"{self.checkpoint.path}: its blocks do not see what the full model's see (a rotated checkpoint?), so "
                "their outputs cannot be matched; use --scope model"
            )
        start = stored_scales(self.checkpoint.path, goal)
        present = state or TuningState.begin(start)

        def save(done: Mapping[str, Tensor]) -> None:
            present.step += 1
            kept = {**by_layer(self.checkpoint, start), **done}
            present.best = torch.cat([kept[name].flatten() for name in self.checkpoint.layers])
            self.workspace.keep_state(goal, present)

        finished = tuple(f"{block.name}." for block in blocks[: present.step])
        self.progress.start(f"tune {goal.name}", len(blocks))
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
                for name, scales in by_layer(self.checkpoint, present.best).items()
                if name.startswith(finished)
            },
            save=save,
            tick=self.progress.advance,
            device=self.device,
            workers=self.workers,
        )
        head = output_head(full)
        for step, hidden in ((0, untuned), (len(blocks), inputs.hidden[-HELD_OUT:])):
            with torch.no_grad():
                states = [complete(student, blocks, each)[0] for each in hidden]
            present.history.append((step, self.held_out.mean_kl(states.__getitem__, head)))
        present.finished = True
        self.workspace.keep_state(goal, present)
        return present

    def _tunable(self, student: Any, goal: _Goal, start: Tensor, prefix: str = "") -> dict[str, TunedLinear]:
        """Replace the nested layers under a prefix; ``{layer: replacement}`` in the checkpoint's order."""
        tuned = {}
        nested, scales = nested_layers(student), by_layer(self.checkpoint, start)
        for name in self.checkpoint.layers:
            if not name.startswith(prefix):
                continue
            layer = nested[name]
            levels = slice_levels(layer.nested_weight.codes, layer.bits, torch.int8)
            own = scales[name].to(levels.device)
            product_dtype = fast_dtype(self.device, self.dtype)
            tuned[name] = TunedLinear(levels, own, layer.bias, product_dtype, goal.pace(layer.bits))
            student.set_submodule(name, tuned[name])
        return tuned

    def _write(self, goal: _Goal, state: TuningState, schedule: Schedule, scope: str) -> None:
        record = {
            "scope": scope,
            "steps": state.step,
            "learning_rate": schedule.learning_rate,
            "windows_per_step": schedule.windows_per_step,
            "text": self.text.protocol,
            "held_out_windows": HELD_OUT,
            "kl_before": state.loss_before,
            "kl_after": state.loss_after,
        }
        scales = by_layer(self.checkpoint, state.best)
        if goal.allocation is not None:
            save_scales(self.checkpoint, goal.allocation, scales, record)
        elif isinstance(goal.widths, int):
            replace_scales(self.checkpoint.path, goal.widths, scales, record)


def _blocks(model: Any) -> list[Block]:
    """The blocks of a model whose layers are of no concern here."""
    path = find_family(model.config.model_type).blocks
    return [Block(f"{path}.{index}", module, ()) for index, module in enumerate(model.get_submodule(path))]


def by_layer(checkpoint: Checkpoint, flat: Tensor) -> dict[str, Tensor]:
    """Cut one vector of all scales into ``{layer: [out, groups]}``."""
    shapes = [(info.out_features, info.in_features // info.group_size) for info in checkpoint.layers.values()]
    pieces = torch.split(flat, [rows * groups for rows, groups in shapes])
    return {name: piece.view(shape) for name, piece, shape in zip(checkpoint.layers, pieces, shapes, strict=True)}


def stored_scales(path: Path, goal: _Goal) -> Tensor:
    """All scales that a width or an allocation reads, float32, as one vector in the checkpoint's order of layers."""
    checkpoint = open_checkpoint(path)
    scales = find_scales(checkpoint, goal.allocation) or widths_scales(checkpoint, checkpoint.widths(goal.widths))
    return torch.cat([scales[layer].float().flatten() for layer in checkpoint.layers])


def _load_text(
    checkpoint: Checkpoint,
    full: Any,
    dataset: str | Path | Tensor | None,
    nsamples: int | None,
    seqlen: int | None,
    seed: int,
    trust_remote_code: bool,
    progress: Progress,
) -> Windows:
    """Windows to train on, and after them those that are held out."""
    if seqlen is None:
        longest = longest_window(full.config) or DEFAULT_SEQLEN
        seqlen = dataset.shape[-1] if isinstance(dataset, Tensor) else min(DEFAULT_SEQLEN, longest)
    check_window(full.config, seqlen)
    tokenizer = None
    if not isinstance(dataset, Tensor):
        tokenizer = load_tokenizer(checkpoint.path, trust_remote_code=trust_remote_code)

    def read(name: str | Path | Tensor, count: int | None) -> Windows:
        done = 0

        def report(tokens: int, total: int) -> None:
            nonlocal done
            reached = tokens * (count or 1) // total if total else done
            progress.advance(reached - done)
            done = reached

        progress.start("tuning text", count or 1)
        text = load_windows(name, tokenizer, nsamples=count, seqlen=seqlen, seed=seed, model=full, progress=report)
        if len(text.tokens) <= HELD_OUT:
            raise CalibrationError(
                f"too little text: {len(text.tokens)} windows of {seqlen} tokens, of which {HELD_OUT} are held out; "
                "make the windows shorter, or give a longer text"
            )
        return text

    def read_enough(name: str | Path | Tensor) -> Windows:
        if nsamples is not None:
            return read(name, nsamples + HELD_OUT)
        if isinstance(name, Tensor):
            return read(name, None)
        if takes_self(name):
            return read(name, SELF_NSAMPLES + HELD_OUT)
        try:
            return read(name, DEFAULT_NSAMPLES + HELD_OUT)
        except CalibrationError:  # a shorter text will do as well
            return read(name, None)

    if dataset is not None:
        return read_enough(dataset)
    recorded = checkpoint.settings.calibration.get("dataset")
    try:
        if isinstance(recorded, str) and recorded != "token ids" and not takes_self(recorded):
            return read_enough(recorded)
    except CalibrationError as error:
        progress.note(
            f"the text of the calibration cannot be used again, the model writes its own (--dataset): {error}"
        )
    return read_enough(SELF)


def _digest(tensor: Tensor) -> str:
    """Of the values as stored; scales in float32 are exact in float16."""
    values = tensor.detach().cpu().contiguous()
    return hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()


class _Workspace:
    """What an interrupted run leaves beside the checkpoint.

        run.json               what the run is, and a digest of the scales that each width started from
        teacher.safetensors    what the full model says about the windows
        state-<width or allocation>.safetensors

    Each file is replaced as a whole. A run that is another one, or a checkpoint that has other scales than this run
    found or made, begins anew.
    """

    def __init__(
        self, checkpoint: Checkpoint, goals: Sequence[_Goal], options: Mapping[str, Any], progress: Progress
    ) -> None:
        path = checkpoint.path.resolve()
        self.directory = path.with_name(f".{path.name}.refine")
        present = [(goal, _digest(stored_scales(path, goal))) for goal in goals]
        if self.directory.exists():
            changed = self._changed(options, present)
            if not changed:
                progress.note(f"going on with what {self.directory} holds")
                return
            progress.note(f"{self.directory} is of another run ({', '.join(changed)} changed): beginning anew")
            self.remove()
        start = {goal.key: digest for goal, digest in present}
        write_text(self.directory / "run.json", json_text({**options, "start": start}))

    def _changed(self, options: Mapping[str, Any], present: Iterable[tuple[_Goal, str]]) -> list[str]:
        try:
            run = read_json(self.directory / "run.json")
        except SourceError:
            return ["run.json"]
        # Through JSON, which has no tuples.
        changed = [name for name, value in json.loads(json.dumps(options)).items() if run.get(name) != value]
        if changed:
            return changed
        for goal, digest in present:
            state = self.state(goal)
            made = _digest(state.best) if state is not None and state.finished else None
            if digest not in (run["start"].get(goal.key), made):
                changed.append(f"scales of {goal.name}")
        return changed

    def _kept(self, name: str) -> dict[str, Tensor] | None:
        file = self.directory / name
        return load_file(file) if file.is_file() else None

    def keep_teacher_states(self, hidden: Tensor) -> None:
        save_tensors(self.directory / "teacher.safetensors", {"hidden": hidden})

    def teacher_states(self) -> Tensor | None:
        kept = self._kept("teacher.safetensors")
        return None if kept is None else kept["hidden"]

    def keep_state(self, goal: _Goal, state: TuningState) -> None:
        save_tensors(self.directory / f"state-{goal.key}.safetensors", state.to_tensors())

    def state(self, goal: _Goal) -> TuningState | None:
        kept = self._kept(f"state-{goal.key}.safetensors")
        return None if kept is None else TuningState.from_tensors(kept)

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
