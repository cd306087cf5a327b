"""What the command line draws: progress bars with time left, and tables a person can read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from matgptq import native
from matgptq.checkpoints.allocation_scales import SCALES
from matgptq.checkpoints.checkpoint import Checkpoint
from matgptq.checkpoints.evaluation_results import Evaluation, TaskEvaluation
from matgptq.checkpoints.integrity import Integrity
from matgptq.errors import ConfigurationError
from matgptq.evaluation.speed import Speed
from matgptq.exports.verification import Verification
from matgptq.kernels.kernel_choice import Product, choose
from matgptq.kernels.packed_weight import Form, obstacle
from matgptq.nested_weight import scale_source
from matgptq.publishing import figures
from matgptq.publishing.figures import megabytes
from matgptq.quantization.forecast import Forecast
from matgptq.report import LayerReport, Refinement, Report
from matgptq.slicing import WIDTHS
from matgptq.width_search.allocation_search import Search


class ProgressBars:
    """Draws stages on standard error; on anything but a terminal each stage is one line.

    Args:
        console: to draw on.
        live: draw bars if it is a terminal. Off while something else draws bars of its own.
    """

    def __init__(self, console: Console, *, live: bool = True) -> None:
        self._console = console
        self._live = live and console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
        self._bars.stop()

    def start(self, stage: str, total: int) -> None:
        """Begin a stage."""
        self._finish()
        if not self._live:
            self._console.print(f"{stage} ...")
        self._task = self._bars.add_task(stage, total=total)

    def advance(self, steps: int = 1) -> None:
        """Move the present stage on."""
        if self._task is not None:
            self._bars.advance(self._task, steps)

    def note(self, message: str) -> None:
        """Print a line above the bars."""
        self._console.print(f"[yellow]note:[/yellow] {escape(message)}", highlight=False)

    def _finish(self) -> None:
        if self._task is not None:
            task = self._bars.tasks[self._task]
            self._bars.update(self._task, completed=task.total)
            self._task = None


def plan_table(forecast: Forecast) -> Table:
    """What a run would do, what it would need, and how long it would take if that is known."""
    plan, needs, seconds = forecast.plan, forecast.needs, forecast.seconds
    table = Table(title="plan", show_header=False)
    sizes = sorted({layer.group_size for layer in plan.layers.values()})
    rows = {
        "blocks": len(plan.blocks),
        "layers to quantize": len(plan.layers),
        "layers kept": ", ".join(plan.kept) or "none",
        "weights to quantize": f"{sum(p.out_features * p.in_features for p in plan.layers.values()):,}",
        "group sizes": ", ".join(map(str, sizes)),
        "calibration": f"{plan.nsamples} windows of {plan.seqlen} tokens" if plan.nsamples else "none",
        "codes and scales on disk": megabytes(forecast.stored_bytes),
        "memory, about": _parts(needs.memory, f" while {needs.fullest}"),
        **({"GPU memory, about": _parts(needs.gpu_memory, f" while {needs.gpu_fullest}")} if needs.gpu_fullest else {}),
        "disk while it runs, about": _parts(needs.disk),
        "activations": f"in {'GPU memory' if needs.gpu_stages else 'memory'}"
        if needs.activations == "memory"
        else "on disk",
        "weights": "read one block at a time" if needs.streamed else "in memory as a whole",
    }
    if seconds is not None:
        time = "under a minute" if seconds < 60 else f"{seconds / 60:.0f} min"
        rows["time, roughly"] = time + (", and what it takes the model to write its text" if needs.writes_text else "")
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _parts(parts: Mapping[str, int], when: str = "") -> str:
    """A sum with its parts, the largest first."""
    largest = sorted(parts.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{name} {megabytes(count)}" for name, count in largest)
    return f"{megabytes(sum(parts.values()))}{when}: {listed}"


def error_table(layers: Sequence[LayerReport], *, every_layer: bool = False) -> Table:
    """Relative output errors: one row per kind of layer (geometric mean over the blocks), or one per layer."""
    title = "relative output error by bits" + ("" if every_layer else ", mean over the blocks")
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fits a terminal of 80 columns
    table.add_column("layer", overflow="fold", min_width=9)
    for column in ("group", *map(str, WIDTHS), "sec"):
        table.add_column(column, justify="right", no_wrap=True)
    fallen_back = any(_fallbacks([layer]) for layer in layers)
    if fallen_back:
        table.add_column("fallbacks", overflow="fold")
    kinds: dict[str, list[LayerReport]] = {}
    for layer in layers:
        kinds.setdefault(layer.name if every_layer else layer.name.rpartition(".")[2], []).append(layer)
    for kind, members in kinds.items():
        errors = [_geometric_mean([layer.errors[bits] for layer in members if layer.errors]) for bits in WIDTHS]
        cells = [
            kind,
            "/".join(map(str, sorted({layer.group_size for layer in members}))),
            *("-" if error is None else _scientific(error) for error in errors),
            f"{sum(layer.seconds for layer in members):.1f}",
        ]
        table.add_row(*cells, *([_fallbacks(members)] if fallen_back else []))
    return table


def _scientific(value: float) -> str:
    """Two digits and a short exponent: 2.6e-3."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e{int(exponent)}"


def _geometric_mean(values: Sequence[float]) -> float | None:
    if not values:
        return None
    return math.exp(sum(math.log(max(value, 1e-30)) for value in values) / len(values))


def _fallbacks(layers: Sequence[LayerReport]) -> str:
    counts = {
        "smaller groups": sum(layer.fallback_group_size for layer in layers),
        "dead inputs": sum(layer.dead_columns > 0 for layer in layers),
        "more damping": sum(layer.damping_steps > 0 for layer in layers),
        "on all tokens": sum(layer.shared_hessian for layer in layers),
        "to nearest": sum(layer.rounded_to_nearest for layer in layers),
    }
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def report_summary(report: Report) -> str:
    """Time and fallbacks of a run in one line."""
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in report.seconds.items())
    fallbacks = ", ".join(f"{count} x {name}" for name, count in report.fallbacks.items() if count) or "none"
    return f"time: {seconds}; fallbacks: {fallbacks}"


def size_table(checkpoint: Checkpoint) -> Table:
    """What each width costs, and where its scales come from."""
    table = Table(title="widths")
    for column in ("bits", "bits per weight", "size as served", "target", "scales"):
        table.add_column(column, justify="right")
    if checkpoint.settings.is_slice:
        held = checkpoint.widths_held[0]
        name = str(held) if isinstance(held, int) else "allocation"
        table.add_row(name, f"{checkpoint.bits_per_weight(held):.3f}", megabytes(checkpoint.served_bytes(held)))
        return table
    sources = scale_source(checkpoint.settings.scale_bits)
    for bits in WIDTHS:
        table.add_row(
            f"{bits}{' (default)' if bits == checkpoint.settings.bits else ''}",
            f"{checkpoint.bits_per_weight(bits):.3f}",
            megabytes(checkpoint.served_bytes(bits)),
            "yes" if bits in checkpoint.settings.target_bits else "",
            "own" if sources[bits] == bits else f"those of {sources[bits]} bits",
        )
    return table


def evaluation_table(evaluation: Evaluation) -> Table:
    """Quality of each width."""
    table = Table(
        title="quality by width",
        caption=escape(evaluation.protocol + figures.settings(evaluation.settings)),
        caption_justify="left",
    )
    for column in ("bits", "bits per weight", "size", "perplexity", "KL", "top-1"):
        table.add_column(column, justify="right")
    for result in evaluation.results:
        table.add_row(
            escape(figures.width(result.bits, result.allocation)),
            f"{result.bits_per_weight:.3f}",
            megabytes(result.bytes),
            figures.perplexity(result.perplexity),
            figures.divergence(result.kl),
            figures.share(result.top1),
        )
    if evaluation.reference_perplexity is not None:
        table.add_section()
        table.add_row("full", "", "", figures.perplexity(evaluation.reference_perplexity), "0", "100%")
    return table


def task_table(evaluation: TaskEvaluation) -> Table:
    """Scores of the tasks asked for: one row for each metric, one column for each width."""
    caption = f"{escape(evaluation.protocol + figures.settings(evaluation.settings))}; value ± standard error"
    table = Table(title="tasks by width", caption=caption, caption_justify="left")
    for column in ("task", "shots", "metric"):
        table.add_column(column)
    columns = [
        (escape(figures.width(result.bits, result.allocation, " bits")), result.scores) for result in evaluation.results
    ]
    if evaluation.reference_scores is not None:
        columns.append(("full", evaluation.reference_scores))
    for label, _ in columns:
        table.add_column(label, justify="right")
    for task in evaluation.shown:
        name, shots = task, str(columns[0][1][task][next(iter(columns[0][1][task]))].shots)
        for metric in columns[0][1][task]:
            cells = (scores[task][metric] for _, scores in columns)
            table.add_row(name, shots, metric, *(figures.score(cell.value, cell.stderr) for cell in cells))
            name = shots = ""
    return table


def refinement_table(results: Sequence[Refinement]) -> Table:
    """What tuning the scales brought."""
    table = Table(title="scales tuned", caption="KL to the full model on held-out text", caption_justify="left")
    for column in ("bits", "KL before", "KL after", "steps", "sec"):
        table.add_column(column, justify="right")
    for result in results:
        after = f"{result.kl_after:.4f}" if result.kl_after < result.kl_before else "not better, left as it was"
        table.add_row(
            escape(figures.width(result.bits, result.allocation)),
            f"{result.kl_before:.4f}",
            after,
            str(result.steps),
            f"{result.seconds:.0f}",
        )
    return table


def search_table(search: Search) -> Table:
    """What a search found, beside uniform widths."""
    measure = "KL" if search.fitness == "kl" else "perplexity"
    caption = f"{measure} on text that the search did not see: {escape(search.protocol)}"
    table = Table(title="allocations", caption=caption, caption_justify="left")
    for column in ("name", "bits", "bits per weight", "size", "left", measure):
        table.add_column(column, justify="left" if column == "name" else "right")
    for results in (search.found, search.uniform):
        for result in results:
            table.add_row(
                escape(result.name),
                f"{result.bits:.3f}",
                f"{result.bits_per_weight:.3f}",
                megabytes(result.bytes),
                f"{result.slack_bits / 8:,.0f} B" if result.target else "",
                f"{result.loss:.4f}" if search.fitness == "kl" else figures.perplexity(math.exp(min(result.loss, 700))),
            )
        table.add_section()
    return table


def allocations_table(records: Mapping[str, Mapping[str, Any]], identities: Sequence[str]) -> Table:
    """Allocations that lie with a checkpoint, which has these identities."""
    table = Table(title="allocations")
    for column in ("name", "bits", "bits per weight", "size", "fitness", "method", "scales"):
        table.add_column(column, justify="left" if column in ("name", "method", "scales") else "right")
    for name, record in records.items():
        # One that was put there by hand may hold its widths and nothing else.
        fitness, foreign = record.get("fitness"), record.get("checkpoint") not in (None, *identities)
        table.add_row(
            escape(f"{name} (of another checkpoint)" if foreign else name),
            *(f"{record[key]:.3f}" if key in record else "-" for key in ("bits", "bits_per_weight")),
            megabytes(record["bytes"]) if "bytes" in record else "-",
            f"{fitness['measure']} {fitness['value']:.4f}" if fitness else "-",
            record.get("found", {}).get("method", "by hand"),
            _own_scales(record),
        )
    return table


def _own_scales(record: Mapping[str, Any]) -> str:
    """What scales an allocation has; its fitness was measured before they were tuned, on other text."""
    if not record.get(SCALES):
        return "of each width"
    done = record.get("refinement", {})
    if not {"kl_before", "kl_after"} <= done.keys():
        return "tuned"
    return f"tuned: kl {done['kl_before']:.4f} to {done['kl_after']:.4f}"


def integrity_table(integrity: Integrity) -> Table:
    """What was found wrong with a checkpoint's files, a line for each tensor."""
    title = "whole" if integrity.passed else "DAMAGED"
    table = Table(title=f"{escape(str(integrity.directory))}: {title}", show_header=False)
    table.add_row("kind", integrity.kind)
    table.add_row("files of tensors", str(integrity.files))
    table.add_row("tensors", f"{integrity.tensors:,} ({megabytes(integrity.bytes)})")
    if integrity.checked is None:
        table.add_row("checksums", "none: written before there were any, so only headers and scales were checked")
    else:
        table.add_row("tensors with the right checksum", f"{integrity.checked:,}")
    for damage in integrity.damage:
        table.add_row("[red]damaged[/red]", escape(f"{damage.file}: {damage.tensor} {damage.problem}"))
    return table


def verification_table(verification: Verification) -> Table:
    """What the comparison of an export with its slice found."""
    title = "equal" if verification.passed else "NOT EQUAL"
    table = Table(title=f"{verification.format} export and slice: {title}", show_header=False)
    different = verification.different
    names = ", ".join(different[:3]) + (" ..." if len(different) > 3 else "")
    rows = {
        "loaded by": verification.engine,
        "tensors compared": str(verification.tensors),
        "tensors that differ": f"{len(different)}: {names}" if different else "none",
        "layers that the engine rounds": f"{len(verification.rounded)}: experts, to the model's dtype",
        "largest difference of a weight": f"{verification.largest_difference:g}",
        "tokens compared": str(verification.tokens),
        "largest difference of a logit": f"{verification.logit_difference:.1e}",
        "KL": f"{verification.kl:.1e}",
    }
    if not verification.rounded:
        del rows["layers that the engine rounds"]
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def recipe_lines(settings: Mapping[str, object]) -> str:
    """A recorded recipe on one line."""
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def speed_table(results: Sequence[Speed]) -> Table:
    """Tokens per second by width and batch, and what bounds them."""
    caption = (
        f"{torch.get_num_threads()} threads; bandwidth: share of a pure read; "
        "overhead: share of a step outside the quantized layers' products"
    )
    table = Table(title="speed by width", caption=caption, caption_justify="left")
    for column in (
        "bits",
        "batch",
        "decode tok/s",
        "prompt tok/s",
        "read per token",
        "bandwidth",
        "overhead",
        "memory",
    ):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(
            f"{result.bits:g}",
            str(result.batch),
            f"{result.decode_tokens_per_second:.1f}",
            f"{result.prompt_tokens_per_second:.0f}",
            megabytes(result.bytes_per_token),
            f"{result.bandwidth_share:.0%}",
            "-" if result.overhead_share is None else f"{result.overhead_share:.0%}",
            megabytes(result.resident_bytes),
        )
    return table


def kernel_table() -> Table:
    """Which kernel computes a product on this machine, by form of the weight, activations and number of rows."""
    library = f"native library for {native.isa()}" if native.available() else native.reason()
    gpu = obstacle(torch.device("cuda"), torch.float16) if torch.cuda.is_available() else "no GPU"
    caption = f"{library}; Triton: {gpu or torch.cuda.get_device_name()}; MATGPTQ_KERNEL forces a kernel"
    table = Table(title="kernels", caption=caption, caption_justify="left")
    for column in ("weight", "device", "activations", "1 row", "16 rows", "512 rows"):
        table.add_column(column)
    rows: list[tuple[Form, str, torch.dtype]] = [
        (form, "cpu", dtype) for form in ("native", "codes") for dtype in (torch.float32, torch.bfloat16)
    ]
    if torch.cuda.is_available():
        rows += [
            (form, "cuda", dtype)
            for form in ("planes", "codes")
            for dtype in (torch.float16, torch.bfloat16, torch.float32)
        ]
    refused = None
    for (form, device, dtype), activations in itertools.product(rows, ("exact", "int8")):
        try:
            names = [choose(Product(form, device, dtype, count, activations)).name for count in (1, 16, 512)]
        except ConfigurationError as error:
            refused = error
            continue
        name = str(dtype).removeprefix("torch.") + (", int8 inside" if activations == "int8" else "")
        table.add_row("codes" if form == "codes" else "packed", device, name, *names)
    if refused is not None and not table.row_count:
        raise refused  # a kernel is forced that computes none of this
    return table
