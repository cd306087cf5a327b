"""Check and time the Triton kernels on a GPU, beside float16 ``torch.matmul`` in the same run.

    python benchmarks/gpu.py -o benchmarks/results/gpu.json      # a GPU of compute capability 8.0 or more; < 8 minutes
    TRITON_INTERPRET=1 python benchmarks/gpu.py --check          # no GPU: the same code on tiny shapes, no times

First every kind of kernel is compared with a float64 product, in as many processes as there are cores: most of the time
is compilation, which the cache on disk keeps. Then products are timed with cold weights: a timing goes through many
copies of a layer, so that the cache has forgotten a copy when its turn comes again, and is recorded as a CUDA graph, so
that no time is spent between launches; the graphs take turns, and medians are reported. Bandwidth is the copy bandwidth
of the card, measured first, bytes read plus written. The solver's sweep is timed against PyTorch's.

Work that does not fit into ``--minutes`` is left out and named.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from torch import Tensor

from matgptq.core.sweep import SweepGrid, compensate, compensation_coupling, descend, descent_coupling
from matgptq.gpu import layout as gpu_layout
from matgptq.gpu import support as gpu_support
from matgptq.gpu.layout import PlaneWeight
from matgptq.gpu.tuning import candidate_launches
from matgptq.kernels import kernel_choice
from matgptq.nested_weight import NestedWeight
from matgptq.slicing import WIDTHS

GROUP_SIZE = 64
ROUNDS = 7
# The figures to reach at batch 1: over float16, and the share of the copy bandwidth.
SPEEDUPS = {2: 4.45, 3: 4.03, 4: 3.23, 6: 2.35, 8: 1.89}
BANDWIDTH_SHARE = {4: 0.7, 5: 0.7, 6: 0.7, 7: 0.7, 8: 0.7}
NEVER_SLOWER = 64  # up to this batch
TOLERANCE = {torch.float16: 2**-10, torch.bfloat16: 2**-7}


@dataclass(frozen=True)
class Plan:
    """What is measured; the tiny one only shows that everything runs."""

    shapes: tuple[tuple[int, int], ...]
    decoding: tuple[int, ...]  # widths at batch 1, both forms
    batched: tuple[int, ...]  # widths at the other batches, the parent
    batches: tuple[int, ...]
    sweep: tuple[int, int]  # rows, columns
    cold_bytes: int  # read between two uses of the same weights: several times any cache

    def points(self) -> Iterator[tuple[int, bool, int]]:
        """Width, whether of a resident parent, and batch of every measurement."""
        for bits, resident in itertools.product(self.decoding, (True, False)):
            if bits < 8 or resident:  # at 8 bits the two forms are the same
                yield bits, resident, 1
        for bits, batch in itertools.product(self.batched, self.batches):
            yield bits, True, batch


FULL = Plan(
    ((4096, 4096), (14336, 4096), (11008, 4096)),
    (4, 2, 8, 3, 6, 5, 7),
    (4, 8, 2),
    (64, 32, 16, 8, 2, 4, 128, 256, 1024, 4096),
    (4096, 4096),
    256 << 20,
)
TINY = Plan(((80, 128),), (2, 8), (3,), (9, 18), (3, 6), 1)


class Clock:
    """How long there is left."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes
        self.left_out: list[str] = []

    def allows(self, what: str) -> bool:
        if time.monotonic() < self._end:
            return True
        self.left_out.append(what)
        return False


def on_tensor_cores(x: Tensor, weight: PlaneWeight, bits: int) -> Tensor:
    from matgptq.gpu import products as gpu_products

    return gpu_products.matmul(x, weight, bits)


def by_tiles(x: Tensor, weight: PlaneWeight, bits: int) -> Tensor:
    kernel = next(kernel for kernel in kernel_choice.KERNELS if kernel.name == "triton-tiled")
    return kernel.run(x, weight, bits, None, "exact")


def random_weight(out_features: int, in_features: int, group_size: int, device: str) -> NestedWeight:
    codes = torch.randint(0, 256, (out_features, in_features), dtype=torch.uint8, device=device)
    scales = torch.randn(out_features, in_features // group_size, device=device) * 2**-7
    return NestedWeight(codes, {8: scales.bfloat16().half()})


def pack(weight: NestedWeight, bits: int | None) -> PlaneWeight:
    scale = weight.scales[8]
    if bits is None:
        return gpu_layout.pack_parent(weight.codes, dict.fromkeys(WIDTHS, scale))
    return gpu_layout.pack_slice(weight.codes, scale, bits)


def check_products(index: int, bits: int, dtype: torch.dtype, resident: bool, tiny: bool, device: str) -> int:
    """Compare products of one kind with float64; returns how many. Raises where one is off."""
    os.environ["MATGPTQ_AUTOTUNE"] = "0"  # the launches that reasoning gives; measuring comes later
    count = 0
    in_features, group_size = ((160, 32), (1024, 128), (576, 64), (992, 992))[index % (1 if tiny else 4)]
    weight = random_weight(130 if tiny else 1000, in_features, group_size, device)
    packed = pack(weight, None if resident else bits)
    dense = weight.dequantize(bits).double()
    # Together the two dtypes take every class of launches; each costs a compilation.
    batches = (1, 9) if tiny else (1, 17, 200) if dtype == torch.float16 else (3, 16, 64)
    for batch in batches:
        x = torch.randn(batch, in_features, device=device).to(dtype)
        bound = x.double().abs() @ dense.abs().T * TOLERANCE[dtype]
        for name, product in (("fused", on_tensor_cores), ("tiled", by_tiles)):
            result = product(x, packed, bits)
            # Tiles, and fused products of many rows, round the weights as well, as the reference does.
            slack = bound if name == "fused" and batch <= 16 else 2 * bound
            off = (result.double() - x.double() @ dense.T).abs()
            what = f"{bits} bits, {dtype}, batch {batch}, {in_features} columns, group {group_size}"
            if not bool((off <= slack + 1e-30).all()):
                raise SystemExit(f"{name} is wrong: {what}")
            if name == "fused" and not torch.equal(result, product(x, packed, bits)):
                raise SystemExit(f"{name} gives two results: {what}")
            count += 1
    if bool(packed.arrived.any()):
        raise SystemExit(f"counters are left behind: {bits} bits, {dtype}")
    os.environ["MATGPTQ_AUTOTUNE"] = "1"
    return count


def compile_products(bits: int, resident: bool, batch: int, device: str) -> int:
    """Compile what ``bench_products`` will measure; returns how many kernels."""
    from matgptq.gpu import products as gpu_products

    weight = random_weight(256, 1024, GROUP_SIZE, device)
    packed = pack(weight, None if resident else bits)
    x = torch.randn(batch, 1024, device=device).half()
    # The number of splits is no constant of a kernel.
    launches = {dataclasses.replace(launch, splits=1) for launch in candidate_launches(packed, batch, 1)}
    for launch in launches:
        gpu_products.matmul(x, packed, bits, None, launch)
    return len(launches)


def in_processes(function: Callable[..., int], arguments: list[tuple[Any, ...]], jobs: int) -> int:
    """The sum of a function's results, each call in one of so many processes."""
    if jobs == 1:
        return sum(function(*each) for each in arguments)
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return sum(pool.starmap(function, arguments, chunksize=1))


def sweep_problem(rows: int, columns: int, device: str) -> tuple[Tensor, Tensor, SweepGrid]:
    """A weight ``[columns, rows]``, a Hessian and a grid of the four default widths."""
    widths = (2, 3, 4, 8)
    inputs = torch.randn(2 * columns, columns, device=device)
    hessian = inputs.T @ inputs / len(inputs) + 0.01 * torch.eye(columns, device=device)
    weight = torch.randn(columns, rows, device=device) * 0.02
    groups = -(-columns // GROUP_SIZE)
    scales = (0.8 + 0.4 * torch.rand(groups, len(widths), rows, device=device)) * 2**-11
    group_of = (torch.arange(columns) // GROUP_SIZE).tolist()
    return weight, hessian, SweepGrid(scales, group_of, widths, tuple(float(2**bits) for bits in widths))


def sweeps(problem: tuple[Tensor, Tensor, SweepGrid], engine: str) -> dict[str, Callable[[], Tensor]]:
    weight, hessian, grid = problem
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian)).mH.contiguous()
    current = torch.zeros(len(weight), grid.copies * weight.shape[1], device=weight.device)
    steps = (hessian @ weight / hessian.diagonal().unsqueeze(1)).unsqueeze(1).expand(-1, grid.copies, -1)
    steps = steps.reshape(current.shape)
    compensation, descent = compensation_coupling(upper), descent_coupling(hessian)

    def run(action: Callable[[], Tensor]) -> Tensor:
        os.environ["MATGPTQ_SOLVER"] = engine
        return action()

    return {
        "compensate": lambda: run(lambda: compensate(weight, compensation, grid)),
        "descend": lambda: run(lambda: descend(current, steps.clone(), descent, grid)),
    }


def bench_sweep(plan: Plan, device: str) -> list[dict[str, Any]]:
    """Time of both halves of the sweep with the kernel and with PyTorch, and how many codes are the same."""
    rows, columns = plan.sweep
    problem = sweep_problem(rows, columns, device)
    ours, theirs = sweeps(problem, "triton"), sweeps(problem, "torch")
    records = []
    for half in ours:
        codes = {"triton": ours[half](), "torch": theirs[half]()}  # compiles, warms up
        same = float((codes["triton"] == codes["torch"]).double().mean())
        if same < 0.9:  # a tie that goes the other way changes everything behind it in its row
            raise SystemExit(f"the sweep's codes are not PyTorch's: {half}, {same:.1%} the same")
        record: dict[str, Any] = {"half": half, "rows": rows, "in_features": columns, "widths": [2, 3, 4, 8]}
        record["same_codes"] = same
        for engine, actions in (("triton", ours), ("torch", theirs)):
            seconds = []
            for _ in range(3 if engine == "triton" else 1):
                synchronize(device)
                started = time.perf_counter()
                actions[half]()
                synchronize(device)
                seconds.append(time.perf_counter() - started)
            record[f"{engine}_milliseconds"] = statistics.median(seconds) * 1e3
        record["ratio"] = record["torch_milliseconds"] / record["triton_milliseconds"]
        records.append(record)
    os.environ.pop("MATGPTQ_SOLVER")
    return records


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read plus written: by the driver or by a kernel, whichever is faster."""
    source = torch.randint(1 << 31, (1 << 28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    for way in ways:
        way()
    return 2 * source.nbytes / min(statistics.median(elapsed(way) for _ in range(2 * ROUNDS)) for way in ways)


def record(action: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """An action as a graph; it has run before, so that nothing is compiled or measured while recording."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        action()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def elapsed(action: Callable[[], Any]) -> float:
    """Seconds on the GPU."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    action()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3


def in_turns(contestants: dict[str, list[Callable[[], Any]]], device: str) -> dict[str, float]:
    """Seconds of one call of each contestant, a list of calls that use different copies of a layer."""
    if device == "cpu":
        return {name: [call() for call in calls] and 1.0 for name, calls in contestants.items()}
    graphs = {name: record(lambda calls=calls: [call() for call in calls]) for name, calls in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            seconds[name].append(elapsed(graph.replay) / len(contestants[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def bench_products(plan: Plan, device: str, bandwidth: float, clock: Clock) -> Iterator[dict[str, Any]]:
    """Products of every shape, width, form and batch beside float16."""
    for shape in plan.shapes:
        out_features, in_features = shape
        weight = random_weight(*shape, GROUP_SIZE, device)
        dense_bytes = 2 * weight.codes.numel()
        dense = [torch.randn(shape, device=device).half() for _ in range(-(-plan.cold_bytes // dense_bytes))]
        for bits, resident, batch in plan.points():
            if not clock.allows(f"{out_features} x {in_features}, {bits} bits, batch {batch}"):
                continue
            form = "parent" if resident else "slice"
            packed = pack(weight, None if resident else bits)
            weights = [packed.copy_of(bits) for _ in range(math.ceil(plan.cold_bytes / packed.bytes_read(bits)))]
            x = torch.randn(batch, in_features, device=device).half()
            contestants = {"float16": [partial(torch.matmul, x, each.T) for each in dense]}
            for name, product in (("triton-fused", on_tensor_cores), ("triton-tiled", by_tiles)):
                # Beyond the reach of one and below that of the other there is nothing to learn.
                if plan is FULL and (batch > 1024 if name == "triton-fused" else batch < 128):
                    continue
                product(x, weights[0], bits)  # compiled and tuned before anything is recorded
                some = weights if batch <= 64 else weights[:8]
                contestants[name] = [partial(product, x, each, bits) for each in some]
            seconds = in_turns(contestants, device)
            for kernel, spent in seconds.items():
                if kernel == "float16":
                    continue
                read = packed.bytes_read(bits)
                yield {
                    "out_features": out_features,
                    "in_features": in_features,
                    "group_size": GROUP_SIZE,
                    "bits": bits,
                    "form": form,
                    "kernel": kernel,
                    "batch": batch,
                    "microseconds": spent * 1e6,
                    "float16_microseconds": seconds["float16"] * 1e6,
                    "speedup": seconds["float16"] / spent,
                    "bytes_read": read,
                    "bandwidth_share": read / spent / bandwidth,
                }


def misses(products: list[dict[str, Any]]) -> list[str]:
    """The figures to reach that were not reached, by the better kernel of each form."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for each in products:
        key = each["out_features"], each["bits"], each["form"], each["batch"]
        if key not in best or each["microseconds"] < best[key]["microseconds"]:
            best[key] = each
    missed = []
    for (rows, bits, form, batch), each in sorted(best.items()):
        where = f"{rows} rows, {bits} bits, {form}, batch {batch}"
        if batch == 1 and each["bandwidth_share"] < BANDWIDTH_SHARE.get(bits, 0):
            missed.append(
                f"{where}: {each['bandwidth_share']:.0%} of the copy bandwidth, not {BANDWIDTH_SHARE[bits]:.0%}"
            )
        if batch == 1 and each["speedup"] < SPEEDUPS.get(bits, 0):
            missed.append(f"{where}: {each['speedup']:.2f} x float16, not {SPEEDUPS[bits]}")
        if batch <= NEVER_SLOWER and each["speedup"] < 1:
            missed.append(f"{where}: slower than float16 ({each['speedup']:.2f} x)")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="tiny shapes, no times; needs no GPU")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    clock = Clock(arguments.minutes)
    device = "cpu" if arguments.check and not torch.cuda.is_available() else "cuda"
    obstacle = gpu_support.obstacle(device)
    if obstacle is not None:
        raise SystemExit(
            f"this benchmark needs a GPU of compute capability 8.0 or more and triton: {obstacle}\n"
            "without one, TRITON_INTERPRET=1 python benchmarks/gpu.py --check runs it on tiny shapes"
        )
    torch.manual_seed(0)
    plan = TINY if arguments.check else FULL
    jobs = (os.cpu_count() or 1) if device == "cuda" else 1
    kinds = itertools.product(
        TINY.decoding if arguments.check else WIDTHS, (torch.float16, torch.bfloat16), (True, False)
    )
    checks = [
        (index, *kind, arguments.check, device)
        for index, kind in enumerate(kinds)
        if kind[1:] != (torch.bfloat16, False)
    ]
    print(f"{in_processes(check_products, checks, jobs)} products agree with float64", flush=True)
    if not arguments.check:
        classes = {(bits, resident, min(batch, 256)) for bits, resident, batch in plan.points() if batch <= 1024}
        compiled = in_processes(compile_products, [(*each, device) for each in sorted(classes)], jobs)
        print(f"{compiled} kernels compiled", flush=True)
    bandwidth = 1.0 if arguments.check else copy_bandwidth()
    machine = {**describe_machine(), "triton": version("triton")}
    if not arguments.check:
        print(f"{machine['gpu']}: copies at {bandwidth / 1e9:.0f} GB/s")
    products = []
    for made in bench_products(plan, device, bandwidth, clock):
        products.append(made)
        if not arguments.check:
            print(
                f"{made['out_features']:6} x {made['in_features']} {made['bits']} bits {made['form']:6} "
                f"{made['kernel']} batch {made['batch']:4}: {made['microseconds']:8.1f} us, "
                f"float16 {made['float16_microseconds']:8.1f} us, {made['speedup']:5.2f} x, "
                f"{made['bandwidth_share']:4.0%} of bandwidth",
                flush=True,
            )
    solved = bench_sweep(plan, device) if clock.allows("the sweep") else []
    for made in solved:
        times = f"{made['triton_milliseconds']:.1f} ms, PyTorch's {made['torch_milliseconds']:.0f} ms"
        print(
            f"sweep, {made['half']}: {made['same_codes']:.1%} of the codes the same",
            *[] if arguments.check else [times],
        )
    missed = misses(products)
    if arguments.check:
        print(f"{len(products)} timings ran; in the interpreter they mean nothing")
        return
    print("\n".join(["not reached:", *missed] if missed else ["all figures reached"]))
    if clock.left_out:
        print("no time left for:", *clock.left_out, sep="\n  ")
    if arguments.output:
        result = {
            "machine": machine,
            "copy_gb_per_s": bandwidth / 1e9,
            "products": products,
            "sweep": solved,
            "missed": missed,
            "left_out": clock.left_out,
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
