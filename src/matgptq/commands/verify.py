"""The command ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matgptq.commands.options import JsonOption, examples, out_console, progress_bars, write_json

EPILOG = examples("matgptq verify out-w4 --against out")


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An export.")],
    against: Annotated[Path, typer.Option(metavar="OUT", help="The checkpoint that it was made from.")],
    json_file: JsonOption = None,
) -> None:
    """Load an export and compare its weights and logits with the slice; the exit status is 1 if they are not equal."""
    from matgptq.console import verification_table
    from matgptq.verification import verify as compare

    with progress_bars() as progress:
        verification = compare(directory, against, progress=progress)
    out_console.print(verification_table(verification))
    write_json(json_file, verification.to_dict())
    if not verification.passed:
        raise typer.Exit(1)
