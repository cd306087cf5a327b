"""Tables of KL and perplexity: a row is one way to quantize, measured on three texts in a process of its own.

Choices were made by the first 4 windows of the text; windows 4 to 11 and the other text were not looked at for them.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import describe_machine, peak_memory_bytes
from torch import Tensor

from matgptq.models.source import open_source
from matgptq.text.windows import evaluation_windows

GROUP_SIZE = 64
NSAMPLES, SEQLEN = 16, 2048
EVALUATED = (2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Texts:
    """What a row can be calibrated with.

    Attributes:
        model: the full model.
        calibration, other: files.
        directory: for files that a row makes of them.
    """

    model: str
    calibration: Path
    other: Path | None
    directory: Path


def calibration_text(texts: Texts) -> Path:
    """The run's calibration text as it is."""
    return texts.calibration


@dataclass(frozen=True)
class Row:
    """One line of the table: what to quantize with, and the widths at which to look at it.

    Attributes:
        name: of the line.
        options: of ``matgptq.quantize``.
        widths: evaluated.
        dataset: makes what it is calibrated with.
        nsamples: windows of that.
        seed: of the draw.
        environment: of its process.
        change: entered while it is quantized.
    """

    name: str
    options: dict[str, Any]
    widths: tuple[int, ...] = EVALUATED
    dataset: Callable[[Texts], str | Path | Tensor] = calibration_text
    nsamples: int = NSAMPLES
    seed: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    change: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass
class Measured:
    """A row as measured."""

    name: str
    machine: dict[str, Any]
    seconds: dict[str, float]
    cpu_seconds: float
    peak_memory_bytes: int
    fallbacks: dict[str, int]
    texts: dict[str, dict[str, Any]]
    recipe: dict[str, Any] = field(default_factory=dict)


def measure(
    row: Row, model: str, calibration: str, text: str, other: str | None, names: Sequence[str] | None = None
) -> Measured:
    """Quantize and evaluate one row in this process, on the texts of some names or on all."""
    from transformers.utils import logging

    import matgptq

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "checkpoint"
        given = Texts(model, Path(calibration), None if other is None else Path(other), Path(directory))
        started = time.process_time()
        with row.change():
            report = matgptq.quantize(
                model,
                out,
                dataset=row.dataset(given),
                nsamples=row.nsamples,
                seqlen=SEQLEN,
                seed=row.seed,
                **{"group_size": GROUP_SIZE, **row.options},
            )
        cpu_seconds, peak = time.process_time() - started, peak_memory_bytes()
        texts = {}
        for name, windows in evaluation_texts(model, text, other).items():
            if names is not None and name not in names:
                continue
            evaluation = matgptq.evaluate(out, row.widths, text=windows, reference=model)
            texts[name] = {
                "reference_perplexity": evaluation.reference_perplexity,
                "results": [result.to_dict() for result in evaluation.results],
            }
    return Measured(
        row.name,
        describe_machine(),
        report.seconds,
        round(cpu_seconds, 1),
        peak,
        report.fallbacks,
        texts,
        dict(report.recipe),
    )


def evaluation_texts(model: str, text: str, other: str | None) -> dict[str, Tensor]:
    """Token windows by name: those that choices were made on, and those that were not."""
    tokenizer = open_source(model).load_tokenizer()
    windows = evaluation_windows(text, tokenizer, windows=12, seqlen=SEQLEN).tokens
    texts = {"windows 0-3": windows[:4], "windows 4-11": windows[4:]}
    if other is not None:
        texts["other text"] = evaluation_windows(other, tokenizer, windows=4, seqlen=SEQLEN).tokens
    return texts


def make_table(
    rows: Sequence[Row],
    program: str,
    description: str | None,
    plot: Callable[[list[dict[str, Any]], Path], None],
    names: Sequence[str] | None = None,
) -> None:
    """Read the command line, measure the rows that it asks for and the output does not hold, print and write them.

    Args:
        rows: that there are.
        program: file of the script, which is started anew for each row.
        description: for ``--help``.
        plot: draws the rows into a file.
        names: of the texts to measure on; default all.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="full-precision model: directory, .gguf file or hub id")
    parser.add_argument("--calibration", required=True, help="calibration text")
    parser.add_argument("--text", required=True, help="evaluation text")
    parser.add_argument("--other", help="another text, of another kind")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rows", help="names separated by semicolons; default all")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    by_name = {row.name: row for row in rows}
    if arguments.child:
        row = by_name[arguments.child]
        measured = measure(row, arguments.model, arguments.calibration, arguments.text, arguments.other, names)
        print(json.dumps(dataclasses.asdict(measured)))
        return
    wanted = arguments.rows.split(";") if arguments.rows else [*by_name]
    records: list[dict[str, Any]] = []
    if arguments.output and arguments.output.exists():
        records = json.loads(arguments.output.read_text(encoding="utf-8"))["rows"]
    print(f"{'row':48}" + "".join(f"{f'KL {bits}':>10}" for bits in EVALUATED) + f"{'minutes':>10}{'peak GB':>10}")
    for name in wanted:
        found = next((record for record in records if record["name"] == name), None)
        if found is None:
            found = _run(by_name[name], program)
            records.append(found)
        for text, measured in found["texts"].items():
            kl = {result["bits"]: f"{result['kl']:.4f}" for result in measured["results"]}
            cells = "".join(f"{kl.get(bits, '-'):>10}" for bits in EVALUATED)
            minutes = sum(found["seconds"].values()) / 60
            print(
                f"{name + ', ' + text:48}{cells}{minutes:>10.1f}{found['peak_memory_bytes'] / 1e9:>10.2f}", flush=True
            )
        if arguments.output:
            record = {
                "model": Path(arguments.model).name,
                "calibration": f"{Path(arguments.calibration).name}, {NSAMPLES} x {SEQLEN} tokens",
                "text": f"{Path(arguments.text).name}, windows of {SEQLEN} tokens",
                "other text": arguments.other and f"{Path(arguments.other).name}, first 4 windows",
                "group_size": GROUP_SIZE,
                "rows": records,
            }
            arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(records, arguments.plot)


def _run(row: Row, program: str) -> dict[str, Any]:
    """Measure a row in a process of its own."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, program, *sys.argv[1:], "--child", row.name],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env={**os.environ, **row.environment},
    )
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    measured["wall_seconds"] = round(time.monotonic() - started, 1)
    return measured


@contextmanager
def figure(file: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Axes to draw on; written to a file in the end, with grid and legend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(figsize=size)
    yield axes
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    drawn.tight_layout()
    drawn.savefig(file, dpi=150)
