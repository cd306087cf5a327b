"""What a run will need, computed before it starts: memory and disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from matgptq.errors import ConfigurationError
from matgptq.machine.memory import has_own_memory
from matgptq.quantization.activations import Placement
from matgptq.quantization.plan import Plan, output_hessian_bytes
from matgptq.quantization.stage_memory import MEMORY_SHARE, TEXT, TUNING, StageMemory, entering_bytes
from matgptq.recipe import Recipe
from matgptq.text.self_text import writes_in_bfloat16

_GPU_MEMORY = "GPU memory"


@dataclass(frozen=True)
class Requirements:
    """Estimates.

    Attributes:
        stages: bytes of memory by stage and by what they are for; those of a stage are needed together.
        gpu_stages: the same of the GPU's memory; empty where the run needs none.
        free: bytes of memory that this process might still take before any of the model was read, if that is known.
        gpu_free: the same of the GPU's.
        disk: bytes by what they are for, while the run goes on.
        activations: where they will be kept.
        output_hessians: where they will be summed.
        windows_together: whose gradients will be found at a time.
        streamed: whether blocks are read one by one.
        writes_text: whether the model writes its own text first, as far as it is not there yet.
    """

    stages: Mapping[str, Mapping[str, int]]
    gpu_stages: Mapping[str, Mapping[str, int]]
    free: int | None
    gpu_free: int | None
    disk: Mapping[str, int]
    activations: Placement
    output_hessians: Placement
    windows_together: int
    streamed: bool
    writes_text: bool

    @property
    def fullest(self) -> str:
        """The stage that takes most memory."""
        return _fullest(self.stages)

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes of that stage by what they are for."""
        return self.stages[self.fullest]

    @property
    def gpu_fullest(self) -> str | None:
        """The stage that takes most of the GPU's memory; None where the run needs none."""
        return _fullest(self.gpu_stages) if self.gpu_stages else None

    @property
    def gpu_memory(self) -> Mapping[str, int]:
        """Bytes of that stage by what they are for."""
        return {} if self.gpu_fullest is None else self.gpu_stages[self.gpu_fullest]


def estimate_requirements(
    network: Any,
    plan: Plan,
    recipe: Recipe,
    kept_bytes: int,
    *,
    streamed: bool,
    activations: Placement,
    device: torch.device,
    stored_dtype: str | None,
    whole_for_text: bool,
    free: int | None,
    gpu_free: int | None = None,
) -> Requirements:
    """Add up what each stage of a run holds at the same time.

    Args:
        network: the model; may be without weights.
        plan: of the run.
        recipe: of the run.
        kept_bytes: of everything that goes into the checkpoint unquantized.
        streamed: blocks are read one by one.
        activations: as asked for; ``auto`` is decided here.
        device: where the model runs.
        stored_dtype: of the model's weights in their files, if that is known.
        whole_for_text: the model writes its own text, for which it must be in memory as a whole.
        free, gpu_free: bytes without anything of the model, if that is known.
    """
    states = plan.nsamples * entering_bytes(network, plan)
    outputs = output_hessian_bytes(plan.blocks, plan.rows_together) if plan.rows_together else 0
    on_gpu = has_own_memory(device)
    if activations == "auto":
        activations = "memory" if _has_room(states, gpu_free if on_gpu else free) else "disk"
    output_hessians = activations if _has_room(outputs, free) else "disk"
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    rounded = device.type == "cpu" and writes_in_bfloat16(network) and stored_dtype != "bfloat16"
    memory = StageMemory(
        network, plan, recipe, streamed=streamed, activations=activations, output_hessians=output_hessians,
        threads=threads, writes_text=whole_for_text, writes_in_a_copy=rounded, on_gpu=on_gpu,
    )  # fmt: skip
    memory = memory.with_windows(gpu_free if on_gpu else free)
    output = plan.stored_bytes(recipe) + kept_bytes
    disk = {"finished blocks": output, "checkpoint": output}
    if plan.nsamples:
        disk["activations"] = 2 * states
    if outputs:
        disk["output Hessians"] = outputs if output_hessians == "memory" else 2 * outputs
    return Requirements(
        stages=memory.stages(),
        gpu_stages=memory.gpu_stages(),
        free=free,
        gpu_free=gpu_free,
        disk=disk,
        activations=activations,
        output_hessians=output_hessians,
        windows_together=memory.windows_together,
        streamed=streamed,
        writes_text=whole_for_text,
    )


def check_requirements(needs: Requirements, destination: Path, present: int = 0) -> None:
    """Refuse a run that cannot fit.

    Args:
        needs: of the run, from its beginning.
        destination: of the checkpoint.
        present: bytes of these that lie on the disk already.

    Raises:
        ConfigurationError: says how much is needed of what, how much there is, and what would need less.
    """
    if needs.gpu_fullest is not None:
        _check_memory(needs, _GPU_MEMORY, needs.gpu_memory, needs.gpu_fullest, needs.gpu_free)
    _check_memory(needs, "memory", needs.memory, needs.fullest, needs.free)
    place = Path(os.path.abspath(destination)).parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    wanted = sum(needs.disk.values()) - present
    if wanted > free:
        raise ConfigurationError(
            f"this needs about {_gigabytes(wanted)} of disk while it runs, {_gigabytes(free)} are free at {place}"
        )


def _check_memory(needs: Requirements, name: str, parts: Mapping[str, int], stage: str, free: int | None) -> None:
    wanted = sum(parts.values())
    if free is not None and wanted > free:
        raise ConfigurationError(
            f"this needs about {_gigabytes(wanted)} of {name} while {stage}, {_gigabytes(free)} are free: "
            f"{_advice(stage, needs)}{', or --device cpu' if name == _GPU_MEMORY else ''}"
        )


def _fullest(stages: Mapping[str, Mapping[str, int]]) -> str:
    return max(stages, key=lambda name: sum(stages[name].values()))


def _has_room(count: int, free: int | None) -> bool:
    """Whether something that could lie elsewhere stays in memory."""
    return free is None or count < free // MEMORY_SHARE


def _advice(stage: str, needs: Requirements) -> str:
    """What would take less memory in a stage."""
    if stage == TEXT:
        return "a text of your own (--dataset) instead of self, for which the whole model must be in memory"
    if stage == TUNING:
        return "--quality balanced, which tunes nothing (`matgptq refine --scope block` takes less)"
    advice = "fewer or shorter windows (--nsamples, --seqlen)"
    return f"--activations disk, or {advice}" if needs.activations == "memory" else advice


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
