"""The native kernels against ``slicing.py`` and plain torch."""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from threading import Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from matgptq import native, slicing
from matgptq.errors import ConfigurationError
from matgptq.native.library import DTYPES, Product, SweepJob, require_library

needs_library = pytest.mark.skipif(not native.available(), reason=f"native kernels: {native.reason()}")

BATCHES = [*range(18), 31, 33, 64]
MODES: tuple[native.SweepMode, ...] = ("residual", "change", "mean")


@pytest.fixture(params=["amx", "avx512", "avx_vnni", "avx2", "neon_dot", "neon", "scalar"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = native.isa()
    try:
        native.set_isa(request.param)
    except ConfigurationError:
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    native.set_isa(best)


def make_weight(
    out_features: int, in_features: int, groups: int, seed: int = 0, *, half: bool = False
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (out_features, in_features), dtype=torch.uint8, generator=generator)
    scales = torch.randn(out_features, groups, generator=generator) * 0.01
    scales[0, 0] = 0
    return codes, scales.half().float() if half else scales


def assert_product(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    """Within a few roundings of float32 per sum, measured by the sum of magnitudes, and that of the result."""
    exact = x.double() @ w.double().T
    magnitude = x.double().abs() @ w.double().abs().T
    if bias is not None:
        exact += bias.double()
    assert ((y.double() - exact).abs() <= 2e-6 * magnitude + 2**-24 * exact.abs() + 1e-7).all()


def fake_int8(x: Tensor, block: int) -> Tensor:
    """What int8 activations stand for, in plain torch."""
    out = x.clone()
    for begin in range(0, x.shape[1], block):
        part = x[:, begin : begin + block]
        amax = part.abs().amax(dim=1, keepdim=True)
        inverse = torch.full_like(amax, 127) / amax  # 127 / amax would be rounded twice: torch takes the reciprocal
        out[:, begin : begin + block] = (part * inverse).round() * (amax / 127)
    return out


def test_import_loads_nothing() -> None:
    program = "from matgptq.native.library import load_library; assert load_library.cache_info().currsize == 0"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_library_says_so() -> None:
    program = (
        "import torch; from matgptq import native\n"
        "assert not native.available() and 'cannot be loaded' in native.reason(), native.reason()\n"
        "try: native.isa()\n"
        "except native.NativeUnavailableError: pass\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, env={**os.environ, "MATGPTQ_NATIVE_LIBRARY": "/missing.so"}
    )


@needs_library
@pytest.mark.parametrize("bits", slicing.WIDTHS)
@pytest.mark.parametrize("resident", [True, False])
def test_every_code_at_every_width(isa: str, bits: int, resident: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64).repeat(5, 1)
    scales = torch.full((20, 1), 0.5)
    weight = native.pack_parent(codes, scales) if resident else native.pack_slice(codes, scales, bits)
    for dtype in (torch.float32, torch.bfloat16):
        expected = slicing.dequantize(codes, scales, bits, dtype)
        assert torch.equal(native.dequantize_rows(weight, bits, dtype=dtype), expected)
    # One-hot activations read single weights back through the product kernels, with and without rounding them.
    expected = slicing.dequantize(codes, scales, bits)
    assert torch.equal(native.matmul(torch.eye(64), weight, bits).T, expected)
    assert torch.equal(torch.stack([native.matmul(row, weight, bits) for row in torch.eye(64)]).T, expected)
    assert torch.allclose(native.matmul(torch.eye(64), weight, bits, activations="int8").T, expected, rtol=1e-6)


@needs_library
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches(batch: int, dtype: torch.dtype) -> None:
    codes, scales = make_weight(70, 192, 3)
    weight = native.pack_parent(codes, scales)
    x = torch.randn(batch, 192).to(dtype)
    bias = torch.randn(70)
    for bits in slicing.WIDTHS:
        y = native.matmul(x, weight, bits, bias)
        assert y.dtype == dtype
        assert y.shape == (batch, 70)
        w = slicing.dequantize(codes, scales, bits)
        if dtype == torch.float32:
            assert_product(y, x, w, bias)
        else:
            exact = native.matmul(x.float(), weight, bits, bias)
            assert torch.equal(y, exact.to(torch.bfloat16))


@needs_library
@pytest.mark.parametrize(("in_features", "groups"), [(192, 6), (192, 3), (256, 2), (288, 3), (45, 1), (301, 1)])
def test_one_row(isa: str, in_features: int, groups: int) -> None:
    # Tiles of 16 rows are taken in pairs; every way to have one left over, and rows that are padding.
    for out_features in (1, 16, 31, 33, 48, 79, 96):
        codes, scales = make_weight(out_features, in_features, groups, out_features)
        parent = native.pack_parent(codes, scales)
        x = torch.randn(1, in_features)
        for bits in slicing.WIDTHS:
            w = slicing.dequantize(codes, scales, bits)
            assert_product(native.matmul(x, parent, bits), x, w)
            assert_product(native.matmul(x, native.pack_slice(codes, scales, bits)), x, w)


@needs_library
@settings(max_examples=60, deadline=None)
@given(
    out_features=st.integers(1, 70),
    layout=st.one_of(
        st.tuples(st.integers(1, 200), st.just(1)),
        st.tuples(st.sampled_from([32, 64, 128, 96]), st.integers(1, 4)),
    ),
    bits=st.sampled_from(slicing.WIDTHS),
    batch=st.integers(0, 19),
    resident=st.booleans(),
    half=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_ragged_shapes(
    out_features: int,
    layout: tuple[int, int],
    bits: int,
    batch: int,
    resident: bool,
    half: bool,
    threads: int,
    seed: int,
) -> None:
    group_size, groups = layout
    in_features = group_size * groups
    codes, scales = make_weight(out_features, in_features, groups, seed, half=half)
    weight = native.pack_parent(codes, scales) if resident else native.pack_slice(codes, scales, bits)
    w = slicing.dequantize(codes, scales, bits)
    assert torch.equal(native.dequantize_rows(weight, bits, num_threads=threads), w)
    first = out_features // 3
    assert torch.equal(native.dequantize_rows(weight, bits, first, out_features, num_threads=threads), w[first:])
    x = torch.randn(batch, in_features, generator=torch.Generator().manual_seed(seed))
    assert_product(native.matmul(x, weight, bits, num_threads=threads), x, w)
    block = 128 if groups == 1 else max(b for b in (32, 64, 128) if group_size % b == 0)
    y = native.matmul(x, weight, bits, activations="int8", num_threads=threads)
    rounded = fake_int8(x, block)
    exact = rounded.double() @ w.double().T
    assert ((y - exact).abs() <= 3e-6 * (rounded.double().abs() @ w.double().abs().T) + 1e-6).all()


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("bits", slicing.WIDTHS)
def test_results_are_the_same_on_every_instruction_set(
    isa: str, bits: int, activations: native.Activations, dtype: torch.dtype
) -> None:
    codes, scales = make_weight(48, 256, 4)
    x = torch.randn(5, 256).to(dtype)
    parent = native.matmul(x, native.pack_parent(codes, scales), bits, activations=activations)
    packed = native.matmul(x, native.pack_slice(codes, scales, bits), activations=activations)
    native.set_isa("scalar")
    reference = native.matmul(x, native.pack_parent(codes, scales), bits, activations=activations)
    assert torch.equal(parent, packed)
    assert torch.equal(parent, reference)


@needs_library
@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_activations_propagate(isa: str, activations: native.Activations, bad: float) -> None:
    codes, scales = make_weight(33, 128, 2)
    weight = native.pack_parent(codes, scales)
    for bits in slicing.WIDTHS:
        x = torch.ones(3, 128)
        x[1, 70] = bad
        y = native.matmul(x, weight, bits, activations=activations)
        expected = x @ slicing.dequantize(codes, scales, bits).T
        assert torch.isfinite(y[[0, 2]]).all()
        torch.testing.assert_close(y[1], expected[1], equal_nan=True)
        alone = native.matmul(x[1], weight, bits, activations=activations)
        torch.testing.assert_close(alone, expected[1], equal_nan=True)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unaligned_and_strided_inputs(isa: str, dtype: torch.dtype) -> None:
    codes, scales = make_weight(20, 64, 2)
    weight = native.pack_parent(codes, scales)
    buffer = torch.randn(4 * 67 + 1).to(dtype)
    shifted = torch.frombuffer(
        bytearray(3) + bytes(buffer.untyped_storage()), dtype=torch.uint8
    )  # a pointer of odd alignment
    address = shifted.data_ptr() + 3
    aligned = buffer[: 4 * 67].view(4, 67)[:, 1:65]
    assert aligned.data_ptr() % 64 != 0
    expected = native.matmul(aligned.contiguous(), weight, 3)
    assert torch.equal(native.matmul(aligned, weight, 3), expected)
    transposed = aligned.T.contiguous().T
    assert torch.equal(native.matmul(transposed, weight, 3), expected)
    y = torch.empty(4, 20, dtype=dtype)
    product = (Product * 1)()
    product[0].weight, product[0].bits, product[0].y, product[0].y_stride = weight._handle, 3, y.data_ptr(), 20
    code = DTYPES[dtype]
    start = address + aligned.storage_offset() * buffer.element_size()
    assert start % 2 == 1
    status = require_library().matgptq_matmul(start, code, 67, 4, 64, product, 1, code, 0, 1)
    assert status == 0
    assert torch.equal(y, expected)


@needs_library
def test_leading_shapes() -> None:
    codes, scales = make_weight(10, 64, 1)
    weight = native.pack_slice(codes, scales, 4)
    for shape in [(64,), (2, 3, 64), (0, 64), (2, 0, 64), (1, 1, 1, 64)]:
        x = torch.randn(shape)
        y = native.matmul(x, weight)
        assert y.shape == (*shape[:-1], 10)
        torch.testing.assert_close(y, x @ slicing.dequantize(codes, scales, 4).T, rtol=1e-4, atol=1e-5)


@needs_library
@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_weights_that_share_an_input(activations: native.Activations) -> None:
    arena = native.Arena()
    parts = [make_weight(out, 256, groups, seed) for seed, (out, groups) in enumerate([(40, 4), (17, 2), (90, 1)])]
    weights = [native.pack_parent(codes, scales, arena=arena) for codes, scales in parts]
    assert arena.nbytes == sum((weight.nbytes + 63) // 64 * 64 for weight in weights)
    del arena
    gc.collect()
    biases = [None, torch.randn(17), None]
    widths = [2, 8, 5]
    for batch in (1, 3):
        x = torch.randn(batch, 256)
        together = native.matmul_many(x, weights, widths, biases, activations=activations, num_threads=3)
        for y, weight, bits, bias in zip(together, weights, widths, biases, strict=True):
            assert torch.equal(y, native.matmul(x, weight, bits, bias, activations=activations, num_threads=1))


@needs_library
def test_scales_per_width() -> None:
    codes, shared = make_weight(32, 128, 2)
    per_width = {2: shared * 1.5, 4: shared, 8: shared.half().float()}
    weight = native.pack_parent(codes, per_width)
    assert weight.widths == (2, 4, 8)
    for bits, scales in per_width.items():
        assert torch.equal(native.dequantize_rows(weight, bits), slicing.dequantize(codes, scales, bits))
    with pytest.raises(ConfigurationError, match="one of"):
        native.matmul(torch.randn(1, 128), weight, 3)
    with pytest.raises(ConfigurationError, match="bits is needed"):
        native.matmul(torch.randn(1, 128), weight)


@needs_library
def test_bytes() -> None:
    codes, scales = make_weight(64, 256, 4, half=True)
    parent = native.pack_parent(codes, scales)
    scale_bytes = 64 * 4 * 2
    assert [parent.bytes_read(r) for r in (2, 4, 8)] == [64 * 32 * p + scale_bytes for p in (3, 5, 8)]
    for bits in slicing.WIDTHS:
        assert native.pack_slice(codes, scales, bits).bytes_read() == 64 * 32 * bits + scale_bytes


@needs_library
def test_refusals() -> None:
    codes, scales = make_weight(8, 64, 2)
    weight = native.pack_slice(codes, scales, 4)
    with pytest.raises(ConfigurationError, match="float32 or torch"):
        native.matmul(torch.randn(1, 64).half(), weight)
    with pytest.raises(ConfigurationError, match="63 features"):
        native.matmul(torch.randn(1, 63), weight)
    with pytest.raises(ConfigurationError, match="num_threads"):
        native.matmul(torch.randn(1, 64), weight, num_threads=0)
    with pytest.raises(ConfigurationError, match="activations"):
        native.matmul(torch.randn(1, 64), weight, activations="int4")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="bias"):
        native.matmul(torch.randn(1, 64), weight, bias=torch.randn(7))
    with pytest.raises(ConfigurationError, match="group_size 16"):
        native.pack_parent(codes, torch.ones(8, 4))
    with pytest.raises(ConfigurationError, match="do not divide"):
        native.pack_parent(codes, torch.ones(8, 3))
    with pytest.raises(ConfigurationError, match="uint8"):
        native.pack_parent(codes.int(), scales)
    with pytest.raises(ConfigurationError, match="rows"):
        native.dequantize_rows(weight, 4, 3, 9)
    with pytest.raises(ConfigurationError, match="out must"):
        native.dequantize_rows(weight, 4, out=torch.empty(3, 64))


def _product_in_child(expected: Tensor, queue: multiprocessing.Queue[bool]) -> None:
    codes, scales = make_weight(300, 512, 4)
    y = native.matmul(torch.ones(4, 512), native.pack_parent(codes, scales), 4, num_threads=3)
    queue.put(torch.equal(y, expected))


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_threads_after_fork() -> None:
    codes, scales = make_weight(300, 512, 4)
    expected = native.matmul(torch.ones(4, 512), native.pack_parent(codes, scales), 4, num_threads=3)
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[bool] = context.Queue()
    child = context.Process(target=_product_in_child, args=(expected, queue))
    child.start()
    assert queue.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0


# ---- the column sweep ----------------------------------------------------------------------------------------------


def sweep_costs(x: Tensor, scale: Tensor, widths: tuple[int, ...], weights: Tensor) -> Tensor:
    """``[rows, 256]`` objective of every code, in float64. x, scale: ``[R, rows]``."""
    levels = torch.stack([slicing.level_table(bits) for bits in widths]).double()  # [R, 256]
    error = x.double().unsqueeze(-1) - scale.double().unsqueeze(-1) * levels.unsqueeze(1)  # [R, rows, 256]
    return (weights.double().view(-1, 1, 1) * error**2).sum(0)


def check_sweep(
    rows: int,
    in_features: int,
    groups: int,
    widths: tuple[int, ...],
    mode: native.SweepMode,
    seed: int,
    *,
    with_trail: bool,
    threads: int,
) -> None:
    """Follow the kernel's codes with a full scan at each column; they may differ from the scan's at near ties only."""
    generator = torch.Generator().manual_seed(seed)
    count = len(widths)
    copies = 1 if mode == "mean" else count
    base = torch.randn(copies, rows, in_features, generator=generator) * 0.5
    coupling = torch.randn(in_features, in_features, generator=generator) * 0.1
    scales = 0.004 + 0.008 * torch.rand(count, rows, groups, generator=generator)
    scales *= torch.where(torch.rand(scales.shape, generator=generator) < 0.5, -1.0, 1.0)
    group_of = torch.randint(0, groups, (in_features,), dtype=torch.int32, generator=generator)
    weights = torch.rand(count, generator=generator) * torch.tensor([2.0**bits for bits in widths])
    trail = torch.randn(base.shape, generator=generator) * 0.1 if with_trail else None
    codes = native.sweep(base, coupling, scales, group_of, widths, weights, mode=mode, trail=trail, num_threads=threads)
    sums = torch.zeros_like(base, dtype=torch.float64) if trail is None else trail.double()
    differing = 0
    for j in range(in_features):
        x = (base[:, :, j].double() + sums[:, :, j]).expand(count, rows)
        scale = scales[:, :, group_of[j]]
        costs = sweep_costs(x, scale, widths, weights)
        least, best = costs.min(dim=1)
        chosen = costs.gather(1, codes[:, j : j + 1].long()).squeeze(1)
        assert (chosen <= least * (1 + 1e-3) + 1e-7).all()
        differing += int((best != codes[:, j]).sum())
        w = torch.stack([scale[i] * slicing.slice_levels(codes[:, j], bits) for i, bits in enumerate(widths)]).double()
        if mode == "residual":
            c = x - w
        elif mode == "change":
            c = w - base[:, :, j].double()
        else:
            c = (x[:1] - w.mean(0, keepdim=True)).expand(copies, rows)
        sums[:, :, j + 1 :] -= c.unsqueeze(-1) * coupling[j, j + 1 :].double()
    assert differing <= rows * in_features / 100 + 1


@needs_library
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("widths", [(2, 3, 4, 8), (3, 4, 8), (8,), (2,), (2, 3, 4), (2, 3, 4, 5, 6, 7, 8), (6, 7)])
def test_sweep_against_the_full_scan(isa: str, widths: tuple[int, ...], mode: native.SweepMode) -> None:
    check_sweep(45, 110, 3, widths, mode, 5, with_trail=True, threads=2)


@needs_library
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    in_features=st.integers(1, 120),
    groups=st.integers(1, 5),
    widths=st.sets(st.sampled_from(slicing.WIDTHS), min_size=1).map(lambda s: tuple(sorted(s))),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 1000),
    with_trail=st.booleans(),
    threads=st.integers(1, 3),
)
def test_sweep_any_shape(
    rows: int,
    in_features: int,
    groups: int,
    widths: tuple[int, ...],
    mode: native.SweepMode,
    seed: int,
    with_trail: bool,
    threads: int,
) -> None:
    check_sweep(rows, in_features, groups, widths, mode, seed, with_trail=with_trail, threads=threads)


@needs_library
def test_sweep_prefers_the_lowest_of_equal_codes() -> None:
    # 2 bits alone: each level is shared by 64 codes (48 at the ends are rounded up or down), x hits levels exactly.
    base = torch.tensor([[[-1.28, -0.64, 0.0, 0.64]]])
    codes = native.sweep(
        base, torch.zeros(4, 4), torch.full((1, 1, 1), 0.01), torch.zeros(4, dtype=torch.int32), [2], [1]
    )
    assert codes.tolist() == [[0, 32, 96, 160]]


@needs_library
def test_sweep_refusals() -> None:
    base, coupling, scales = torch.zeros(2, 3, 4), torch.zeros(4, 4), torch.ones(2, 3, 1)
    group_of = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ConfigurationError, match="ascending"):
        native.sweep(base, coupling, scales, group_of, [8, 2], [1, 1])
    with pytest.raises(ConfigurationError, match="not negative"):
        native.sweep(base, coupling, scales, group_of, [2, 8], [1, -1])
    with pytest.raises(ConfigurationError, match="base must have shape"):
        native.sweep(base, coupling, scales, group_of, [2, 8], [1, 1], mode="mean")
    with pytest.raises(ConfigurationError, match="group_of"):
        native.sweep(base, coupling, scales, group_of.long(), [2, 8], [1, 1])
    with pytest.raises(ConfigurationError, match="kernels"):
        native.sweep(base, coupling, scales, group_of + 1, [2, 8], [1, 1])
    assert native.sweep(base[:, :0], coupling, scales[:, :0], group_of, [2, 8], [1, 1]).shape == (0, 4)


@needs_library
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scale_search_with_weights_that_are_no_numbers(bad: float) -> None:
    """The position of a NaN must not become an index."""
    weight, candidates = torch.randn(3, 64), torch.rand(5, 3, 2) + 0.01
    weight[1, 5] = bad
    table = torch.linspace(-128, 127, 255), torch.linspace(-128, 127, 256), torch.rand(256)
    found = native.search_scales(weight, torch.rand(64), candidates, *table)
    assert ((found >= 0) & (found < 5)).all()
    assert found[1, 0] == 0


@needs_library
def test_an_arena_is_asked_while_others_pack_into_it() -> None:
    arena, weights = native.Arena(), []
    codes, scales = torch.zeros(64, 64, dtype=torch.uint8), torch.ones(64, 2)
    thread = Thread(target=lambda: weights.extend(native.pack_parent(codes, scales, arena=arena) for _ in range(50)))
    thread.start()
    seen = [0]
    while thread.is_alive():
        seen.append(arena.nbytes)
    thread.join()
    assert seen == sorted(seen)
    assert arena.nbytes == sum(weight.nbytes for weight in weights)


def test_structures_match_the_header() -> None:
    # 64-bit layout of csrc/matgptq.h; a mismatch here would corrupt memory instead of failing.
    assert ctypes.sizeof(Product) == 40
    assert ctypes.sizeof(SweepJob) == 104


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two processors and a system that binds threads to them",
)
@needs_library
def test_own_threads_run_where_those_of_openmp_do() -> None:
    script = """
import os, torch
from matgptq import native
def tasks(): return {int(name) for name in os.listdir('/proc/self/task')}
torch.zeros(1 << 20).add_(1)
before = tasks()
native.share_threads(False)
native.spread_threads()
native.matmul(torch.zeros(1, 64), native.pack_slice(torch.zeros(4096, 64, dtype=torch.uint8), torch.ones(4096, 1), 4))
print(len(os.sched_getaffinity(0)), *{len(os.sched_getaffinity(task)) for task in tasks() - before})
"""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    variables = {**os.environ, "GOMP_CPU_AFFINITY": f"{first} {second}", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "2"]  # the caller is bound, the new thread is not


@needs_library
def test_torch_lends_its_threads() -> None:
    """On Linux torch has OpenMP; the results do not depend on whose threads they are."""
    weight = native.pack_slice(torch.randint(0, 256, (4096, 64), dtype=torch.uint8), torch.ones(4096, 1), 4)
    x = torch.randn(3, 64)
    lent = native.shares_threads()
    assert lent == sys.platform.startswith("linux")
    results = []
    for share in (False, True):
        native.share_threads(share)
        assert native.shares_threads() == (share and lent)
        results += [native.matmul(x, weight, 4, num_threads=threads) for threads in (1, 2, 3)]
    assert all(torch.equal(result, results[0]) for result in results)


# --- refit -----------------------------------------------------------------------------------------------------------


def refit_problem(rows: int, groups: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * groups * size, groups * size, generator=generator)
    current = torch.randn(rows, groups * size, generator=generator)
    return 0.01 * torch.randn(current.shape, generator=generator), current, inputs.T @ inputs


@needs_library
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 130),
    groups=st.integers(1, 6),
    size=st.integers(1, 40),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_refit_sums(rows: int, groups: int, size: int, threads: int, seed: int) -> None:
    difference, current, hessian = refit_problem(rows, groups, size, seed)
    found = native.refit_sums(difference, current, hessian, size, num_threads=threads)
    d, c, h = difference.double(), current.double(), hessian.double()
    parts = c.view(rows, groups, size)
    system = torch.einsum("rgi,gihj,rhj->rgh", parts, h.view(groups, size, groups, size), parts)
    coupled = d @ h
    magnitude = float(h.abs().sum())
    torch.testing.assert_close(found.system.double(), system, rtol=1e-5, atol=1e-6 * magnitude)
    slope = (coupled * c).view(rows, groups, size).sum(-1)
    torch.testing.assert_close(found.slope.double(), slope, rtol=1e-5, atol=1e-8 * magnitude)
    torch.testing.assert_close(found.errors.double(), (coupled * d).sum(-1), rtol=1e-5, atol=1e-10 * magnitude)
    assert torch.equal(found.system, found.system.mT)
    for one, same in zip(found, native.refit_sums(difference, current, hessian, size, num_threads=1), strict=True):
        assert torch.equal(one, same)
    forms = native.quadratic_forms(difference, hessian, num_threads=threads)
    torch.testing.assert_close(forms.double(), (coupled * d).sum(-1), rtol=1e-5, atol=1e-10 * magnitude)
    assert torch.equal(forms, native.quadratic_forms(difference, hessian, num_threads=1))


@needs_library
def test_refit_sums_are_those_of_any_instruction_set(isa: str) -> None:
    problem = refit_problem(101, 3, 19)
    found = native.refit_sums(*problem, 19)
    native.set_isa({"amx": "avx2", "avx512": "avx2", "avx_vnni": "avx2", "neon_dot": "neon"}.get(isa, isa))
    for one, same in zip(found, native.refit_sums(*problem, 19), strict=True):
        assert torch.equal(one, same)
    native.set_isa("scalar")
    for one, near in zip(found, native.refit_sums(*problem, 19), strict=True):
        torch.testing.assert_close(one, near, rtol=1e-4, atol=1e-6 * float(one.abs().max()))


@needs_library
def test_refit_sums_refuse() -> None:
    difference, current, hessian = refit_problem(4, 2, 8)
    with pytest.raises(ConfigurationError, match="group size 5 does not divide 16"):
        native.refit_sums(difference, current, hessian, 5)
    with pytest.raises(ConfigurationError, match="hessian"):
        native.refit_sums(difference, current, hessian[:3], 8)
    with pytest.raises(ConfigurationError, match="difference"):
        native.refit_sums(difference[:2], current, hessian, 8)
    assert native.refit_sums(difference[:0], current[:0], hessian, 8).system.shape == (0, 2, 2)
    with pytest.raises(ConfigurationError, match="hessian"):
        native.quadratic_forms(difference, hessian[:3])
    assert native.quadratic_forms(difference[:0], hessian).shape == (0,)


# ---- dense weights ---------------------------------------------------------------------------------------------------


@needs_library
@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 18),
    out_features=st.integers(0, 70),
    in_features=st.integers(0, 100),
    dtypes=st.tuples(
        st.sampled_from([torch.float32, torch.bfloat16]),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    ),
    biased=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_dense_products(
    rows: int,
    out_features: int,
    in_features: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    biased: bool,
    threads: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, in_features, generator=generator).to(dtypes[0])
    weight = torch.randn(out_features, in_features + 3, generator=generator).to(dtypes[1])[:, :in_features]
    bias = torch.randn(out_features, generator=generator) if biased else None
    y = native.linear(x, weight, bias, num_threads=threads)
    assert y.shape == (rows, out_features)
    assert y.dtype == x.dtype
    whole = native.linear(x.float(), weight, bias)
    assert_product(whole, x, weight, bias)
    assert torch.equal(y, whole.to(x.dtype))


@needs_library
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_batches(isa: str, batch: int, dtype: torch.dtype) -> None:
    """Every row is what it is alone."""
    x, weight = torch.randn(batch, 75), torch.randn(41, 75).to(dtype)
    y = native.linear(x.view(1, batch, 75), weight)
    assert y.shape == (1, batch, 41)
    assert_product(y[0], x, weight)
    for row in range(batch):
        assert torch.equal(y[0, row], native.linear(x[row], weight))


@needs_library
def test_dense_refusals() -> None:
    x, weight = torch.ones(2, 8), torch.ones(3, 8)
    for bad_x, bad_weight, problem in (
        (x.half(), weight, "float16"),
        (x, weight.double(), "float64"),
        (x[:, :7], weight, "do not fit"),
        (x, torch.ones(8, 3).T, "not adjacent"),
        (x, weight[0], "do not fit"),
        (torch.tensor(1.0), weight, "do not fit"),
        (x.to("meta"), weight, "must be on the CPU"),
    ):
        with pytest.raises(ConfigurationError, match=problem):
            native.linear(bad_x, bad_weight)
    with pytest.raises(ConfigurationError, match="bias must have shape"):
        native.linear(x, weight, torch.ones(4))
    assert native.linear(x.T.contiguous().T, weight).equal(torch.full((2, 3), 8.0))
