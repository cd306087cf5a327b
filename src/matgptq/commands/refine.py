"""The command ``refine``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from matgptq.commands.options import (
    Checkpoint,
    DeviceOption,
    DtypeOption,
    JsonOption,
    TrustOption,
    examples,
    out_console,
    parse_widths,
    progress_bars,
    write_json,
)

EPILOG = examples(
    "matgptq refine out",
    "matgptq refine out --bits 2,3,4 --steps 256 --dataset c4",
    "matgptq refine out --bits 3 --scope block",
    "matgptq refine out --allocation 3.25bpw",
)


def refine(
    checkpoint: Checkpoint,
    bits: Annotated[str | None, typer.Option(help="Widths to tune. (default: 2,3)")] = None,
    allocation: Annotated[
        str | None, typer.Option(metavar="NAME", help="Tune a stored allocation, which gets scales of its own.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps for each width. (default: 128; 16 a block)")] = None,
    scope: Annotated[
        Literal["model", "block"],
        typer.Option(help="model: KL of the whole model; block: output of each block, with less memory."),
    ] = "model",
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|HUB-ID|self",
            help="Text; a,b,self: in turns. (default: that of the calibration, or else self)",
        ),
    ] = None,
    nsamples: Annotated[int | None, typer.Option(help="Windows to train on. (default: 128; 32 for self)")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window. (default: 512)")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--lr", help="Largest relative change in a step. (default: by width)")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice and order of windows.")] = 0,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Full-precision model. (default: the one it was made from)")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    json_file: JsonOption = None,
) -> None:
    """Tune the scales of widths, or of an allocation, toward the full model; interrupted, the same command goes on."""
    widths = parse_widths(bits)
    import matgptq
    from matgptq.console import refinement_table

    with progress_bars() as progress:
        results = matgptq.refine(
            checkpoint,
            widths,
            allocation=allocation,
            steps=steps,
            scope=scope,
            dataset=dataset,
            nsamples=nsamples,
            seqlen=seqlen,
            learning_rate=learning_rate,
            seed=seed,
            reference=reference,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    out_console.print(refinement_table(results))
    write_json(json_file, [result.to_dict() for result in results])
