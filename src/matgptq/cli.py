"""The command line: gathers the commands and reports errors."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer
from rich.markup import escape

from matgptq import __version__
from matgptq.commands import (
    bench,
    evaluate,
    export,
    generate,
    import_reference,
    info,
    publish,
    quantize,
    refine,
    search,
    serve,
    verify,
)
from matgptq.commands.options import err_console
from matgptq.errors import MatGPTQError

app = typer.Typer(
    name="matgptq",
    help="Quantize a language model once to an 8-bit parent whose most significant bits are good 2- to 7-bit models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"matgptq {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Stand before any command."""


app.command(epilog=quantize.EPILOG)(quantize.quantize)
app.command(epilog=refine.EPILOG)(refine.refine)
app.command(name="eval", epilog=evaluate.EPILOG)(evaluate.evaluate)
app.command(epilog=generate.EPILOG)(generate.generate)
app.command(epilog=serve.EPILOG)(serve.serve)
app.command(epilog=info.EPILOG)(info.info)
app.command(epilog=publish.CARD_EPILOG)(publish.card)
app.command(epilog=publish.PUSH_EPILOG)(publish.push)
app.command(epilog=bench.EPILOG)(bench.bench)
app.command(epilog=search.EPILOG)(search.search)
app.command(epilog=export.EPILOG)(export.export)
app.command(epilog=verify.EPILOG)(verify.verify)
app.command(name="import-reference", epilog=import_reference.EPILOG)(import_reference.import_reference)


def _terminate(*_: object) -> None:
    raise SystemExit(143)  # unwinds, so that a half-written checkpoint is removed


def main() -> None:
    """Entry point: errors of ours in one line, exit status 1; Ctrl-C leaves nothing half-written."""
    signal.signal(signal.SIGTERM, _terminate)
    if not err_console.is_terminal:  # where our own bars are a line each; read when tqdm is imported
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app(standalone_mode=True)
    except MatGPTQError as error:
        err_console.print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except OSError as error:  # a full disk behind standard output, say; a reader that has gone is typer's to handle
        err_console.print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
