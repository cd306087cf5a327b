"""What each instruction set of the native library takes for the same products, on one machine.

    python benchmarks/instruction_sets.py [-o benchmarks/results/instruction_sets.json]

Weights that fit a cache, one thread, medians of interleaved repetitions. A processor with AVX-512 but without AVX-VNNI
runs the kernels for the latter from a library built with `cmake -DMATGPTQ_EVEX=ON`, with the 16 registers of AVX-VNNI
if -ffixed-xmm16 to -ffixed-xmm31 are among CMAKE_CXX_FLAGS; MATGPTQ_NATIVE_LIBRARY names that library.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from machine import describe_machine

from matgptq import native
from matgptq.errors import ConfigurationError
from matgptq.native.library import Activations

OUT_FEATURES, IN_FEATURES, GROUP_SIZE = 512, 2048, 64
ROWS = (1, 2, 4, 8, 16, 64)
BITS = (2, 3, 4, 6, 8)
KINDS: tuple[Activations, ...] = ("int8", "exact")


def instruction_sets() -> list[str]:
    """Those of this machine, its best one first."""
    found = [native.isa()]
    for name in ("avx512", "avx_vnni", "avx2", "neon"):
        try:
            native.set_isa(name)
        except ConfigurationError:
            continue
        if name not in found:
            found.append(name)
    native.set_isa(found[0])
    return found


def microseconds(x: torch.Tensor, weight: native.Weight, bits: int, kind: Activations, sets: list[str]) -> list[float]:
    calls = max(1, 128 // len(x))
    taken: dict[str, list[float]] = {name: [] for name in sets}
    for repetition in range(12):
        for name in sets:
            native.set_isa(name)
            started = time.perf_counter()
            for _ in range(calls):
                native.matmul(x, weight, bits, activations=kind)
            if repetition:
                taken[name].append((time.perf_counter() - started) / calls * 1e6)
    return [round(statistics.median(taken[name]), 1) for name in sets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if not native.available():
        raise SystemExit(f"no native kernels: {native.reason()}")
    torch.set_num_threads(1)
    sets = instruction_sets()
    codes = torch.randint(0, 256, (OUT_FEATURES, IN_FEATURES), dtype=torch.uint8)
    scales = torch.rand(OUT_FEATURES, IN_FEATURES // GROUP_SIZE).mul_(0.01).half().float()
    records = []
    for bits in BITS:
        weight = native.pack_slice(codes, scales, bits)
        for kind in KINDS:
            for rows in ROWS:
                taken = microseconds(torch.randn(rows, IN_FEATURES), weight, bits, kind, sets)
                by_set = dict(zip(sets, taken, strict=True))
                records.append({"bits": bits, "activations": kind, "rows": rows, "us": by_set})
                print(bits, kind, rows, by_set, flush=True)
    if arguments.output:
        result = {
            "machine": describe_machine() | {"threads": 1, "native": sets[0]},
            "shape": [OUT_FEATURES, IN_FEATURES],
            "group_size": GROUP_SIZE,
            "records": records,
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
