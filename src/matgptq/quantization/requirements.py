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
from matgptq.quantization.activations import Placement
from matgptq.quantization.plan import Plan, output_hessian_bytes
from matgptq.quantization.stage_memory import MEMORY_SHARE, TEXT, TUNING, StageMemory, entering_bytes
from matgptq.recipe import Recipe
from matgptq.text.self_text import writes_in_bfloat16


@dataclass(frozen=True)
class Requirements:
    """Estimates.

    Attributes:
        stages: bytes of memory by stage and by what they are for; those of a stage are needed together.
        disk: bytes by what they are for, while the run goes on.
        activations: where they will be kept.
        output_hessians: where they will be summed.
        windows_together: whose gradients will be found at a time.
        streamed: whether blocks are read one by one.
        writes_text: whether the model writes its own text first, as far as it is not there yet.
    """

    stages: Mapping[str, Mapping[str, int]]
    disk: Mapping[str, int]
    activations: Placement
    output_hessians: Placement
    windows_together: int
    streamed: bool
    writes_text: bool

    @property
    def fullest(self) -> str:
        """The stage that takes most memory."""
        return max(self.stages, key=lambda name: sum(self.stages[name].values()))

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes of that stage by what they are for."""
        return self.stages[self.fullest]


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
    """
    states = plan.nsamples * entering_bytes(network, plan)
    outputs = output_hessian_bytes(plan.blocks, plan.rows_together) if plan.rows_together else 0
    free = available_memory()
    room = None if free is None else free // MEMORY_SHARE
    if activations == "auto":
        activations = "memory" if room is None or states < room else "disk"
    output_hessians = activations if room is None or outputs < room else "disk"
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    rounded = device.type == "cpu" and writes_in_bfloat16(network) and stored_dtype != "bfloat16"
    memory = StageMemory(
        network, plan, recipe, streamed=streamed, activations=activations, output_hessians=output_hessians,
        threads=threads, writes_text=whole_for_text, writes_in_a_copy=rounded,
    )  # fmt: skip
    # What a GPU has free, where blocks and what they leave lie then, is not known here.
    memory = memory.with_windows(free if device.type == "cpu" else None)
    output = plan.stored_bytes(recipe) + kept_bytes
    disk = {"finished blocks": output, "checkpoint": output}
    if plan.nsamples:
        disk["activations"] = 2 * states
    if outputs:
        disk["output Hessians"] = outputs if output_hessians == "memory" else 2 * outputs
    return Requirements(
        memory.stages(), disk, activations, output_hessians, memory.windows_together, streamed, whole_for_text
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
    free = available_memory()
    wanted = sum(needs.memory.values())
    if free is not None and wanted > free:
        raise ConfigurationError(
            f"this needs about {_gigabytes(wanted)} of memory while {needs.fullest}, {_gigabytes(free)} are free: "
            f"{_advice(needs)}"
        )
    place = Path(os.path.abspath(destination)).parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    wanted = sum(needs.disk.values()) - present
    if wanted > free:
        raise ConfigurationError(
            f"this needs about {_gigabytes(wanted)} of disk while it runs, {_gigabytes(free)} are free at {place}"
        )


def available_memory() -> int | None:
    """Bytes that this process may still take: what the system has free, within the limit of its control group."""
    found = []
    try:
        with open("/proc/meminfo", encoding="ascii") as handle:
            fields = dict(line.split(":", 1) for line in handle)
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        if limit != "max":
            found.append(max(0, int(limit) - used))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def _advice(needs: Requirements) -> str:
    """What would take less memory."""
    if needs.fullest == TEXT:
        return "a text of your own (--dataset) instead of self, for which the whole model must be in memory"
    if needs.fullest == TUNING:
        return "--quality balanced, which tunes nothing (`matgptq refine --scope block` takes less)"
    advice = "fewer or shorter windows (--nsamples, --seqlen)"
    return f"--activations disk, or {advice}" if needs.activations == "memory" else advice


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
