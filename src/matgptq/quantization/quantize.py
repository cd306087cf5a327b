"""From a full-precision model to a checkpoint: check, calibrate, solve block by block, write.

No more of the model is in memory than one block and what stands around the blocks; every finished block is kept in a
work directory, from which the same command goes on after whatever stopped it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matgptq.checkpoints.format import REPORT_NAME
from matgptq.checkpoints.writer import DEFAULT_SHARD_BYTES, check_destination
from matgptq.files.json_files import read_json
from matgptq.files.run_log import check_wandb
from matgptq.machine.devices import resolve_device, resolve_dtype
from matgptq.machine.distributed import local_device, processes
from matgptq.models.source import open_source
from matgptq.progress import Progress, Silent, StageClock
from matgptq.quantization.activations import Placement
from matgptq.quantization.fingerprint import fingerprint_data, fingerprint_model, fingerprint_software
from matgptq.quantization.plan import CalibrationRequest
from matgptq.quantization.preparation import prepare
from matgptq.quantization.requirements import check_requirements
from matgptq.quantization.run import QuantizationRun
from matgptq.quantization.work_directory import WorkDirectory, kept_bytes
from matgptq.recipe import make_recipe
from matgptq.report import Report
from matgptq.slicing import check_bits
from matgptq.text.windows import SELF
from matgptq.tuning.refinement import refine


def quantize(
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
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    activations: Placement = "auto",
    resume: bool = True,
    wandb_project: str | None = None,
    progress: Progress | None = None,
    **ingredients: Any,
) -> Report:
    """Quantize a causal language model once, for all widths, and write one checkpoint.

    Args:
        model: a local Hugging Face directory, a ``.gguf`` file or a hub id.
        out: directory to create; appears whole or not at all.
        method: ``matgptq``, ``paper``, ``gptq`` (one width) or ``rtn``.
        bits: target widths, default 2,3,4,8.
        bit_weights: lambda, ``{width: weight}`` or in the order of ``bits``; default by ``quality``.
        quality: ``fast``, ``balanced`` (default) or ``best``: how much time the method matgptq takes.
        group_size: input columns per scale, -1 for a whole row.
        dataset: calibration text: a ``.txt``, ``.jsonl`` or ``.parquet`` file, a hub data set, ``self`` (the model
            writes its own), several of these with commas between them, or int64 token ids ``[n, seqlen]``.
        nsamples, seqlen: calibration windows and tokens in each; defaults 128 and 2048, fewer on a CPU.
        ignore: names or ``*`` patterns of Linear layers to keep at full precision. The output head always is.
        damping: fraction of the mean Hessian diagonal.
        seed: of the choice of windows, and of the rotation.
        device, dtype: where and in what precision the model runs; see ``matgptq.machine.devices``.
        default_bits: width that loaders of the checkpoint serve when nothing else is asked for; default: the
            largest target.
        force: replace a checkpoint that stands at ``out``.
        trust_remote_code: allow code in the model's directory to run.
        shard_bytes: size of one output file.
        activations: where calibration activations are kept between blocks: ``memory``, ``disk``, or ``auto``: in memory
            up to a quarter of it.
        resume: go on with what an interrupted run of the same inputs left beside ``out``; otherwise throw it away.
        wandb_project: log to Weights & Biases, too, not only to ``log.jsonl`` in the checkpoint.
        progress: receives stages and notes.
        ingredients: any other field of ``matgptq.recipe.Recipe``, e.g. ``coordinate_passes=2`` or ``rotate=True``.

    Returns:
        What was done to each layer; the same record lies in the checkpoint as ``report.json``.

    Raises:
        MatGPTQError: a subclass that says what is wrong; nothing is left at ``out``. Finished blocks, and what took
            long before the first, are kept in ``.OUT.unfinished`` beside it.
    """
    progress = progress or Silent()
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    recipe = make_recipe(
        method, bits, bit_weights, quality, group_size=group_size, damping=damping, seed=seed, **ingredients
    )
    default_bits = check_bits(recipe.target_bits[-1] if default_bits is None else default_bits)
    run_device = local_device(resolve_device(device))
    destination = Path(out)
    committed = resume and WorkDirectory.is_committed(destination)
    if not committed:
        check_destination(destination, force=force)
    check_wandb(wandb_project)
    clock = StageClock()
    source = open_source(model, trust_remote_code=trust_remote_code)
    request = CalibrationRequest(dataset, nsamples, seqlen)
    run_dtype = resolve_dtype(dtype, run_device, source.stored_dtype)
    identity = {
        "model": fingerprint_model(source),
        "text": fingerprint_data(dataset),
        "nsamples": nsamples,
        "seqlen": seqlen,
        "recipe": recipe.to_dict(),
        "ignore": [*ignore],
        "dtype": str(run_dtype),
        "default_bits": default_bits,
        "shard_bytes": shard_bytes,
        "software": fingerprint_software(run_device),
    }
    with ExitStack() as group:
        together = group.enter_context(processes(run_device))
        progress = progress if together.is_first else Silent()
        with WorkDirectory(destination, identity, resume=resume, processes=together) as work:
            try:
                if together.send_text("done" if committed and work.is_same else "", 0):
                    report = Report.from_dict(read_json(destination / REPORT_NAME))
                else:
                    if together.is_first:
                        check_destination(destination, force=force)
                    prepared = prepare(
                        source, recipe, request, ignore=ignore, device=run_device, dtype=run_dtype,
                        must_rotate="rotate" in ingredients, activations=activations,
                    )  # fmt: skip
                    check_requirements(prepared.needs, destination, kept_bytes(destination))
                    clock.lap("load")
                    run = QuantizationRun(prepared, request, work, together, clock, progress)
                    report = run.quantize(
                        destination, default_bits, wandb_project, force=force, shard_bytes=shard_bytes
                    )
                    del run, prepared
                together.wait()
            except (KeyboardInterrupt, SystemExit):
                progress.note(work.kept)
                raise
            group.close()  # tuning takes long and is the first process's: the others do not wait for it
            if recipe.tuned_bits and together.is_first:
                # The checkpoint stands already: if this is interrupted, `matgptq refine` goes on, too.
                tuned = refine(
                    out,
                    recipe.tuned_bits,
                    steps=recipe.tuning_steps,
                    dataset=dataset if isinstance(dataset, Tensor) else None,
                    seed=seed,
                    reference=model,
                    device=device,
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                    progress=progress,
                )
                report.refinement = {str(result.bits): result for result in tuned}
                clock.lap("tune")
    report.seconds = {**report.seconds, **clock.laps}
    return report
