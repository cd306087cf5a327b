"""The command line."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from matgptq.errors import ConfigurationError, MatGPTQError

if TYPE_CHECKING:
    from matgptq.console import ProgressBars
    from matgptq.recipe import Recipe

# Everything heavy is imported inside the commands, so that --help and a typing error answer at once.

app = typer.Typer(
    name="matgptq",
    help="Quantize a language model once to an 8-bit parent whose most significant bits are good 2- to 7-bit models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Into a file or a pipe, tables come as wide as they are instead of cut to a terminal's 80 columns.
_out = Console(width=None if sys.stdout.isatty() else 160)
_err = Console(stderr=True)

JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the table as JSON.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.")]
ActivationsOption = Annotated[
    Literal["exact", "int8"], typer.Option(help="int8: rounded inside the products; faster on a CPU, less exact.")
]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Allow code that comes with the model to run.")]
Checkpoint = Annotated[Path, typer.Argument(metavar="OUT", help="A checkpoint written by quantize.")]


def _examples(*lines: str) -> str:
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"  [cyan]{line}[/cyan]" for line in lines)


def _parse_widths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigurationError(f"--bits must be widths separated by commas, like 2,3,4,8; not {text!r}") from None


def _parse_bit_weights(text: str | None) -> dict[int, float] | tuple[float, ...] | None:
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


def _progress() -> ProgressBars:
    from transformers.utils import logging

    from matgptq.console import ProgressBars

    # Our bars take the place of transformers' own, which would write over them.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return ProgressBars(_err)


def _write_json(file: Path | None, value: Any) -> None:
    if file is None:
        return
    try:
        file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--json {file}: cannot be written: {error}") from error


@app.command(
    epilog=_examples(
        "matgptq quantize HuggingFaceTB/SmolLM2-135M-Instruct -o smollm2",
        "matgptq quantize ./model -o out --bits 2,3,4,8 --group-size 64 --dataset c4 --nsamples 128",
        "matgptq quantize ./model -o out4 --method gptq --bits 4",
    )
)
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face directory, .gguf file or hub id.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="Checkpoint directory to create.")],
    bits: Annotated[str | None, typer.Option(help="Target widths. (default: 2,3,4,8)")] = None,
    bit_weights: Annotated[
        str | None, typer.Option(help="Importance of each width: 4,8,16,256 or 2=4,8=256. (default: 2^width)")
    ] = None,
    group_size: Annotated[int, typer.Option(help="Input columns per scale; -1 for a whole row.")] = 128,
    method: Annotated[str, typer.Option(help="matgptq, paper, gptq (one width) or rtn.")] = "matgptq",
    dataset: Annotated[
        str, typer.Option(metavar="FILE|HUB-ID|self", help="Calibration text; self: the model writes its own.")
    ] = "self",
    nsamples: Annotated[int | None, typer.Option(help="Calibration windows. (default: 128; 16 on a CPU)")] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens per window. (default: 2048; 512 for self on a CPU)")
    ] = None,
    ignore: Annotated[
        str, typer.Option(help="Layers to keep at full precision: names or * patterns, comma-separated.")
    ] = "lm_head",
    damp: Annotated[float, typer.Option(help="Damping, as a fraction of the mean Hessian diagonal.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of the choice of calibration windows.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that stands at OUT.")] = False,
    every_layer: Annotated[bool, typer.Option("--layers", help="One table row per layer, not per kind.")] = False,
    trust_remote_code: TrustOption = False,
    json_file: JsonOption = None,
) -> None:
    """Quantize MODEL once for all widths and write the checkpoint OUT."""
    widths, weights = _parse_widths(bits), _parse_bit_weights(bit_weights)
    ignored = tuple(filter(None, (part.strip() for part in ignore.split(","))))
    if dry_run:
        from matgptq.recipe import make_recipe

        recipe = make_recipe(method, widths, weights, group_size=group_size, damping=damp, seed=seed)
        _dry_run(
            model, out, recipe, dataset, nsamples, seqlen, ignored, device, dtype, force, trust_remote_code
        )  # fmt: skip
        return
    import matgptq
    from matgptq.checkpoint import open_checkpoint
    from matgptq.console import error_table, report_summary, size_table

    with _progress() as progress:
        report = matgptq.quantize(
            model,
            out,
            method=method,
            bits=widths,
            bit_weights=weights,
            group_size=group_size,
            dataset=dataset,
            nsamples=nsamples,
            seqlen=seqlen,
            ignore=ignored,
            damping=damp,
            seed=seed,
            device=device,
            dtype=dtype,
            force=force,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    _out.print(error_table(report.layers, every_layer=every_layer))
    _out.print(size_table(open_checkpoint(out)))
    _out.print(report_summary(report), highlight=False)
    _out.print(f"saved to {out}", highlight=False)
    _write_json(json_file, report.to_dict())


def _dry_run(
    model: str, out: Path, recipe: Recipe, dataset: str, nsamples: int | None, seqlen: int | None,
    ignored: tuple[str, ...], device: str, dtype: str, force: bool, trust_remote_code: bool,
) -> None:  # fmt: skip
    from matgptq.checkpoint import check_destination
    from matgptq.console import plan_table
    from matgptq.devices import resolve_device
    from matgptq.plan import CalibrationRequest
    from matgptq.quantization import prepare

    check_destination(out, force=force)
    with _progress() as progress:
        progress.start("load the model", 1)
        _, _, plan = prepare(
            model,
            recipe,
            CalibrationRequest(dataset, nsamples, seqlen),
            ignore=ignored,
            device=resolve_device(device),
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        for note in plan.notes:
            progress.note(note)
    _out.print(plan_table(plan, plan.stored_bytes(recipe)))


@app.command(
    name="eval",
    epilog=_examples(
        "matgptq eval out",
        "matgptq eval out --bits 3,4 --text wikitext2 --reference ./model --json table.json --plot widths.png",
        "matgptq eval out --allocation mixed.json",
    ),
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
    widths = _parse_widths(bits)
    import matgptq
    from matgptq.console import evaluation_table

    with _progress() as progress:
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
    _out.print(evaluation_table(evaluation))
    _write_json(json_file, [result.to_dict() for result in evaluation.results])
    if plot is not None:
        from matgptq.plotting import plot_widths

        plot_widths(evaluation.results, plot, f"{checkpoint.name}: every width of one checkpoint")
        _out.print(f"plot saved to {plot}", highlight=False)


@app.command(
    epilog=_examples(
        'matgptq generate out --bits 4 --prompt "The capital of France is"',
        'matgptq generate out --bits 3 --chat --prompt "Name three rivers." --max-new-tokens 100',
    )
)
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    bits: Annotated[int | None, typer.Option(help="Width, 2 to 8. (default: the checkpoint's)")] = None,
    allocation: Annotated[Path | None, typer.Option(metavar="FILE", help="A width per layer.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    activations: ActivationsOption = "exact",
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the chat template.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
) -> None:
    """Continue a prompt with one width of a checkpoint."""
    import matgptq
    from matgptq.generation import generate_text
    from matgptq.source import load_tokenizer

    with _progress() as progress:
        progress.start("load the model", 1)
        model = matgptq.load(
            checkpoint,
            bits,
            allocation,
            device=device,
            dtype=dtype,
            activations=activations,
            trust_remote_code=trust_remote_code,
        )
        tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    if chat:
        if not tokenizer.chat_template:
            raise ConfigurationError(f"{checkpoint}: has no chat template; leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        _out.print(prompt, end="", markup=False, highlight=False, soft_wrap=True)
    for piece in generate_text(
        model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    ):
        _out.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    _out.print()


@app.command(epilog=_examples("matgptq info out", "matgptq info out --json out.json", "matgptq info --kernels"))
def info(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="A checkpoint written by quantize.", show_default=False)
    ] = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="Show which kernels run on this machine.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Show what a checkpoint holds (widths, sizes, recipe; reads headers only), or which kernels run here."""
    if kernels:
        from matgptq.console import kernel_table

        _out.print(kernel_table())
    elif checkpoint is None:
        raise ConfigurationError("name a checkpoint, or ask for --kernels")
    else:
        _show_checkpoint(checkpoint, json_file)


def _show_checkpoint(checkpoint: Path, json_file: Path | None) -> None:
    from matgptq.checkpoint import open_checkpoint
    from matgptq.console import recipe_lines, size_table
    from matgptq.slicing import WIDTHS

    opened = open_checkpoint(checkpoint)
    settings = opened.settings
    _out.print(size_table(opened))
    sizes = sorted({layer.group_size for layer in opened.layers.values()})
    facts = {
        "model": opened.config.get("architectures", ["?"])[0],
        "made from": settings.source or "unknown",
        "layers": f"{len(opened.layers)} quantized, {opened.quantized_weights:,} weights; kept: "
        + (", ".join(settings.ignore) or "none"),
        "group sizes": ", ".join(map(str, sizes)),
        "recipe": recipe_lines(settings.recipe),
        "calibration": recipe_lines(settings.calibration) or "none",
    }
    for name, fact in facts.items():
        _out.print(f"[bold]{name}[/bold]: {fact}", highlight=False)
    records = [
        {"bits": bits, "bits_per_weight": opened.bits_per_weight(bits), "bytes": opened.served_bytes(bits)}
        for bits in WIDTHS
    ]
    _write_json(json_file, {"quantization_config": settings.to_dict(), "widths": records})


@app.command(
    epilog=_examples(
        "matgptq bench out",
        "matgptq bench out --bits 2,4,8 --batch 1,8 --prompt 512 --activations int8 --json speed.json",
    )
)
def bench(
    checkpoint: Checkpoint,
    bits: Annotated[str, typer.Option(help="Widths to time.")] = "2,3,4,8",
    batch: Annotated[str, typer.Option(help="Numbers of sequences decoded together.")] = "1",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt that is timed.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Decoding steps per round.")] = 24,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Full model to time beside. (default: the one it was made from)")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. (default: PyTorch's choice)")] = None,
    activations: ActivationsOption = "exact",
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Time decoding and prompt reading of each width beside the bfloat16 model (bits 16)."""
    widths = _parse_widths(bits) or ()
    try:
        batches = tuple(int(part) for part in batch.split(","))
    except ValueError:
        raise ConfigurationError(f"--batch must be numbers separated by commas, not {batch!r}") from None
    import torch

    from matgptq.console import speed_table
    from matgptq.speed import measure_speed

    if threads is not None:
        torch.set_num_threads(threads)
    with _progress() as progress:
        results = measure_speed(
            checkpoint,
            widths,
            batches=batches,
            prompt=prompt,
            new_tokens=new_tokens,
            reference=reference,
            activations=activations,
            device=device,
            progress=progress,
        )
    _out.print(speed_table(results))
    _write_json(json_file, [result.to_dict() for result in results])


@app.command(
    name="import-reference",
    epilog=_examples(
        "matgptq import-reference ./packed-model -o out",
        "matgptq import-reference ./save_dir/Llama-3.1-8B -o out --model meta-llama/Llama-3.1-8B",
    ),
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
    from matgptq.checkpoint import open_checkpoint
    from matgptq.console import size_table

    with _progress() as progress:
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
    _out.print(size_table(open_checkpoint(out)))
    _out.print(f"{len(report.layers)} layers imported; saved to {out}", highlight=False)
    _write_json(json_file, report.to_dict())


def _terminate(*_: object) -> None:
    raise SystemExit(143)  # unwinds, so that a half-written checkpoint is removed


def main() -> None:
    """Entry point: errors of ours in one line, exit status 1; Ctrl-C leaves nothing half-written."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app(standalone_mode=True)
    except MatGPTQError as error:
        _err.print(f"[bold red]error:[/bold red] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
