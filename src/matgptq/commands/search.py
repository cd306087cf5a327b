"""The command ``search``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from matgptq.commands.options import (
    PLOT_CHECK,
    Checkpoint,
    DeviceOption,
    JsonOption,
    TrustOption,
    WandbOption,
    examples,
    out_console,
    parse_widths,
    progress_bars,
    write_json,
)
from matgptq.errors import ConfigurationError

EPILOG = examples(
    "matgptq search out --target-bits 3.25",
    "matgptq search out --target-size 150MB --save phone --dataset c4",
    "matgptq search out --sweep 2.25:6:0.25 --plot pareto.png",
    "matgptq eval out --allocation 3.25bpw",
)


def search(
    checkpoint: Checkpoint,
    target_bits: Annotated[str | None, typer.Option(help="Budget in bits per weight, scales included.")] = None,
    target_size: Annotated[
        str | None, typer.Option(help="Budget for the whole model as served: 150MB, 0.5GiB, or bytes.")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="FIRST:LAST:STEP", help="Many budgets in bits per weight.")
    ] = None,
    widths: Annotated[str, typer.Option(help="Widths that a layer may have.")] = "2,3,4,5,6,7,8",
    fuse: Annotated[
        Literal["serving", "none"], typer.Option(help="serving: one width for layers that serving engines fuse.")
    ] = "serving",
    fitness: Annotated[Literal["kl", "ppl"], typer.Option(help="kl to the full model, or ppl without it.")] = "kl",
    method: Annotated[
        Literal["sensitivity", "evolution"], typer.Option(help="evolution: the published one, for comparison.")
    ] = "sensitivity",
    dataset: Annotated[
        str,
        typer.Option(
            metavar="FILE|HUB-ID|self", help="Text to search on; self: the full model writes it; a,b,self: in turns."
        ),
    ] = "self",
    tokens: Annotated[int, typer.Option(help="Size of that text; half as much is held out in addition.")] = 16384,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window. (default: 512)")] = None,
    generations: Annotated[
        int | None, typer.Option(help="Most generations of refinement. (default: by method)")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the text and the refinement.")] = 0,
    save: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the allocation. (default: by budget, like 3.25bpw)")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted search.")] = False,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Full-precision model. (default: the one it was made from)")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plot loss against size, and the widths (PNG).", callback=PLOT_CHECK),
    ] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16; auto is bfloat16 on a CPU that multiplies it.")
    ] = "auto",
    wandb: WandbOption = None,
    trust_remote_code: TrustOption = False,
    json_file: JsonOption = None,
) -> None:
    """Find the width of every layer that loses least within a budget, and save it with the checkpoint."""
    if sum(target is not None for target in (target_bits, target_size, sweep)) != 1:
        raise ConfigurationError("give one of --target-bits, --target-size and --sweep")
    chosen = parse_widths(widths, "--widths") or ()
    import matgptq
    from matgptq.console import search_table
    from matgptq.width_search.budget import parse_sweep

    with progress_bars() as progress:
        result = matgptq.search(
            checkpoint,
            parse_sweep(sweep) if sweep is not None else target_bits,
            target_size=target_size,
            widths=chosen,
            fuse=fuse,
            fitness=fitness,
            method=method,
            dataset=dataset,
            tokens=tokens,
            seqlen=seqlen,
            generations=generations,
            seed=seed,
            save=save,
            resume=resume,
            reference=reference,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            wandb_project=wandb,
            progress=progress,
        )
    out_console.print(search_table(result))
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in result.seconds.items())
    out_console.print(f"{result.tokens_scored:,} tokens scored; time: {seconds}", markup=False, highlight=False)
    tune = f"matgptq refine {checkpoint} --allocation {result.found[0].name} tunes its scales"
    out_console.print(f"saved in {checkpoint / 'allocations'}; {tune}", markup=False, highlight=False)
    write_json(json_file, result.to_dict())
    if plot is not None:
        from matgptq.plotting import plot_search

        plot_search(result, plot, f"{checkpoint.name}: a width for every layer")
        out_console.print(f"plot saved to {plot}", markup=False, highlight=False)
