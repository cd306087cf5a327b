"""Native CPU kernels against the bandwidth of memory and against torch.

Batch-1 products with cold weights, interleaved in one run with a pure read of the same number of bytes and with
``torch`` bfloat16, and the solver's column sweep against the arithmetic limit. Medians; compare ratios, not times:

    python benchmarks/cpu_kernels.py [--quick] [--out benchmarks/results/cpu_kernels.json]

"Cold" means that 128 MB of other memory were read since the weight was last used.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from matgptq import native
from matgptq.native import Weight

SHAPES = [(4096, 4096), (11008, 4096), (14336, 4096)]
GROUP_SIZE = 64
SWEEP = (576, 1536, (2, 3, 4, 8))
# Share of the bandwidth of a pure read that int8 activations must reach; exact ones may take 1.5 times that time.
TARGETS = {2: 0.60, 3: 0.75, 4: 0.85, 5: 0.85, 6: 0.85, 7: 0.85, 8: 0.85}


def machine() -> dict[str, object]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    flags: set[str] = set()
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
            elif line.startswith("flags"):
                flags = set(line.split(":", 1)[1].split())
    interesting = ("avx2", "avx512f", "avx512_vnni", "gfni", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "cpu": model,
        "flags": [flag for flag in interesting if flag in flags],
        "isa": native.isa(),
        "torch": torch.__version__,
    }


def seconds(action: Callable[[], object]) -> float:
    # One thread: its own CPU time, which stalls on memory count in but turns of other processes do not.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    action()
    return clock() - start


def huge(nbytes: int) -> Tensor:
    """uint8 buffer aligned to 2 MB and advised for huge pages, as the weights are."""
    page = 2 << 20
    raw = torch.empty(nbytes + page, dtype=torch.uint8)
    begin = -raw.data_ptr() % page
    part = raw[begin : begin + nbytes]
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None:
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        madvise(part.data_ptr(), nbytes // page * page, 14)
    part.fill_(1)
    return part


def bench_products(shape: tuple[int, int], widths: list[int], repeats: int) -> list[dict[str, object]]:
    out_features, in_features = shape
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    scales = (torch.rand(out_features, in_features // GROUP_SIZE) * 0.01).half().float()
    x = torch.randn(1, in_features)
    buffer = huge(256 << 20)
    dense = (torch.randn(shape) * 0.02).to(torch.bfloat16)
    x_bfloat16 = x.to(torch.bfloat16)
    arena = native.Arena()
    parent = native.pack_parent(codes, scales, arena=arena)
    small_parent = native.pack_parent(codes[:16], scales[:16])
    small_dense = dense[:16].clone()
    records: list[dict[str, object]] = []
    cursor = 0
    for bits in widths:
        sliced = native.pack_slice(codes, scales, bits, arena=arena)
        small_slice = native.pack_slice(codes[:16], scales[:16], bits)
        times: dict[str, list[float]] = {}
        for _ in range(repeats):
            for form, weight in (("packed", sliced), ("resident", parent)):
                nbytes = weight.bytes_read(bits) // 4096 * 4096
                if cursor + nbytes > buffer.numel():
                    cursor = 0
                flush = buffer.numel() // 2
                # A small product just before each timed one: in a model the layer before has left code, interpreter
                # and x in cache, and only the weights are cold.
                small_weight = small_parent if form == "resident" else small_slice
                actions: dict[str, Callable[[Weight, Tensor, Tensor], object]] = {
                    f"{form} read": lambda _w, _d, memory: native.read(memory),
                    f"{form} int8": lambda w, _d, _m, r=bits: native.matmul(x, w, r, activations="int8"),
                    f"{form} exact": lambda w, _d, _m, r=bits: native.matmul(x, w, r),
                }
                if form == "packed":
                    actions["torch bfloat16"] = lambda _w, d, _m: torch.nn.functional.linear(x_bfloat16, d)
                for name, action in actions.items():
                    start = (cursor + nbytes) % flush // 4096 * 4096
                    native.read(buffer[start : start + flush])
                    action(small_weight, small_dense, buffer[start : start + 4096])
                    elapsed = seconds(partial(action, weight, dense, buffer[cursor : cursor + nbytes]))
                    times.setdefault(name, []).append(elapsed)
                cursor += nbytes
        median = {name: statistics.median(values) for name, values in times.items()}
        for form, weight in (("packed", sliced), ("resident", parent)):
            nbytes = weight.bytes_read(bits)
            read_time = median[f"{form} read"]
            int8_time, exact_time = median[f"{form} int8"], median[f"{form} exact"]
            records.append(
                {
                    "out_features": out_features,
                    "in_features": in_features,
                    "group_size": GROUP_SIZE,
                    "bits": bits,
                    "form": form,
                    "threads": torch.get_num_threads(),
                    "bytes": nbytes,
                    "bytes_of_the_slice": sliced.bytes_read(bits),
                    "read_gb_per_s": round(nbytes / read_time / 1e9, 2),
                    "int8_us": round(int8_time * 1e6, 1),
                    "exact_us": round(exact_time * 1e6, 1),
                    "int8_bandwidth_share": round(read_time / int8_time, 3),
                    "exact_bandwidth_share": round(read_time / exact_time, 3),
                    "int8_share_by_slice_bytes": round(read_time / int8_time * sliced.bytes_read(bits) / nbytes, 3),
                    "target_share": TARGETS[bits],
                    "torch_bfloat16_us": round(median["torch bfloat16"] * 1e6, 1),
                    "int8_speedup_over_torch_bfloat16": round(median["torch bfloat16"] / int8_time, 2),
                }
            )
    return records


def bench_sweep(repeats: int) -> list[dict[str, object]]:
    rows, in_features, widths = SWEEP
    groups = in_features // GROUP_SIZE
    base = torch.randn(len(widths), rows, in_features)
    coupling = torch.randn(in_features, in_features) * 0.03
    scales = torch.rand(len(widths), rows, groups) * 0.004 + 0.006
    group_of = torch.arange(in_features, dtype=torch.int32) // GROUP_SIZE
    lambdas = [2.0**bits for bits in widths]
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    times: dict[str, list[float]] = {}
    for _ in range(repeats):
        times.setdefault("torch", []).append(seconds(lambda: a @ b))
        for mode in ("residual", "change", "mean"):
            copies = base[:1] if mode == "mean" else base
            times.setdefault(mode, []).append(
                seconds(lambda m=mode, c=copies: native.sweep(c, coupling, scales, group_of, widths, lambdas, mode=m))
            )
    gemm = 1536**3 / statistics.median(times["torch"])
    records: list[dict[str, object]] = []
    for mode in ("residual", "change", "mean"):
        median = statistics.median(times[mode])
        work = (1 if mode == "mean" else len(widths)) * rows * in_features * (in_features - 1) / 2
        records.append(
            {
                "rows": rows,
                "in_features": in_features,
                "widths": list(widths),
                "mode": mode,
                "threads": torch.get_num_threads(),
                "ms": round(median * 1e3, 1),
                "gfma_per_s": round(work / median / 1e9, 1),
                "share_of_torch_float32_gemm_rate": round(work / median / gemm, 2),
            }
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, few repetitions")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_kernels.json")
    arguments = parser.parse_args()
    if not native.available():
        raise SystemExit(f"no native kernels: {native.reason()}")
    torch.manual_seed(0)
    result: dict[str, object] = {
        "machine": machine(),
        "clock": "1 thread: CPU time of the thread; 2 threads: wall clock; medians of interleaved repetitions",
    }
    print(f"{result['machine']}")
    products: list[dict[str, object]] = []
    sweeps: list[dict[str, object]] = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        print(f"\n{threads} thread(s), batch 1, cold weights, group {GROUP_SIZE}; share = time of a pure read / time")
        print("shape        bits form      read GB/s   int8 us  share (target)   exact us  share   x torch bf16")
        shapes = SHAPES[:1] if arguments.quick else SHAPES
        widths = [2, 3, 4, 6, 8]
        for shape in shapes:
            for record in bench_products(shape, widths, 5 if arguments.quick else 31):
                products.append(record)
                print(
                    f"{shape[0]:5}x{shape[1]} {record['bits']:5} {record['form']:9} {record['read_gb_per_s']:8} "
                    f"{record['int8_us']:10} {record['int8_bandwidth_share']:6} ({record['target_share']:.2f}) "
                    f"{record['exact_us']:12} {record['exact_bandwidth_share']:6} "
                    f"{record['int8_speedup_over_torch_bfloat16']:9}"
                )
        for record in bench_sweep(3 if arguments.quick else 7):
            sweeps.append(record)
            print(
                f"sweep {record['mode']:8} rows {record['rows']} in {record['in_features']} widths {record['widths']}: "
                f"{record['ms']} ms, {record['gfma_per_s']} G multiply-adds/s, "
                f"{record['share_of_torch_float32_gemm_rate']} of torch's float32 GEMM rate"
            )
    result["products"] = products
    result["sweep"] = sweeps
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
