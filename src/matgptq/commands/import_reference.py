"""The command ``import_reference``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matgptq.commands.options import (
    JsonOption,
    TrustOption,
    examples,
    out_console,
    progress_bars,
    write_json,
)

EPILOG = examples(
    "matgptq import-reference ./packed-model -o out",
    "matgptq import-reference ./save_dir/Llama-3.1-8B -o out --model meta-llama/Llama-3.1-8B",
)


def import_reference(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Packed model, or a folder of data.pt folders.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="Checkpoint directory to create.")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Full-precision model; data.pt folders need it.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Default width of the checkpoint. (default: the one in DIR)")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Refuse scales that must be rounded to be stored.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that stands at OUT.")] = False,
    trust_remote_code: TrustOption = False,
    json_file: JsonOption = None,
) -> None:
    """Turn a checkpoint of the published reference implementation into one of ours, or say why it cannot be."""
    import matgptq
    from matgptq.checkpoints.checkpoint import open_checkpoint
    from matgptq.console import size_table

    with progress_bars() as progress:
        report = matgptq.import_reference(
            directory,
            out,
            model=model,
            bits=bits,
            exact=exact,
            force=force,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    out_console.print(size_table(open_checkpoint(out)))
    out_console.print(f"{len(report.layers)} layers imported; saved to {out}", markup=False, highlight=False)
    write_json(json_file, report.to_dict())
