"""The published method solved two ways: with the table of breakpoints, and with a scan of all 256 candidates.

    python benchmarks/inner_loop.py -o benchmarks/results/inner_loop.json

All run on the same random layers, interleaved; the codes must be equal but for ties. The table is used by the solver in
PyTorch and by the one in the native library. The scan is PyTorch, written the straightforward way: one [256, rows]
temporary per width and column.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from machine import describe_machine
from torch import Tensor

from matgptq import native
from matgptq.core.hessian import factorize
from matgptq.core.solver import solve
from matgptq.recipe import make_recipe
from matgptq.slicing import level_table

SHAPES = {"attention 576 x 576": (576, 576), "gate 1536 x 576": (1536, 576), "down 576 x 1536": (576, 1536)}
GROUP_SIZE = 64
ENGINES = ("torch", "native") if native.available() else ("torch",)


def scan(weight: Tensor, upper: Tensor, scales: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Codes ``[rows, in]`` of the published method, trying every candidate for every weight."""
    weight = weight.clone()
    levels = [level_table(bits).unsqueeze(1) for bits in widths]
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for j in range(weight.shape[1]):
        column = weight[:, j]
        scale = scales[:, j // GROUP_SIZE]
        cost = torch.zeros(256, len(column))
        for table in levels:
            cost += (column - table * scale).square_()
        chosen = cost.argmin(0)
        codes[:, j] = chosen
        rounded = torch.stack([table[chosen, 0] * scale for table in levels]).mean(0)
        residual = (column - rounded) / upper[j, j]
        weight[:, j + 1 :] -= residual.unsqueeze(1) * upper[j, j + 1 :]
    return codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = make_recipe("paper", group_size=GROUP_SIZE)
    rows = []
    for name, (out_features, in_features) in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(4 * in_features, in_features, generator=generator)
        inputs = inputs @ torch.randn(in_features, in_features, generator=generator) / in_features**0.5
        hessian = inputs.T @ inputs * (2 / len(inputs))
        weight = torch.randn(out_features, in_features, generator=generator) * 0.05
        factor = factorize(hessian, recipe.damping)
        assert factor is not None
        seconds: dict[str, list[float]] = {engine: [] for engine in (*ENGINES, "scan")}
        for _ in range(arguments.repeats):
            for engine in ENGINES:
                os.environ["MATGPTQ_SOLVER"] = engine
                started = time.perf_counter()
                solution = solve(weight, hessian, recipe, GROUP_SIZE).weight
                seconds[engine].append(time.perf_counter() - started)
            started = time.perf_counter()
            codes = scan(weight, factor.upper, solution.scales[8], recipe.target_bits)
            seconds["scan"].append(time.perf_counter() - started)
        row: dict[str, object] = {"layer": name}
        for engine in ENGINES:
            os.environ["MATGPTQ_SOLVER"] = engine
            made = solve(weight, hessian, recipe, GROUP_SIZE).weight.codes
            row[engine] = {
                "seconds": statistics.median(seconds[engine]),
                "scan_ratio": statistics.median(s / t for s, t in zip(seconds["scan"], seconds[engine], strict=True)),
                # A tie broken the other way changes everything behind it in that row, so rows are counted, too.
                "rows_with_equal_codes": float((codes == made).all(1).double().mean()),
                "equal_codes": float((codes == made).double().mean()),
            }
        row["scan_seconds"] = statistics.median(seconds["scan"])
        rows.append(row)
        print(row)
    if arguments.output:
        record = {"machine": describe_machine(), "repeats": arguments.repeats, "rows": rows}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
