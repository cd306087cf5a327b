"""The command ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matgptq.commands.options import (
    Checkpoint,
    JsonOption,
    examples,
    out_console,
    progress_bars,
    write_json,
)

EPILOG = examples(
    "matgptq export out --bits 4 --format compressed-tensors -o out-w4",
    "matgptq export out --bits 4 --format gguf -o out-gguf",
    "matgptq export out --allocation small --format matgptq-slice -o out-mixed",
)


def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Directory to create.")],
    format: Annotated[str, typer.Option(help="compressed-tensors, gptq, gguf, matgptq-slice or dense.")],
    bits: Annotated[int | None, typer.Option(help="Width, 2 to 8.")] = None,
    allocation: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="A width per layer: stored with the checkpoint, or a file.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of dense weights. (auto: the model's own; float32: exact)")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an export that stands at DIR.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Write one width of a checkpoint in the format of another engine, exactly."""
    import matgptq
    from matgptq.publishing.figures import megabytes

    with progress_bars() as progress:
        report = matgptq.export(
            checkpoint,
            out,
            format=format,
            bits=bits,
            allocation=allocation,
            dtype=dtype,
            force=force,
            progress=progress,
        )
    out_console.print(f"{format}, {megabytes(report.bytes)}; saved to {out}", markup=False, highlight=False)
    out_console.print(f"check it: matgptq verify {out} --against {checkpoint}", markup=False, highlight=False)
    write_json(json_file, report.to_dict())
