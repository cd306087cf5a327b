"""The command ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matgptq.commands.options import JsonOption, examples, out_console, progress_bars, write_json

EPILOG = examples("matgptq verify out", "matgptq verify out-w4 --against out")


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint, a slice or another export.")],
    against: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="The checkpoint that an export was made from: compare it with its slice."),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Check every tensor of a checkpoint or an export against its checksum; or compare an export with its slice.

    The exit status is 1 if anything is damaged or not equal.
    """
    with progress_bars() as progress:
        if against is None:
            from matgptq.checkpoints.integrity import check_integrity
            from matgptq.console import integrity_table

            integrity = check_integrity(directory, progress=progress)
            table, record, passed = integrity_table(integrity), integrity.to_dict(), integrity.passed
        else:
            from matgptq.console import verification_table
            from matgptq.exports.verification import verify as compare

            verification = compare(directory, against, progress=progress)
            table, record, passed = verification_table(verification), verification.to_dict(), verification.passed
    out_console.print(table)
    write_json(json_file, record)
    if not passed:
        raise typer.Exit(1)
