"""The command ``quantize``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

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
            "--rotate/--no-rotate",
            help="Spread outliers by rotating the weights; unties the head. (default: in best, if the model can be)",
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
    import matgptq
    from matgptq.checkpoints.checkpoint import open_checkpoint
    from matgptq.console import error_table, plan_table, refinement_table, report_summary, size_table
    from matgptq.quantization.activations import check_placement

    ingredients: dict[str, Any] = {
        "sink_weight": sink_weight, "rotate": rotate, "min_expert_tokens": min_expert_tokens, "all_experts": all_experts
    }  # fmt: skip
    options: dict[str, Any] = {
        "method": method,
        "bits": parse_widths(bits),
        "bit_weights": parse_bit_weights(bit_weights),
        "quality": quality,
        "group_size": group_size,
        "dataset": dataset,
        "nsamples": nsamples,
        "seqlen": seqlen,
        "ignore": tuple(filter(None, (part.strip() for part in ignore.split(",")))),
        "damping": damp,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "force": force,
        "activations": check_placement(activations),
        "resume": resume,
        "trust_remote_code": trust_remote_code,
        "wandb_project": wandb,
        **{name: value for name, value in ingredients.items() if value is not None},
    }
    if dry_run:
        with progress_bars() as progress:
            found = matgptq.forecast(model, out, progress=progress, **options)
        out_console.print(plan_table(found))
        found.check()
        write_json(json_file, found.to_dict())
        return
    with progress_bars() as progress:
        report = matgptq.quantize(model, out, progress=progress, **options)
    if os.environ.get("RANK", "0") != "0":  # of several processes the first speaks
        return
    out_console.print(error_table(report.layers, every_layer=every_layer))
    out_console.print(size_table(open_checkpoint(out)))
    if report.refinement:
        out_console.print(refinement_table([*report.refinement.values()]))
    out_console.print(report_summary(report), highlight=False)
    out_console.print(f"saved to {out}", markup=False, highlight=False)
    write_json(json_file, report.to_dict())
