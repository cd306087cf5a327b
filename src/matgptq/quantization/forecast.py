"""What a quantization would do, need and take, without doing it: everything that it would refuse is refused here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matgptq.checkpoints.writer import DEFAULT_SHARD_BYTES, check_destination
from matgptq.files.run_log import check_wandb
from matgptq.machine.devices import resolve_device, resolve_dtype
from matgptq.models.source import open_source
from matgptq.progress import Progress, Silent
from matgptq.quantization.activations import Placement
from matgptq.quantization.plan import CalibrationRequest, Plan
from matgptq.quantization.preparation import check_text, prepare
from matgptq.quantization.requirements import Requirements, check_requirements
from matgptq.quantization.run_time import estimate_seconds
from matgptq.quantization.work_directory import WorkDirectory, kept_bytes
from matgptq.recipe import Recipe, make_recipe
from matgptq.slicing import check_bits
from matgptq.text.windows import SELF


@dataclass(frozen=True)
class Forecast:
    """A run that has not been started.

    Attributes:
        out: where its checkpoint would appear.
        recipe: all of its choices.
        plan: what would be quantized, and how.
        needs: memory and disk.
        seconds: from when the calibration text is there, roughly; None on a GPU.
    """

    out: Path
    recipe: Recipe
    plan: Plan
    needs: Requirements
    seconds: float | None

    @property
    def stored_bytes(self) -> int:
        """Codes and scales in the checkpoint."""
        return self.plan.stored_bytes(self.recipe)

    def check(self) -> None:
        """Refuse what this machine has no room for, counting what an interrupted run left beside ``out``.

        Raises:
            ConfigurationError: memory or disk are too small; says what would need less.
        """
        check_requirements(self.needs, self.out, kept_bytes(self.out))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "recipe": self.recipe.to_dict(),
            "layers": [asdict(layer) for layer in self.plan.layers.values()],
            "kept": list(self.plan.kept),
            "nsamples": self.plan.nsamples,
            "seqlen": self.plan.seqlen,
            "stored_bytes": self.stored_bytes,
            **asdict(self.needs),
            "seconds": self.seconds,
            "memory": dict(self.needs.memory),
            "fullest": self.needs.fullest,
            "gpu_memory": dict(self.needs.gpu_memory),
            "gpu_fullest": self.needs.gpu_fullest,
        }


def forecast(
    model: str | Path,
    out: str | Path,
    *,
    method: str = "matgptq",
    bits: Iterable[int] | int | None = None,
    bit_weights: Mapping[int, float] | Iterable[float] | None = None,
    quality: str | None = None,
    group_size: int = 128,
    dataset: str | Path | Tensor = SELF,
    nsamples: int | None = None,
    seqlen: int | None = None,
    ignore: Iterable[str] | str = ("lm_head",),
    damping: float = 0.01,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    default_bits: int | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,  # no part of it: a run's arguments can be given as they are
    activations: Placement = "auto",
    resume: bool = True,
    wandb_project: str | None = None,
    progress: Progress | None = None,
    **ingredients: Any,
) -> Forecast:
    """Look at what ``matgptq.quantize`` would do with the same arguments; nothing is written.

    Headers and the calibration text are read, on a CPU a few products are timed.

    Args:
        model, out, method, bits, bit_weights, quality, group_size, dataset, nsamples, seqlen, ignore, damping, seed,
            device, dtype, default_bits, force, trust_remote_code, shard_bytes, activations, resume, wandb_project,
            ingredients: as for ``matgptq.quantize``.
        progress: receives stages and notes.

    Raises:
        MatGPTQError: what the run would raise before it begins, but for too little memory or disk, which is
            ``Forecast.check``'s.
    """
    progress = progress or Silent()
    recipe = make_recipe(
        method, bits, bit_weights, quality, group_size=group_size, damping=damping, seed=seed, **ingredients
    )
    check_bits(recipe.target_bits[-1] if default_bits is None else default_bits)
    destination = Path(out)
    if not (resume and WorkDirectory.is_committed(destination)):
        check_destination(destination, force=force)
    check_wandb(wandb_project)
    request = CalibrationRequest(dataset, nsamples, seqlen)
    progress.start("look at the model", 1)
    source, run_device = open_source(model, trust_remote_code=trust_remote_code), resolve_device(device)
    prepared = prepare(
        source,
        recipe,
        request,
        ignore=(ignore,) if isinstance(ignore, str) else tuple(ignore),
        device=run_device,
        dtype=resolve_dtype(dtype, run_device, source.stored_dtype),
        must_rotate="rotate" in ingredients,
        activations=activations,
    )
    for note in prepared.plan.notes:
        progress.note(note)
    progress.start("look at the text", 1)
    check_text(prepared, request, recipe.seed)
    vocabulary = len(prepared.residency.network.get_input_embeddings().weight)
    seconds = estimate_seconds(prepared.plan, prepared.recipe, run_device, vocabulary)
    return Forecast(destination, prepared.recipe, prepared.plan, prepared.needs, seconds)
