"""KL and perplexity of every method and width, in one run on one text.

    python benchmarks/quality.py MODEL --calibration c4.txt --text wikitext2-test.txt -o benchmarks/results/quality.json

Each row is quantized and measured in a process of its own, so that its time and peak memory are its own, too.
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


NESTED = {"bits": [2, 3, 4, 8]}
ROWS = [
    Row("rtn", {"method": "rtn"}),
    *(Row(f"gptq {bits}", {"method": "gptq", "bits": [bits]}, (bits,)) for bits in (2, 3, 4)),
    Row("paper", {"method": "paper", **NESTED}),
    Row("matgptq", {"method": "matgptq", **NESTED}),
    Row("matgptq, PyTorch solver", {"method": "matgptq", **NESTED}, environment={"MATGPTQ_SOLVER": "torch"}),
    Row("matgptq, self calibration", {"method": "matgptq", **NESTED}, dataset="self"),
    Row("matgptq, seed 1", {"method": "matgptq", **NESTED}, seed=1),
]


@dataclass
class Measured:
    """A row as measured."""

    name: str
    seconds: dict[str, float]
    peak_memory_bytes: int
    fallbacks: dict[str, int]
    results: list[dict[str, Any]]
    reference_perplexity: float | None
    protocol: str
    recipe: dict[str, Any] = field(default_factory=dict)


def measure(row: Row, model: str, calibration: str, text: str, windows: int) -> Measured:
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
        evaluation = matgptq.evaluate(out, row.widths, text=text, windows=windows, seqlen=SEQLEN, reference=model)
    return Measured(
        row.name,
        report.seconds,
        peak,
        report.fallbacks,
        [result.to_dict() for result in evaluation.results],
        evaluation.reference_perplexity,
        evaluation.protocol.replace(text, Path(text).name),  # no paths of this machine
        dict(report.recipe),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="full-precision model: directory, .gguf file or hub id")
    parser.add_argument("--calibration", required=True, help="calibration text")
    parser.add_argument("--text", required=True, help="evaluation text")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--rows", help="names separated by semicolons; default all")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        row = next(row for row in ROWS if row.name == arguments.child)
        measured = measure(row, arguments.model, arguments.calibration, arguments.text, arguments.windows)
        print(json.dumps(dataclasses.asdict(measured)))
        return
    wanted = arguments.rows.split(";") if arguments.rows else [row.name for row in ROWS]
    rows = []
    print(f"{'row':28}" + "".join(f"{f'KL {bits}':>10}" for bits in EVALUATED) + f"{'minutes':>10}{'peak GB':>10}")
    for name in wanted:
        started = time.monotonic()
        row = next(row for row in ROWS if row.name == name)
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--child", name],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
            env={**os.environ, **row.environment},
        )
        measured = json.loads(done.stdout.splitlines()[-1])
        measured["wall_seconds"] = round(time.monotonic() - started, 1)
        rows.append(measured)
        kl = {result["bits"]: f"{result['kl']:.4f}" for result in measured["results"]}
        minutes = sum(measured["seconds"].values()) / 60
        cells = "".join(f"{kl.get(bits, '-'):>10}" for bits in EVALUATED)
        print(f"{name:28}{cells}{minutes:>10.1f}{measured['peak_memory_bytes'] / 1e9:>10.2f}", flush=True)
        if arguments.output:
            record = {
                "model": Path(arguments.model).name,
                "calibration": f"{Path(arguments.calibration).name}, {NSAMPLES} x {SEQLEN} tokens",
                "text": f"{Path(arguments.text).name}, first {arguments.windows} windows of {SEQLEN}",
                "group_size": GROUP_SIZE,
                "machine": describe_machine(),
                "rows": rows,
            }
            arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
