"""CPU time of a whole solve of a real model, beside a straightforward scan of the published method.

    python benchmarks/whole_solve.py MODEL --calibration TEXT -o benchmarks/results/whole_solve.json

Quantizes the model (widths 2,3,4,8, group 64) and adds up the CPU time that all threads spend inside the solver:
scales, sweep, coordinate passes, refits of all widths, errors; not the model's forward passes. The scan of 256
candidates per weight and width (``inner_loop.scan``) is timed on the layers of a few blocks and scaled to all of them;
the row ``paper`` is the same method with our inner loop.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from inner_loop import scan
from machine import describe_machine

import matgptq
from matgptq.core.hessian import factorize, prepare_hessian
from matgptq.core.solver import Solution, solve
from matgptq.quantization import block_quantizer
from matgptq.recipe import make_recipe

GROUP_SIZE = 64
BITS = (2, 3, 4, 8)
ROWS = ("paper", "fast", "balanced")


class Meter:
    """Stands in for the solver: adds up its CPU time, and times the scan on the matrices of some blocks."""

    def __init__(self, matrices_per_block: int, scanned_blocks: tuple[int, ...]) -> None:
        self.cpu_seconds = 0.0
        self.scan_seconds = 0.0
        self.matrices = 0
        self.scanned = 0
        self._per_block = matrices_per_block
        self._scanned_blocks = scanned_blocks

    def __call__(self, weight: torch.Tensor, hessian: torch.Tensor, *rest: Any) -> Solution:
        started = time.process_time()
        solution = solve(weight, hessian, *rest)
        self.cpu_seconds += time.process_time() - started
        if self.matrices // self._per_block in self._scanned_blocks:
            paper = make_recipe("paper", group_size=GROUP_SIZE)
            factor = factorize(prepare_hessian(hessian).matrix, paper.damping)
            assert factor is not None
            started = time.process_time()
            scan(weight.float(), factor.upper, solution.weight.scales[8], paper.target_bits)
            self.scan_seconds += time.process_time() - started
            self.scanned += 1
        self.matrices += 1
        return solution


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--matrices-per-block", type=int, default=4, help="groups of layers that share an input")
    parser.add_argument("--scan-blocks", type=int, nargs="*", default=[0, 15], help="blocks that the scan is timed on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", nargs="*", default=ROWS, choices=ROWS)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.rows:
        meter = Meter(arguments.matrices_per_block, tuple(arguments.scan_blocks))
        block_quantizer.solve = meter  # type: ignore[assignment]
        with tempfile.TemporaryDirectory() as folder:
            report = matgptq.quantize(
                arguments.model,
                Path(folder) / "out",
                method="paper" if name == "paper" else "matgptq",
                quality=None if name == "paper" else name,
                bits=BITS,
                group_size=GROUP_SIZE,
                dataset=arguments.calibration,
                nsamples=16,
                seqlen=2048,
            )
        row = {
            "row": name,
            "solve_cpu_seconds": round(meter.cpu_seconds, 1),
            "blocks_wall_seconds": report.seconds["blocks"],
        }
        if meter.scanned:
            scan_seconds = meter.scan_seconds * meter.matrices / meter.scanned
            row["scan_cpu_seconds_scaled"] = round(scan_seconds, 1)
            row["scan_over_solve"] = round(scan_seconds / meter.cpu_seconds, 1)
        rows.append(row)
        print(row)
    if arguments.output:
        record = {"machine": describe_machine(), "threads": arguments.threads, "rows": rows}
        arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
