"""Find the width of every layer that loses least within a budget, for one budget or many at once.

Method ``sensitivity`` measures what each group of layers loses alone, takes the exact optimum of the sum of these
losses, and refines it by evolution on scores of the whole model. Method ``evolution`` is the published one, for
comparison: evolution from uniform widths, without a table. Either way no candidate is ever over budget.

The text is cut into windows. Most are the pool that candidates are scored on, in subsets drawn anew for each round;
the rest is held out, and only winners are measured on it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matgptq.allocation import Allocation
from matgptq.checkpoints.allocation_scales import save_found
from matgptq.checkpoints.allocation_store import check_name
from matgptq.checkpoints.checkpoint import Checkpoint, open_checkpoint
from matgptq.errors import ConfigurationError
from matgptq.files.run_log import LOG_NAME, RunLog, check_wandb
from matgptq.inference.loading import load
from matgptq.inference.reference_model import find_reference, load_reference
from matgptq.machine.devices import multiplies_bfloat16, resolve_device, resolve_dtype
from matgptq.models.blocks import block_modules
from matgptq.models.families import Family, find_family
from matgptq.models.model_config import check_window, longest_window
from matgptq.models.source import ModelSource, load_tokenizer
from matgptq.models.teacher import observe
from matgptq.progress import Progress, Silent, StageClock, counting_steps
from matgptq.slicing import WIDTHS
from matgptq.text.windows import SELF, Windows, calibration_windows, check_texts
from matgptq.width_search.budget import Budget, SearchSpace, bits_budget, size_budget
from matgptq.width_search.layer_groups import group_layers
from matgptq.width_search.optimum import Genome
from matgptq.width_search.run import SearchRun
from matgptq.width_search.scoring import Fitness, Scorer
from matgptq.width_search.settings import DEFAULT_SEQLEN, DEFAULT_TOKENS, Fuse, Method, SearchSettings, make_settings

Target = float | str | Fraction
DIRECTORY = "search"  # in the checkpoint: tables, states and the log
# Calibration takes the plain seed; the search should not meet the same documents first.
_SEED_OFFSET = 0x53454152


@dataclass(frozen=True)
class Measured:
    """An allocation or a uniform width, on text that the search did not see.

    Attributes:
        name: of the allocation; ``3 bits`` for a uniform width.
        target: the budget in words; empty for a uniform width.
        bits: average width of the codes.
        bits_per_weight: with all scales that serving reads.
        bytes: of the whole model as served.
        slack_bits: what is left of the budget.
        loss: KL to the full model, or negative log-likelihood, in nats per token.
        widths: one for each group of ``Search.groups``.
    """

    name: str
    target: str
    bits: float
    bits_per_weight: float
    bytes: int
    slack_bits: int
    loss: float
    widths: Genome


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        found: one for each budget, in their order.
        uniform: uniform widths beside them: all for several budgets, the neighbours for a single one.
        groups: ``(block, kind)`` of each group of layers.
        fitness: ``kl`` or ``ppl``.
        protocol: what text, and how it was cut.
        tokens_scored: tokens that candidates were scored on, table included, final measurement not.
        seconds: wall time by stage.
    """

    found: list[Measured]
    uniform: list[Measured]
    groups: list[tuple[int, str]]
    fitness: Fitness
    protocol: str
    tokens_scored: int
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


def search(
    path: str | Path,
    target_bits: Target | Iterable[Target] | None = None,
    *,
    target_size: int | str | None = None,
    widths: Iterable[int] = WIDTHS,
    fuse: Fuse = "serving",
    fitness: Fitness = "kl",
    method: Method = "sensitivity",
    dataset: str | Path | Tensor = SELF,
    tokens: int = DEFAULT_TOKENS,
    seqlen: int | None = None,
    generations: int | None = None,
    offspring: int | None = None,
    seed: int = 0,
    save: str | None = None,
    resume: bool = False,
    reference: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    wandb_project: str | None = None,
    progress: Progress | None = None,
) -> Search:
    """Find an allocation for each budget and save it with the checkpoint.

    One of the same name is replaced; scales of its own stay if its widths do.

    Args:
        path: checkpoint directory; tables, states and the log go to ``search/`` in it, results to ``allocations/``.
        target_bits: budget in bits per weight, every scale that serving reads included, or several.
        target_size: budget in bytes of the whole model as served, or text like ``80MB``; instead of ``target_bits``.
        widths: that a layer may have.
        fuse: ``serving`` gives one width to the layers that serving engines fuse; ``none`` lifts that.
        fitness: ``kl`` to the full model, or ``ppl``, which needs no full model.
        method: ``sensitivity`` or ``evolution``; see the module.
        dataset: text to search on, as for ``quantize``.
        tokens: size of the pool; half as many are held out in addition.
        seqlen: tokens in a window; default 512 or the model's context.
        generations, offspring: of the evolution; default by method, and fewer for each of several budgets.
        seed: of the text and the evolution. The same seed gives the same answer on the same machine.
        save: name of the allocation, with several budgets the beginning of their names; default by budget.
        resume: go on with an interrupted search of the same settings. Tables are taken up in any case.
        reference: the full-precision model; default the one that the checkpoint was made from.
        device, dtype: of both models; ``auto`` is bfloat16 on a CPU that multiplies it.
        trust_remote_code: allow code in the models' directories to run.
        wandb_project: log to Weights & Biases, too.
        progress: receives stages and notes.

    Raises:
        AllocationError: no allocation fits a budget; says what could be reached.
        ConfigurationError: an option is out of range, or the pool is too small.
        MatGPTQError: other subclasses for checkpoint, reference and text.
    """
    progress = progress or Silent()
    clock = StageClock()
    checkpoint = open_checkpoint(path)
    targets = _targets(target_bits, target_size)
    seqlen = min(DEFAULT_SEQLEN, longest_window(checkpoint.config) or DEFAULT_SEQLEN) if seqlen is None else seqlen
    check_window(checkpoint.config, seqlen)
    settings = make_settings(
        method=method, fitness=fitness, fuse=fuse, widths=widths, seed=seed, tokens=tokens, seqlen=seqlen,
        generations=generations, offspring=offspring, budgets=len(targets),
    )  # fmt: skip
    groups = group_layers(checkpoint.layers, _family(checkpoint), fuse=fuse == "serving")
    space = SearchSpace(groups, settings.widths, checkpoint.other_bytes)
    budgets = [bits_budget(space, target) for target in targets]
    if target_size is not None:
        budgets = [size_budget(space, target_size)]
    names = _names(budgets, save)
    source = None
    if fitness == "kl":
        source = find_reference(
            checkpoint, reference, trust_remote_code=trust_remote_code, instead=", or --fitness ppl"
        )
    check_wandb(wandb_project)
    check_texts(dataset, settings.pool + settings.held_out)
    run_device = resolve_device(device)
    models = _Models(checkpoint, source, run_device, _scoring_dtype(dtype, run_device, checkpoint), trust_remote_code)
    identity = {**models.identity, "fitness": fitness, "fuse": fuse}
    described = {**dataclasses.asdict(settings), **identity}
    with RunLog(checkpoint.path / DIRECTORY / LOG_NAME, described, wandb_project=wandb_project) as log:
        scorer, protocol = _scorer(models, space, dataset, settings, progress)
        run = SearchRun(space, settings, scorer, identity, checkpoint.path / DIRECTORY, log, progress)
        clock.lap("load")
        losses = run.table() if method == "sensitivity" else None
        clock.lap("table")
        states = [run.refine(budget, losses, resume=resume) for budget in budgets]
        clock.lap("refine")
        uniform = [bits for bits in space.widths if len(budgets) > 1 or abs(bits - space.code_bits(states[0].best)) < 1]
        values = run.held_out([*(state.best for state in states), *map(space.uniform, uniform)])
        clock.lap("measure")
        found = []
        for budget, name, state, value in zip(budgets, names, states, values, strict=False):
            found.append(_measured(space, state.best, value, name, budget))
            how = {**described, "text": protocol, "generation": state.generation}
            save_found(checkpoint, _allocation(checkpoint, space, found[-1], settings, how), progress)
            log.write("found", **dataclasses.asdict(found[-1]))
    return Search(
        found=found,
        uniform=[
            _measured(space, space.uniform(bits), value, f"{bits} bits")
            for bits, value in zip(uniform, values[len(budgets) :], strict=True)
        ],
        groups=[(group.block, group.kind) for group in space.groups],
        fitness=fitness,
        protocol=f"the last {settings.held_out} of {protocol}",
        tokens_scored=run.tokens_scored,
        seconds=clock.laps,
    )


@dataclass(frozen=True)
class _Models:
    """Whose predictions are compared, and where and in what precision they run.

    Attributes:
        checkpoint: whose widths are searched.
        source: the full model, where it is asked.
        device, dtype: of both.
        trust_remote_code: allow code in their directories to run.
    """

    checkpoint: Checkpoint
    source: ModelSource | None
    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool

    @property
    def identity(self) -> dict[str, Any]:
        """All of this that a score depends on, JSON-ready."""
        return {
            "checkpoint": self.checkpoint.identity,
            "reference": self.source and self.source.name,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def quantized(self, bits: int) -> Any:
        """The checkpoint's model, at a width."""
        return load(
            self.checkpoint.path, bits, device=self.device, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )

    def full(self) -> Any:
        """The full model, or None."""
        return self.source and load_reference(self.source, self.checkpoint, self.device, self.dtype)


def _scorer(
    models: _Models, space: SearchSpace, dataset: str | Path | Tensor, settings: SearchSettings, progress: Progress
) -> tuple[Scorer, str]:
    """Load the models, ask the full one, which is then let go; what scores candidates, and on what text."""
    progress.start("load the models", 1)
    model, full = models.quantized(space.widths[-1]), models.full()
    windows = _windows(models, dataset, settings, full or model, progress)
    teacher = None
    if full is not None:
        progress.start("run the full model", len(windows.tokens))
        teacher = observe(full, windows.tokens, progress.advance)
        del full
    blocks = block_modules(model, _family(models.checkpoint))
    return Scorer(model, blocks, space.groups, windows.tokens, teacher), windows.protocol


def _family(checkpoint: Checkpoint) -> Family:
    return find_family(str(checkpoint.config.get("model_type")))


def _targets(target_bits: Target | Iterable[Target] | None, target_size: int | str | None) -> list[Target]:
    """The budgets in bits per weight; none if there is a size instead."""
    if (target_bits is None) == (target_size is None):
        raise ConfigurationError("give a target: either bits per weight or a size")
    if target_bits is None:
        return []
    targets = [target_bits] if isinstance(target_bits, int | float | str | Fraction) else list(target_bits)
    if not targets:
        raise ConfigurationError("give at least one target")
    return targets


def _names(budgets: Sequence[Budget], save: str | None) -> list[str]:
    if save is not None and len(budgets) == 1:
        return [check_name(save)]
    return [check_name(f"{save}-{budget.label}" if save is not None else budget.label) for budget in budgets]


def _scoring_dtype(dtype: str | torch.dtype, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """bfloat16 where a CPU multiplies it several times as fast: it ranks allocations as float32 does."""
    if dtype == "auto" and device.type == "cpu" and multiplies_bfloat16(device):
        return torch.bfloat16
    return resolve_dtype(dtype, device, checkpoint.stored_dtype)


def _windows(
    models: _Models, dataset: str | Path | Tensor, settings: SearchSettings, model: Any, progress: Progress
) -> Windows:
    """The pool's windows, and the held-out ones behind them."""
    count = settings.pool + settings.held_out
    progress.start("search text", count)
    tokenizer = None
    if not isinstance(dataset, Tensor):
        tokenizer = load_tokenizer(models.checkpoint.path, trust_remote_code=models.trust_remote_code)
    return calibration_windows(
        dataset,
        tokenizer,
        nsamples=count,
        seqlen=settings.seqlen,
        seed=settings.seed + _SEED_OFFSET,
        model=model,
        progress=counting_steps(progress, count),
    )


def _measured(space: SearchSpace, genome: Genome, loss: float, name: str, budget: Budget | None = None) -> Measured:
    return Measured(
        name=name,
        target="" if budget is None else budget.name,
        bits=space.code_bits(genome),
        bits_per_weight=space.bits_per_weight(genome),
        bytes=space.size(genome),
        slack_bits=0 if budget is None else budget.bits - space.cost(genome),
        loss=loss,
        widths=genome,
    )


def _allocation(
    checkpoint: Checkpoint, space: SearchSpace, found: Measured, settings: SearchSettings, how: Mapping[str, Any]
) -> Allocation:
    value = math.exp(min(found.loss, 700)) if settings.fitness == "ppl" else found.loss
    return Allocation(
        name=found.name,
        checkpoint=checkpoint.codes_identity,
        target=found.target,
        bits=found.bits,
        bits_per_weight=found.bits_per_weight,
        bytes=found.bytes,
        slack_bits=found.slack_bits,
        fitness={"measure": settings.fitness, "value": value, "windows": settings.held_out},
        found=how,
        layers=space.allocation(found.widths),
    )
