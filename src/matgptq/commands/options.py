"""What the commands share: options, their parsing, the two consoles, progress bars, JSON files."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from matgptq.errors import ConfigurationError

if TYPE_CHECKING:
    from matgptq.console import ProgressBars

# Into a file or a pipe, tables come as wide as they are instead of cut to a terminal's 80 columns.
out_console = Console(width=None if sys.stdout is not None and sys.stdout.isatty() else 160)
err_console = Console(stderr=True)


def _check_place(option: str) -> Callable[[Path | None], Path | None]:
    """A callback that refuses a file that cannot be written, before the work whose result it is for."""

    def check(file: Path | None) -> Path | None:
        if file is None:
            return file
        if file.is_dir():
            raise ConfigurationError(f"{option} {file}: is a directory")
        if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
            raise ConfigurationError(f"{option} {file}: there is no directory {file.parent} that can be written to")
        return file

    return check


_check_json = _check_place("--json")


def _choose_json(file: Path | None) -> Path | None:
    """With JSON on standard output, tables go to standard error, so that what follows in a pipe can read it."""
    out_console.stderr = str(file) == "-"
    return file if out_console.stderr else _check_json(file)


JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Also write the table as JSON; - is standard output.",
        callback=_choose_json,
    ),
]  # fmt: skip
PLOT_CHECK = _check_place("--plot")
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.")]
ActivationsOption = Annotated[
    Literal["exact", "int8"], typer.Option(help="int8: rounded inside the products; faster on a CPU, less exact.")
]
HeadBitsOption = Annotated[
    int | None, typer.Option(help="Serve the output head at so many bits (CPU). (default: full precision)")
]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Allow code that comes with the model to run.")]
WandbOption = Annotated[
    str | None, typer.Option(metavar="PROJECT", help="Log to Weights & Biases, too, not only to log.jsonl in OUT.")
]
Checkpoint = Annotated[Path, typer.Argument(metavar="OUT", help="A checkpoint written by quantize.")]


def examples(*lines: str) -> str:
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"  [cyan]{line}[/cyan]" for line in lines)


def parse_widths(text: str | None, option: str = "--bits") -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigurationError(f"{option} must be widths separated by commas, like 2,3,4,8; not {text!r}") from None


def parse_bit_weights(text: str | None) -> dict[int, float] | tuple[float, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    try:
        if all("=" in part for part in parts):
            return {int(bits): float(weight) for bits, weight in (part.split("=", 1) for part in parts)}
        return tuple(float(part) for part in parts)
    except ValueError:
        raise ConfigurationError(
            f"--bit-weights must be numbers in the order of --bits (4,8,16,256) or pairs (2=4,8=256); not {text!r}"
        ) from None


def progress_bars(*, live: bool = True) -> ProgressBars:
    from transformers.utils import logging

    from matgptq.console import ProgressBars

    # Our bars take the place of transformers' own, which would write over them.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return ProgressBars(err_console, live=live)


def write_json(file: Path | None, value: Any) -> None:
    """Write a result; figures that are not finite become null, which JSON has no numbers for."""
    if file is None:
        return
    text = json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"
    try:
        if str(file) == "-":
            sys.stdout.write(text)
        else:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--json {file}: cannot be written: {error}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
