"""From how many rows on dequantized tiles are faster than the fused kernel: `matgptq.kernels.kernel_choice.fused_rows`.

    python benchmarks/cpu_crossover.py [-o benchmarks/results/cpu_crossover.json]

Exact activations of each dtype: the fused native kernel (also with activations rounded to int8, for which there is no
other way), tiles that are dequantized and multiplied by PyTorch, and PyTorch with weights that are dense already, which
leaves out the work of unpacking and is no contestant; the latter once more inside
`matgptq.machine.devices.exact_products`, which makes a difference to float32 where oneDNN is faster than MKL.
Medians of interleaved repetitions, in GFLOP/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from machine import describe_machine
from torch import Tensor

from matgptq import native
from matgptq.kernels.kernel_choice import _run_tiled, fused_rows
from matgptq.machine.devices import exact_products

SHAPES = [(4096, 4096), (2048, 8192), (1536, 576)]
ROWS = (8, 16, 24, 32, 48, 64, 128, 256, 512, 2048)
BITS, GROUP_SIZE = 4, 64


def rates(ways: dict[str, Callable[[], object]], operations: float, repetitions: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return {name: round(operations / statistics.median(taken) / 1e9, 1) for name, taken in seconds.items()}


def exact(x: Tensor, weight: Tensor) -> Tensor:
    """A product as a model is evaluated with and a layer solved."""
    with exact_products(x.device):
        return torch.mm(x, weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--isa", help="another instruction set than the best one of this machine")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if not native.available():
        raise SystemExit(f"no native kernels: {native.reason()}")
    if arguments.isa:
        native.set_isa(arguments.isa)
    records = []
    for threads in map(int, arguments.threads.split(",")):
        torch.set_num_threads(threads)
        for out_features, in_features in SHAPES:
            codes = torch.randint(0, 256, (out_features, in_features), dtype=torch.uint8)
            scales = torch.rand(out_features, in_features // GROUP_SIZE).mul_(0.01).half().float()
            weight = native.pack_slice(codes, scales, BITS)
            for dtype in (torch.float32, torch.bfloat16):
                dense = native.dequantize_rows(weight, BITS, dtype=dtype)
                for rows in ROWS:
                    x = torch.randn(rows, in_features).to(dtype)
                    ways = {
                        "fused": partial(native.matmul, x, weight, BITS),
                        "fused_int8": partial(native.matmul, x, weight, BITS, activations="int8"),
                        "tiled": partial(_run_tiled, x, weight, BITS, None, "exact"),
                        "dense": partial(torch.mm, x, dense.T),
                        "dense_exact_products": partial(exact, x, dense.T),
                    }
                    found = rates(ways, 2.0 * rows * in_features * out_features, 3 if rows > 500 else 9)
                    record = {
                        "threads": threads,
                        "out_features": out_features,
                        "in_features": in_features,
                        "dtype": str(dtype).removeprefix("torch."),
                        "rows": rows,
                        "gflop_per_second": found,
                        "fused_over_tiled": round(found["fused"] / found["tiled"], 2),
                    }
                    records.append(record)
                    print(*record.values(), flush=True)
    if arguments.output:
        result = {
            "machine": describe_machine() | {"threads": None, "native": native.isa(), "vendor": native.cpu_vendor()},
            "bits": BITS,
            "group_size": GROUP_SIZE,
            "chosen_up_to": {
                str(dtype).removeprefix("torch."): min(fused_rows(dtype), 1 << 31)
                for dtype in (torch.float32, torch.bfloat16)
            },
            "records": records,
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
