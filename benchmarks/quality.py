"""KL and perplexity of every method, quality and width, in one run.

    python benchmarks/quality.py MODEL --calibration c4.txt --text wikitext2-test.txt --other wikipedia.txt \\
        -o benchmarks/results/quality.json --plot benchmarks/results/quality.png

Choices were made by the first 4 windows of the text; windows 4 to 11 and the other text were not looked at for them.
Each row is quantized and measured in a process of its own, so that its time and peak memory are its own, too. Rows that
the output holds already are not measured again.

The ``alone`` rows are the bound: one width, no nesting, with the same ingredients.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import describe_machine, peak_memory_bytes
from torch import Tensor

from matgptq.calibration import evaluation_windows
from matgptq.recipe import make_recipe
from matgptq.source import open_source

GROUP_SIZE = 64
NSAMPLES, SEQLEN = 16, 2048
EVALUATED = (2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Row:
    """One line of the table: what to quantize with, and the widths at which to look at it."""

    name: str
    options: dict[str, Any]
    widths: tuple[int, ...] = EVALUATED
    dataset: str | None = None  # the run's calibration text unless named here
    seed: int = 0
    environment: dict[str, str] = field(default_factory=dict)


def _alone(bits: int, quality: str) -> Row:
    """One width without nesting, by every ingredient of a quality; tuned if that tunes this width."""
    recipe = make_recipe("matgptq", quality=quality).to_dict()
    for nested in ("method", "target_bits", "bit_weights", "refit_bits", "group_size", "damping", "seed"):
        del recipe[nested]
    recipe["tuned_bits"] = [bits] if bits in recipe["tuned_bits"] else []
    return Row(f"{bits} bits alone, as {quality}", {"method": "gptq", "bits": [bits], **recipe}, (bits,))


ROWS = [
    Row("rtn", {"method": "rtn"}),
    *(Row(f"gptq {bits}", {"method": "gptq", "bits": [bits]}, (bits,)) for bits in (2, 3, 4)),
    Row("paper", {"method": "paper"}),
    Row("fast", {"quality": "fast"}),
    Row("balanced", {"quality": "balanced"}),
    Row("best", {"quality": "best"}),
    Row("balanced, seed 1", {"quality": "balanced"}, seed=1),
    Row("best, seed 1", {"quality": "best"}, seed=1),
    *(_alone(bits, "best") for bits in (3, 4, 2)),
    *(_alone(bits, "balanced") for bits in (3, 4, 2)),
    Row("balanced, PyTorch solver", {"quality": "balanced"}, environment={"MATGPTQ_SOLVER": "torch"}),
    Row("balanced, self calibration", {"quality": "balanced"}, dataset="self"),
]


@dataclass
class Measured:
    """A row as measured."""

    name: str
    seconds: dict[str, float]
    peak_memory_bytes: int
    fallbacks: dict[str, int]
    texts: dict[str, dict[str, Any]]
    recipe: dict[str, Any] = field(default_factory=dict)


def measure(row: Row, model: str, calibration: str, text: str, other: str | None) -> Measured:
    """Quantize and evaluate one row in this process."""
    from transformers.utils import logging

    import matgptq

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "checkpoint"
        report = matgptq.quantize(
            model,
            out,
            group_size=GROUP_SIZE,
            dataset=row.dataset or calibration,
            nsamples=NSAMPLES,
            seqlen=SEQLEN,
            seed=row.seed,
            **row.options,
        )
        peak = peak_memory_bytes()
        texts = {}
        for name, windows in evaluation_texts(model, text, other).items():
            evaluation = matgptq.evaluate(out, row.widths, text=windows, reference=model)
            texts[name] = {
                "reference_perplexity": evaluation.reference_perplexity,
                "results": [result.to_dict() for result in evaluation.results],
            }
    return Measured(row.name, report.seconds, peak, report.fallbacks, texts, dict(report.recipe))


def evaluation_texts(model: str, text: str, other: str | None) -> dict[str, Tensor]:
    """Token windows by name: those that choices were made on, and those that were not."""
    tokenizer = open_source(model).load_tokenizer()
    windows = evaluation_windows(text, tokenizer, windows=12, seqlen=SEQLEN).tokens
    texts = {"windows 0-3": windows[:4], "windows 4-11": windows[4:]}
    if other is not None:
        texts["other text"] = evaluation_windows(other, tokenizer, windows=4, seqlen=SEQLEN).tokens
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="full-precision model: directory, .gguf file or hub id")
    parser.add_argument("--calibration", required=True, help="calibration text")
    parser.add_argument("--text", required=True, help="evaluation text")
    parser.add_argument("--other", help="another text, of another kind")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rows", help="names separated by semicolons; default all")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        row = next(row for row in ROWS if row.name == arguments.child)
        measured = measure(row, arguments.model, arguments.calibration, arguments.text, arguments.other)
        print(json.dumps(dataclasses.asdict(measured)))
        return
    wanted = arguments.rows.split(";") if arguments.rows else [row.name for row in ROWS]
    rows: list[dict[str, Any]] = []
    if arguments.output and arguments.output.exists():
        rows = json.loads(arguments.output.read_text(encoding="utf-8"))["rows"]
    print(f"{'row':40}" + "".join(f"{f'KL {bits}':>10}" for bits in EVALUATED) + f"{'minutes':>10}{'peak GB':>10}")
    for name in wanted:
        found = next((row for row in rows if row["name"] == name), None)
        if found is None:
            found = run_row(next(row for row in ROWS if row.name == name))
            rows.append(found)
        for text, measured in found["texts"].items():
            kl = {result["bits"]: f"{result['kl']:.4f}" for result in measured["results"]}
            cells = "".join(f"{kl.get(bits, '-'):>10}" for bits in EVALUATED)
            minutes = sum(found["seconds"].values()) / 60
            print(
                f"{name + ', ' + text:40}{cells}{minutes:>10.1f}{found['peak_memory_bytes'] / 1e9:>10.2f}", flush=True
            )
        if arguments.output:
            record = {
                "model": Path(arguments.model).name,
                "calibration": f"{Path(arguments.calibration).name}, {NSAMPLES} x {SEQLEN} tokens",
                "text": f"{Path(arguments.text).name}, windows of {SEQLEN} tokens",
                "other text": arguments.other and f"{Path(arguments.other).name}, first 4 windows",
                "group_size": GROUP_SIZE,
                "machine": describe_machine(),
                "rows": rows,
            }
            arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(rows, arguments.plot)


def run_row(row: Row) -> dict[str, Any]:
    """Measure a row in a process of its own."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--child", row.name],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env={**os.environ, **row.environment},
    )
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    measured["wall_seconds"] = round(time.monotonic() - started, 1)
    return measured


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """KL against bits per weight, by method, on text that was not used for choosing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name in ("rtn", "gptq", "paper", "fast", "balanced", "best"):
        points = sorted(
            (result["bits_per_weight"], result["kl"])
            for row in rows
            if row["name"] == name or (name == "gptq" and row["name"] in ("gptq 2", "gptq 3", "gptq 4"))
            for result in row["texts"]["windows 4-11"]["results"]
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, scales included")
    axes.set_ylabel("KL to the full model, nats per token")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
