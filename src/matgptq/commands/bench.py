"""The command ``bench``."""

from __future__ import annotations

from typing import Annotated

import typer

from matgptq.commands.options import (
    ActivationsOption,
    Checkpoint,
    DeviceOption,
    HeadBitsOption,
    JsonOption,
    examples,
    out_console,
    parse_widths,
    progress_bars,
    write_json,
)
from matgptq.errors import ConfigurationError

EPILOG = examples(
    "matgptq bench out",
    "matgptq bench out --bits 2,4,8 --batch 1,8 --prompt 512 --activations int8 --json speed.json",
)


def bench(
    checkpoint: Checkpoint,
    bits: Annotated[str | None, typer.Option(help="Widths to time. (default: 2,3,4,8; of a slice its own)")] = None,
    batch: Annotated[str, typer.Option(help="Numbers of sequences decoded together.")] = "1",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt that is timed.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Decoding steps per round.")] = 24,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Full model to time beside. (default: the one it was made from)")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. (default: PyTorch's choice)")] = None,
    activations: ActivationsOption = "exact",
    head_bits: HeadBitsOption = None,
    packed: Annotated[bool, typer.Option("--packed", help="Keep only the slice of each width in memory.")] = False,
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Time decoding and prompt reading of each width beside the bfloat16 model (bits 16)."""
    widths = parse_widths(bits)
    try:
        batches = tuple(int(part) for part in batch.split(","))
    except ValueError:
        raise ConfigurationError(f"--batch must be numbers separated by commas, not {batch!r}") from None
    import torch

    from matgptq.console import speed_table
    from matgptq.evaluation.speed import measure_speed

    if threads is not None:
        if threads < 1:
            raise ConfigurationError(f"--threads must be at least 1, not {threads}")
        torch.set_num_threads(threads)
    with progress_bars() as progress:
        results = measure_speed(
            checkpoint,
            widths,
            batches=batches,
            prompt=prompt,
            new_tokens=new_tokens,
            reference=reference,
            activations=activations,
            head_bits=head_bits,
            resident=not packed,
            device=device,
            progress=progress,
        )
    out_console.print(speed_table(results))
    write_json(json_file, [result.to_dict() for result in results])
