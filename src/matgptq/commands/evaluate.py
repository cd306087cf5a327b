"""The command ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from matgptq.commands.options import (
    ActivationsOption,
    Checkpoint,
    DeviceOption,
    DtypeOption,
    HeadBitsOption,
    JsonOption,
    TrustOption,
    examples,
    out_console,
    parse_widths,
    progress_bars,
    write_json,
)
from matgptq.errors import ConfigurationError

EPILOG = examples(
    "matgptq eval out",
    "matgptq eval out --bits 3,4 --text wikitext2 --reference ./model --json table.json --plot widths.png",
    "matgptq eval out --bits 3,4 --text wikitext2 --protocol gptq",
    "matgptq eval out --allocation mixed.json",
)


def evaluate(
    checkpoint: Checkpoint,
    bits: Annotated[str | None, typer.Option(help="Widths to measure. (default: 2,3,4,6,8)")] = None,
    allocation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measure a width per layer, too (JSON or 'layer: bits').")
    ] = None,
    text: Annotated[
        str, typer.Option(metavar="FILE|HUB-ID|self", help="Text to measure on; self: the full model writes it.")
    ] = "self",
    windows: Annotated[
        str | None, typer.Option(metavar="N|all", help="How many windows. (default: all; 4 on a CPU)")
    ] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window. (default: 2048)")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next, if they overlap. (default: no overlap)")
    ] = None,
    protocol: Annotated[
        Literal["plain", "gptq"],
        typer.Option(help="plain: no special tokens; gptq: as in the GPTQ papers' tables (docs/evaluation.md)."),
    ] = "plain",
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Full-precision model. (default: the one it was made from)")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Plot KL and size against bits (PNG).")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    activations: ActivationsOption = "exact",
    head_bits: HeadBitsOption = None,
    json_file: JsonOption = None,
) -> None:
    """Measure perplexity, KL and top-1 agreement of each width against the full-precision model."""
    widths, count = parse_widths(bits), _parse_windows(windows)
    import matgptq
    from matgptq.console import evaluation_table

    with progress_bars() as progress:
        evaluation = matgptq.evaluate(
            checkpoint,
            widths,
            allocation=allocation,
            text=text,
            windows=count,
            seqlen=seqlen,
            stride=stride,
            protocol=protocol,
            reference=reference,
            device=device,
            dtype=dtype,
            activations=activations,
            head_bits=head_bits,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    out_console.print(evaluation_table(evaluation))
    write_json(json_file, [result.to_dict() for result in evaluation.results])
    if plot is not None:
        from matgptq.plotting import plot_widths

        plot_widths(evaluation.results, plot, f"{checkpoint.name}: every width of one checkpoint")
        out_console.print(f"plot saved to {plot}", highlight=False)


def _parse_windows(text: str | None) -> int | Literal["all"] | None:
    if text is None:
        return None
    if text == "all":
        return "all"
    if not text.isdecimal():
        raise ConfigurationError(f"--windows must be a number, or all; not {text!r}")
    return int(text)
