"""The command ``info``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from matgptq.commands.options import JsonOption, examples, out_console, write_json
from matgptq.errors import ConfigurationError

EPILOG = examples("matgptq info out", "matgptq info out --json out.json", "matgptq info --kernels")


def info(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="A checkpoint written by quantize.", show_default=False)
    ] = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="Show which kernels run on this machine.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Show what a checkpoint holds (widths, sizes, recipe; reads headers only), or which kernels run here."""
    if kernels and json_file is not None:
        raise ConfigurationError("--json is for what a checkpoint holds; --kernels prints a table only")
    if kernels:
        from matgptq.console import kernel_table

        out_console.print(kernel_table())
    elif checkpoint is None:
        raise ConfigurationError("name a checkpoint, or ask for --kernels")
    else:
        _show_checkpoint(checkpoint, json_file)


def _show_checkpoint(checkpoint: Path, json_file: Path | None) -> None:
    from matgptq.checkpoints.allocation_store import stored_allocations
    from matgptq.checkpoints.checkpoint import open_checkpoint
    from matgptq.checkpoints.tensor_parallel import fitting_sizes
    from matgptq.console import allocations_table, recipe_lines, size_table
    from matgptq.errors import UnsupportedModelError

    opened = open_checkpoint(checkpoint, slices=True)
    try:
        ranks = fitting_sizes(opened.config, opened.layers)
    except UnsupportedModelError:
        ranks = None
    settings = opened.settings
    out_console.print(size_table(opened))
    sizes = sorted({layer.group_size for layer in opened.layers.values()})
    facts = {
        "model": opened.config.get("architectures", ["?"])[0],
        "made from": settings.source or "unknown",
        "layers": f"{len(opened.layers)} quantized, {opened.quantized_weights:,} weights; kept: "
        + (", ".join(settings.ignore) or "none"),
        "group sizes": ", ".join(map(str, sizes)),
        "tensor-parallel sizes": ", ".join(map(str, ranks)) if ranks else "not known for this architecture",
        "recipe": recipe_lines(settings.recipe),
        "calibration": recipe_lines(settings.calibration) or "none",
    }
    for name, fact in facts.items():
        out_console.print(f"[bold]{name}[/bold]: {escape(str(fact))}", highlight=False)
    allocations = stored_allocations(opened)
    if allocations:
        out_console.print(allocations_table(allocations, opened.allocation_identities))
    records = [
        {"bits": bits, "bits_per_weight": opened.bits_per_weight(bits), "bytes": opened.served_bytes(bits)}
        for bits in opened.widths_held
    ]
    write_json(
        json_file,
        {
            "identity": opened.identity,
            "codes_identity": opened.codes_identity,
            "quantization_config": settings.to_dict(),
            "widths": records,
            "tensor_parallel_sizes": ranks,
            "allocations": allocations,
        },
    )
