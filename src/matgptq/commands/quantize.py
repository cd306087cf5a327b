"""The command ``quantize``."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matgptq.commands.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    TrustOption,
    WandbOption,
    examples,
    out_console,
    parse_bit_weights,
    parse_widths,
    progress_bars,
    write_json,
)

if TYPE_CHECKING:
    from matgptq.recipe import Recipe

EPILOG = examples(
    "matgptq quantize HuggingFaceTB/SmolLM2-135M-Instruct -o smollm2",
    "matgptq quantize ./model -o out --bits 2,3,4,8 --group-size 64 --dataset c4 --nsamples 128",
    "matgptq quantize ./model -o out --quality best",
    "matgptq quantize ./model -o out4 --method gptq --bits 4",
    "torchrun --nproc-per-node 4 -m matgptq quantize ./model -o out --dataset c4",
)


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face directory, .gguf file or hub id.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="Checkpoint directory to create.")],
    bits: Annotated[str | None, typer.Option(help="Target widths. (default: 2,3,4,8; balanced and best add 6)")] = None,
    bit_weights: Annotated[
        str | None, typer.Option(help="Importance of each width: 4,8,16,256 or 2=4,8=256. (default: by quality)")
    ] = None,
    quality: Annotated[
        str | None,
        typer.Option(help="fast, balanced or best: time that matgptq takes for quality. (default: balanced)"),
    ] = None,
    group_size: Annotated[int, typer.Option(help="Input columns per scale; -1 for a whole row.")] = 128,
    method: Annotated[str, typer.Option(help="matgptq, paper, gptq (one width) or rtn.")] = "matgptq",
    dataset: Annotated[
        str,
        typer.Option(
            metavar="FILE|HUB-ID|self", help="Calibration text; self: the model writes its own; a,b,self: in turns."
        ),
    ] = "self",
    nsamples: Annotated[int | None, typer.Option(help="Calibration windows. (default: 128; 16 on a CPU)")] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens per window. (default: 2048; 512 for self on a CPU)")
    ] = None,
    ignore: Annotated[
        str, typer.Option(help="Layers to keep at full precision: names or * patterns, comma-separated.")
    ] = "lm_head",
    damp: Annotated[
        float, typer.Option("--damp", "--damping", help="Damping, as a fraction of the mean Hessian diagonal.")
    ] = 0.01,
    sink_weight: Annotated[
        float | None,
        typer.Option(help="Weight of first positions in the Hessians; 1: off. (default: 64 for fast and gptq, else 1)"),
    ] = None,
    rotate: Annotated[
        bool | None,
        typer.Option(
            "--rotate/--no-rotate", help="Spread outliers by rotating the weights; unties the head. (default: in best)"
        ),
    ] = None,
    min_expert_tokens: Annotated[
        int, typer.Option(help="Calibration tokens that an expert needs; with fewer it is calibrated on all of them.")
    ] = 128,
    all_experts: Annotated[
        bool, typer.Option("--all-experts", help="Calibrate every expert on every token, not on those routed to it.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the choice of calibration windows, and of the rotation.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    activations: Annotated[
        str, typer.Option(help="Where calibration activations are kept: memory, disk or auto.")
    ] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with an interrupted run of this command.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that stands at OUT.")] = False,
    every_layer: Annotated[bool, typer.Option("--layers", help="One table row per layer, not per kind.")] = False,
    wandb: WandbOption = None,
    trust_remote_code: TrustOption = False,
    json_file: JsonOption = None,
) -> None:
    """Quantize MODEL once for all widths and write the checkpoint OUT."""
    widths, weights = parse_widths(bits), parse_bit_weights(bit_weights)
    chosen: dict[str, Any] = {
        "sink_weight": sink_weight, "rotate": rotate, "min_expert_tokens": min_expert_tokens, "all_experts": all_experts
    }  # fmt: skip
    ingredients = {name: value for name, value in chosen.items() if value is not None}
    ignored = tuple(filter(None, (part.strip() for part in ignore.split(","))))
    if dry_run:
        from matgptq.recipe import make_recipe

        recipe = make_recipe(
            method, widths, weights, quality, group_size=group_size, damping=damp, seed=seed, **ingredients
        )
        _dry_run(
            model, out, recipe, dataset, nsamples, seqlen, ignored, device, dtype, activations, force,
            trust_remote_code, wandb, json_file,
        )  # fmt: skip
        return
    import matgptq
    from matgptq.activations import check_placement
    from matgptq.checkpoint import open_checkpoint
    from matgptq.console import error_table, refinement_table, report_summary, size_table

    with progress_bars() as progress:
        report = matgptq.quantize(
            model,
            out,
            method=method,
            bits=widths,
            bit_weights=weights,
            quality=quality,
            group_size=group_size,
            dataset=dataset,
            nsamples=nsamples,
            seqlen=seqlen,
            ignore=ignored,
            damping=damp,
            seed=seed,
            device=device,
            dtype=dtype,
            force=force,
            activations=check_placement(activations),
            resume=resume,
            trust_remote_code=trust_remote_code,
            wandb_project=wandb,
            progress=progress,
            **ingredients,
        )
    if os.environ.get("RANK", "0") != "0":  # of several processes the first speaks
        return
    out_console.print(error_table(report.layers, every_layer=every_layer))
    out_console.print(size_table(open_checkpoint(out)))
    if report.refinement:
        out_console.print(refinement_table([*report.refinement.values()]))
    out_console.print(report_summary(report), highlight=False)
    out_console.print(f"saved to {out}", markup=False, highlight=False)
    write_json(json_file, report.to_dict())


def _dry_run(
    model: str, out: Path, recipe: Recipe, dataset: str, nsamples: int | None, seqlen: int | None,
    ignored: tuple[str, ...], device: str, dtype: str, activations: str, force: bool, trust_remote_code: bool,
    wandb: str | None, json_file: Path | None,
) -> None:  # fmt: skip
    from matgptq.activations import check_placement
    from matgptq.checkpoint_writer import check_destination
    from matgptq.console import plan_table
    from matgptq.devices import resolve_device, resolve_dtype
    from matgptq.plan import CalibrationRequest
    from matgptq.preparation import check_text, prepare
    from matgptq.requirements import check_requirements
    from matgptq.run_log import check_wandb
    from matgptq.run_time import estimate_seconds
    from matgptq.source import open_source
    from matgptq.work_directory import WorkDirectory, kept_bytes

    if not WorkDirectory.is_committed(out):
        check_destination(out, force=force)
    check_wandb(wandb)
    request = CalibrationRequest(dataset, nsamples, seqlen)
    with progress_bars() as progress:
        progress.start("look at the model", 1)
        source, run_device = open_source(model, trust_remote_code=trust_remote_code), resolve_device(device)
        prepared = prepare(
            source,
            recipe,
            request,
            ignore=ignored,
            device=run_device,
            dtype=resolve_dtype(dtype, run_device, source.stored_dtype),
            activations=check_placement(activations),
        )
        for note in prepared.plan.notes:
            progress.note(note)
        progress.start("look at the text", 1)
        check_text(prepared, request, recipe.seed)
    plan, needs = prepared.plan, prepared.needs
    vocabulary = len(prepared.residency.network.get_input_embeddings().weight)
    seconds = estimate_seconds(plan, recipe, run_device, vocabulary)
    out_console.print(plan_table(plan, needs, seconds, plan.stored_bytes(recipe)))
    check_requirements(needs, out, kept_bytes(out))
    record = {
        "recipe": recipe.to_dict(),
        "layers": [asdict(layer) for layer in plan.layers.values()],
        "kept": list(plan.kept),
        "nsamples": plan.nsamples,
        "seqlen": plan.seqlen,
        "stored_bytes": plan.stored_bytes(recipe),
        **asdict(needs),
        "seconds": seconds,
        "memory": dict(needs.memory),
        "fullest": needs.fullest,
    }
    write_json(json_file, record)
