"""The command ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from matgptq.commands.options import (
    PLOT_CHECK,
    ActivationsOption,
    Checkpoint,
    DeviceOption,
    DtypeOption,
    HeadBitsOption,
    JsonOption,
    TrustOption,
    err_console,
    examples,
    out_console,
    parse_widths,
    progress_bars,
    write_json,
)
from matgptq.errors import AllocationError, CheckpointError, ConfigurationError

if TYPE_CHECKING:
    from matgptq.checkpoints.evaluation_results import Evaluation, TaskEvaluation

EPILOG = examples(
    "matgptq eval out",
    "matgptq eval out --bits 3,4 --text wikitext2 --reference ./model --json table.json --plot widths.png",
    "matgptq eval out --bits 3,4 --text wikitext2 --protocol gptq",
    "matgptq eval out --bits 3,4,8 --tasks arc_easy,hellaswag --limit 200 --reference ./model",
    "matgptq eval out --allocation 3.25bpw",
)
_TEXT, _TASKS = "Perplexity on a text", "Tasks of lm-evaluation-harness"


def evaluate(
    checkpoint: Checkpoint,
    bits: Annotated[str | None, typer.Option(help="Widths to measure. (default: 2,3,4,6,8)")] = None,
    allocation: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Measure a width per layer, too (JSON or 'layer: bits').")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Full-precision model. (default: the one it was made from; for tasks: none)",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|HUB-ID|self",
            help="Text to measure on; self: the full model writes it. (default: self)",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    windows: Annotated[
        str | None,
        typer.Option(metavar="N|all", help="How many windows. (default: all; 4 on a CPU)", rich_help_panel=_TEXT),
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens per window. (default: 2048)", rich_help_panel=_TEXT)
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens from one window to the next, if they overlap. (default: no overlap)", rich_help_panel=_TEXT
        ),
    ] = None,
    protocol: Annotated[
        Literal["bos", "plain", "gptq"] | None,
        typer.Option(
            help="bos: each window starts with BOS if a prompt does; plain: no special tokens; gptq: as in the GPTQ "
            "papers (docs/evaluation.md). (default: bos)",
            rich_help_panel=_TEXT,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Plot KL and size against bits (PNG).", rich_help_panel=_TEXT, callback=PLOT_CHECK
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Measure these tasks, groups or * patterns, comma-separated, and not a text.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Worked examples per question. (default: the task's)", rich_help_panel=_TASKS)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Questions of each task. (default: all)", rich_help_panel=_TASKS)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences at a time. (default: 8)", rich_help_panel=_TASKS)
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Directory with tasks of your own (YAML).", rich_help_panel=_TASKS),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustOption = False,
    activations: ActivationsOption = "exact",
    head_bits: HeadBitsOption = None,
    no_record: Annotated[
        bool, typer.Option("--no-record", help="Do not keep the results in OUT/evaluation.json, for its card.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Measure each width against the full-precision model: perplexity, KL and top-1 agreement on a text, or tasks."""
    on_text = {"text": text, "windows": windows, "seqlen": seqlen, "stride": stride, "protocol": protocol, "plot": plot}
    on_tasks = {
        "num-fewshot": num_fewshot, "limit": limit, "batch-size": batch_size, "include-path": include_path,
    }  # fmt: skip
    foreign = on_tasks if tasks is None else on_text
    for name in (name for name, value in foreign.items() if value is not None):
        other = "a text: add --tasks" if tasks is None else "tasks: measure the text without --tasks"
        raise ConfigurationError(f"--{name} means nothing to {other}")
    common: dict[str, Any] = {
        "allocation": allocation,
        "reference": reference,
        "device": device,
        "dtype": dtype,
        "activations": activations,
        "head_bits": head_bits,
        "trust_remote_code": trust_remote_code,
    }
    widths = parse_widths(bits)
    if tasks is not None:
        names = [name for name in (part.strip() for part in tasks.split(",")) if name]
        given = {"num_fewshot": num_fewshot, "limit": limit, "include_path": include_path, **common}
        if batch_size is not None:
            given["batch_size"] = batch_size
        _evaluate_tasks(checkpoint, names, widths, given, no_record, json_file)
        return
    count = _parse_windows(windows)
    import matgptq
    from matgptq.console import evaluation_table

    with progress_bars() as progress:
        evaluation = matgptq.evaluate(
            checkpoint,
            widths,
            text="self" if text is None else text,
            windows=count,
            seqlen=seqlen,
            stride=stride,
            protocol=protocol or "bos",
            progress=progress,
            **common,
        )
    out_console.print(evaluation_table(evaluation))
    _keep(checkpoint, evaluation, no_record)
    write_json(json_file, [result.to_dict() for result in evaluation.results])
    if plot is not None:
        from matgptq.plotting import plot_widths

        plot_widths(evaluation.results, plot, f"{checkpoint.name}: every width of one checkpoint")
        out_console.print(f"plot saved to {plot}", markup=False, highlight=False)


def _evaluate_tasks(
    checkpoint: Path,
    names: list[str],
    widths: tuple[int, ...] | None,
    options: dict[str, Any],
    no_record: bool,
    json_file: Path | None,
) -> None:
    import matgptq
    from matgptq.console import task_table

    with progress_bars(live=False) as progress:  # the harness draws bars itself
        evaluation = matgptq.evaluate_tasks(checkpoint, names, widths, progress=progress, **options)
    out_console.print(task_table(evaluation))
    _keep(checkpoint, evaluation, no_record)
    write_json(json_file, evaluation.to_dict())


def _keep(checkpoint: Path, evaluation: Evaluation | TaskEvaluation, no_record: bool) -> None:
    from matgptq.checkpoints.checkpoint import open_checkpoint
    from matgptq.checkpoints.evaluation_record import record_evaluation

    if no_record:
        return
    try:
        record_evaluation(open_checkpoint(checkpoint, slices=True), evaluation)
    except (CheckpointError, AllocationError) as error:
        # The figures are on the screen; a directory may well be read-only
        err_console.print(f"[yellow]note:[/yellow] the results are not recorded: {escape(str(error))}", highlight=False)


def _parse_windows(text: str | None) -> int | Literal["all"] | None:
    if text is None:
        return None
    if text == "all":
        return "all"
    if not text.isdecimal():
        raise ConfigurationError(f"--windows must be a number, or all; not {text!r}")
    return int(text)
