"""The command ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matgptq.commands.options import (
    ActivationsOption,
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
    "matgptq eval out",
    "matgptq eval out --bits 3,4 --text wikitext2 --reference ./model --json table.json --plot widths.png",
    "matgptq eval out --allocation 3.25bpw",
)


def evaluate(
    checkpoint: Checkpoint,
    bits: Annotated[str | None, typer.Option(help="Widths to measure. (default: 2,3,4,6,8)")] = None,
    allocation: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Measure a width per layer, too (JSON or 'layer: bits').")
    ] = None,
    text: Annotated[
        str, typer.Option(metavar="FILE|HUB-ID|self", help="Text to measure on; self: the full model writes it.")
    ] = "self",
    windows: Annotated[int | None, typer.Option(help="How many windows. (default: all; 4 on a CPU)")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window. (default: 2048)")] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Full-precision model. (default: the one it was made from)")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Plot KL and size against bits (PNG).")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    activations: ActivationsOption = "exact",
    json_file: JsonOption = None,
) -> None:
    """Measure perplexity, KL and top-1 agreement of each width against the full-precision model."""
    widths = parse_widths(bits)
    import matgptq
    from matgptq.console import evaluation_table

    with progress_bars() as progress:
        evaluation = matgptq.evaluate(
            checkpoint,
            widths,
            allocation=allocation,
            text=text,
            windows=windows,
            seqlen=seqlen,
            reference=reference,
            device=device,
            dtype=dtype,
            activations=activations,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    out_console.print(evaluation_table(evaluation))
    write_json(json_file, [result.to_dict() for result in evaluation.results])
    if plot is not None:
        from matgptq.plotting import plot_widths

        plot_widths(evaluation.results, plot, f"{checkpoint.name}: every width of one checkpoint")
        out_console.print(f"plot saved to {plot}", highlight=False)
