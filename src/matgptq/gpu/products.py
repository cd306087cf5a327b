"""Products with packed weights on a GPU: how the kernels of ``product_kernels`` and ``unpack_kernel`` are called.

Importing this module imports Triton; ``kernel_choice`` does so when a product needs it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import statistics

import torch
import triton
from torch import Tensor

from matgptq.gpu import product_kernels, unpack_kernel
from matgptq.gpu.layout import BLOCK_ROWS, CHUNK_COLUMNS, GROUP_UNIT, PlaneWeight
from matgptq.gpu.tuning import Launch, Tuner, candidate_launches, default_launch, describe

_DEQUANTIZE_WARPS = 4
_INTERPRETED_PROCESSORS = 1
_MEASUREMENTS = 5
_MOST_COPIES = 64  # of a small weight, when its product is timed
_launches: dict[tuple[int, int, torch.dtype, int], Launch] = {}  # chosen already; asked for with every product


def matmul(
    x: Tensor, weight: PlaneWeight, bits: int, bias: Tensor | None = None, launch: Launch | None = None
) -> Tensor:
    """``x @ w_r^T + bias`` on the tensor cores.

    Args:
        x: float16 or bfloat16 ``[batch, in]`` on the weight's device.
        weight: packed weight that serves ``bits``.
        bits: width, 2..8.
        bias: floating ``[out]`` or None.
        launch: how to cut it; by default the fastest known.

    Returns:
        ``[batch, out]`` in the dtype of ``x``, summed in float32.
    """
    x = x.contiguous()
    out = x.new_empty(len(x), weight.out_features)
    if len(x) == 0:
        return out
    with _on(x.device):
        _launch(x, weight, bits, bias, out, launch or _choose(x, weight, bits, bias))
    return out


def dequantize_blocks(weight: PlaneWeight, bits: int, first: int, out: Tensor) -> None:
    """Fill ``out [rows, in]``, float32, float16 or bfloat16, with weights of one slice from block ``first`` on.

    Formed in float32, where they are exact, and rounded once.
    """
    _, blocks, chunks, _ = weight.planes.shape
    grid = (triton.cdiv(len(out), BLOCK_ROWS), triton.cdiv(chunks, _DEQUANTIZE_WARPS))
    with _on(out.device):
        unpack_kernel.dequantize[grid](
            weight.planes,
            weight.scales[bits],
            out,
            first,
            len(out),
            weight.in_features,
            blocks,
            chunks,
            weight.planes.stride(0),
            BITS=bits,
            RESIDENT=weight.resident,
            GROUP_HALVES=_group_halves(weight),
            UNITS=_DEQUANTIZE_WARPS,
            num_warps=_DEQUANTIZE_WARPS,
            enable_fp_fusion=True,
        )


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1`` when they were imported)."""
    return not isinstance(product_kernels.fused, triton.JITFunction)


def _launch(x: Tensor, weight: PlaneWeight, bits: int, bias: Tensor | None, out: Tensor, launch: Launch) -> None:
    _, blocks, chunks, _ = weight.planes.shape
    grid = launch.grid(weight, len(x))
    parts = math.prod(grid) * launch.blocks * BLOCK_ROWS * 8 * launch.tiles if launch.splits > 1 else 1
    overlaps = x.is_cuda and _overlaps(x.device.index)
    arguments = (
        x,
        weight.planes,
        weight.scales[bits],
        x if bias is None else bias,
        out,
        x.new_empty(parts, dtype=torch.float32),
        weight.arrived,
        weight.out_features,
        weight.in_features,
        len(x),
        blocks,
        chunks,
        weight.planes.stride(0),
        launch.steps(weight),
        launch.splits,
    )
    constants = {
        "BITS": bits,
        "RESIDENT": weight.resident,
        "GROUP_HALVES": _group_halves(weight),
        "BLOCKS": launch.blocks,
        "TILES": launch.tiles,
        "RAGGED": weight.in_features % CHUNK_COLUMNS != 0,
        "BIASED": bias is not None,
        "AHEAD": launch.ahead,
        "OVERLAPS": overlaps,
    }
    options = {"num_warps": launch.warps, "num_stages": launch.stages or 1, "enable_fp_fusion": True}
    if overlaps:
        options["launch_pdl"] = True
    if launch.stages:
        product_kernels.staged[grid](*arguments, **constants, **options)
    else:
        product_kernels.fused[grid](*arguments, UNITS=launch.units, **constants, **options)


@functools.cache
def _overlaps(device: int) -> bool:
    """Whether a kernel may start while the one before it still runs: from compute capability 9.0 on."""
    return not interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)


def _choose(x: Tensor, weight: PlaneWeight, bits: int, bias: Tensor | None) -> Launch:
    key = weight.key, bits, x.dtype, len(x)
    known = _launches.get(key)
    if known is not None:
        return known
    if interpreted():
        return default_launch(weight, len(x), _INTERPRETED_PROCESSORS)
    tuner, processors = _tuner(x.device.index)
    launch = tuner.choose(
        describe(weight, bits, len(x), str(x.dtype)),
        lambda: candidate_launches(weight, len(x), processors),
        lambda candidate: _seconds(x, weight, bits, bias, candidate),
        measure=os.environ.get("MATGPTQ_AUTOTUNE", "1") != "0" and not torch.cuda.is_current_stream_capturing(),
    )
    if launch is None:
        return default_launch(weight, len(x), processors)
    # Measured for a class of batches: the number of counters that this one needs may be another.
    return _launches.setdefault(key, launch.with_splits(weight, len(x), launch.splits))


@functools.cache
def _tuner(device: int) -> tuple[Tuner, int]:
    properties = torch.cuda.get_device_properties(device)
    sources = product_kernels.fused.cache_key[:16] + product_kernels.staged.cache_key[:16]
    version = f"triton {triton.__version__} {sources}"
    return Tuner(version, properties.name), properties.multi_processor_count


def _seconds(x: Tensor, weight: PlaneWeight, bits: int, bias: Tensor | None, launch: Launch) -> float:
    """Time of a launch with a cold cache, as weights are in a model, and close behind another, as in a CUDA graph."""
    out = x.new_empty(len(x), weight.out_features)
    copies = _copies(weight, bits, 2 * torch.cuda.get_device_properties(x.device).L2_cache_size)
    stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(x.device))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    times: list[float] = []
    with torch.cuda.stream(stream):
        try:
            _launch(x, copies[0], bits, bias, out, launch)  # compiles
        except triton.OutOfResources:
            return math.inf
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for copy in copies:
                _launch(x, copy, bits, bias, out, launch)
        for _ in range(_MEASUREMENTS):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / len(copies))
    torch.cuda.current_stream(x.device).wait_stream(stream)
    return statistics.median(times)


def _copies(weight: PlaneWeight, bits: int, total: int) -> list[PlaneWeight]:
    """So many copies that they are about ``total`` bytes; where memory is short, fewer, or the weight itself."""
    copies: list[PlaneWeight] = []
    with contextlib.suppress(torch.OutOfMemoryError):
        for _ in range(min(_MOST_COPIES, max(1, math.ceil(total / weight.bytes_read(bits))))):
            copies.append(weight.copy_of(bits))
    return copies or [weight]


def _group_halves(weight: PlaneWeight) -> int:
    return 0 if weight.group_size == weight.in_features else weight.group_size // GROUP_UNIT


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
