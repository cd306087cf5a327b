"""The GPU's products against dequantize-then-multiply: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from test_kernels import make_weight
from tiny_models import token_ids
from transformers import AutoModelForCausalLM

import matgptq
from matgptq.errors import AllocationError, ConfigurationError
from matgptq.gpu import layout as gpu_layout
from matgptq.gpu import support as gpu_support
from matgptq.gpu.layout import PlaneWeight
from matgptq.gpu.tuning import Launch
from matgptq.inference.nested_linear import NestedLinear, nested_layers
from matgptq.kernels import dispatch, kernel_choice, packed_weight
from matgptq.nested_weight import NestedWeight
from matgptq.slicing import WIDTHS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
reason = gpu_support.obstacle(DEVICE)
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))
if reason is None:
    from matgptq.gpu import products as gpu_products

HALVES = (torch.float16, torch.bfloat16)
# The result's own rounding; the interpreter cuts where it should round to bfloat16.
TOLERANCE = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 1e-6}


def pack(weight: NestedWeight, bits: int | None = None) -> PlaneWeight:
    codes = weight.codes.to(DEVICE)
    scales = {width: scale.to(DEVICE) for width, scale in weight.scales.items()}
    if bits is None:
        return gpu_layout.pack_parent(codes, scales)
    return gpu_layout.pack_slice(codes, scales[bits], bits)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(result: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Compare with float64, relative to the magnitude of what was summed."""
    assert result.dtype == x.dtype
    expected, magnitude = x.double() @ dense.double().T, x.double().abs() @ dense.double().abs().T
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    assert result.shape == expected.shape
    off = (result.cpu().double() - expected).abs()
    assert (off <= TOLERANCE[x.dtype] * magnitude + 1e-30).all(), (off / magnitude).max()


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_fused(bits, dtype, resident):
    weight = make_weight(70, 160, 5, seed=bits)  # half a chunk of columns and most of a block of rows is padding
    packed = pack(weight, None if resident else bits)
    rows = 1 + bits % 3
    x, bias = normal(rows, 160, dtype=dtype), normal(70, dtype=dtype)
    launch = Launch(warps=4, units=8, blocks=2, tiles=1, splits=1)
    result = gpu_products.matmul(x.to(DEVICE), packed, bits, bias.to(DEVICE), launch)
    check(result, x, weight.dequantize(bits), bias)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_staged(bits, dtype, resident):
    weight = make_weight(70, 160, 5 if bits % 2 else 1, seed=bits)
    packed = pack(weight, None if resident else bits)
    rows = 17 + bits
    x, bias = normal(rows, 160, dtype=dtype), normal(70, dtype=dtype)
    launch = Launch(warps=4, units=2, blocks=2, tiles=2, splits=1, ahead=resident, stages=1)
    result = gpu_products.matmul(x.to(DEVICE), packed, bits, bias.to(DEVICE), launch)
    check(result, x, weight.dequantize(bits, dtype), bias)  # weights are rounded, as the reference's are


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled code does not change with a constant")
@pytest.mark.parametrize("bits", [3, 8])
def test_both_orders_of_columns_are_the_same_product(bits, monkeypatch):
    weight = make_weight(7, 96, 3)
    x = normal(2, 96, dtype=torch.bfloat16)
    for first in (True, False):  # one of the two is that of other versions of the compiler
        monkeypatch.setattr(gpu_products.product_kernels._PAIRS_FIRST, "value", first)
        check(gpu_products.matmul(x, pack(weight), bits), x, weight.dequantize(bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_dequantized_is_exact_for_every_code(bits):
    weight = make_weight(66, 64, 2, seed=bits)
    weight.codes[:4] = torch.arange(256).view(4, 64)
    packed = pack(weight), pack(weight, bits)
    for form, dtype in zip(packed, (torch.float32, torch.float16), strict=True):
        out = torch.full((66, 64), torch.nan, dtype=dtype, device=DEVICE)
        gpu_products.dequantize_blocks(form, bits, 0, out)
        assert torch.equal(out.cpu(), weight.dequantize(bits, dtype))
    last = torch.empty(2, 64, device=DEVICE)
    gpu_products.dequantize_blocks(packed[0], bits, 2, last)
    assert torch.equal(last.cpu(), weight.dequantize(bits)[64:])


@pytest.mark.parametrize(
    ("in_features", "group_size", "bits"),
    [(64, 32, 2), (160, 32, 8), (192, 96, 3), (192, 64, 4), (384, 128, 6), (256, 256, 5), (45, 45, 4), (1, 1, 3)],
)
@pytest.mark.parametrize("dtype", HALVES)
def test_group_sizes(in_features, group_size, bits, dtype):
    weight = make_weight(7, in_features, in_features // group_size)
    x = normal(2, in_features, dtype=dtype)
    launch = Launch(4, 4, 1, 1, 1)
    check(gpu_products.matmul(x.to(DEVICE), pack(weight), bits, None, launch), x, weight.dequantize(bits))
    out = torch.empty(7, in_features, device=DEVICE)
    gpu_products.dequantize_blocks(pack(weight), bits, 0, out)
    assert torch.equal(out.cpu(), weight.dequantize(bits))


@pytest.mark.parametrize("kernel", ["triton-fused", "triton-tiled"])
@pytest.mark.parametrize("rows", [*range(18), 31, 33, 64])
def test_batches(kernel, rows, monkeypatch):
    monkeypatch.setenv("MATGPTQ_KERNEL", kernel)
    monkeypatch.setenv("MATGPTQ_AUTOTUNE", "0")
    weight = make_weight(37, 96, 3)
    dtype = HALVES[rows % 2]
    x, bias = normal(rows, 96, dtype=dtype), normal(37, dtype=dtype)
    result = dispatch.matmul(x.to(DEVICE), pack(weight), 3, bias.to(DEVICE))
    # Tiles are rounded to the dtype of the activations, as the reference's weights are.
    check(result, x, weight.dequantize(3, dtype) if kernel == "triton-tiled" else weight.dequantize(3), bias)


@pytest.mark.parametrize(
    "launch",
    [
        Launch(1, 1, 1, 2, 3),
        Launch(4, 4, 1, 1, 2),
        Launch(4, 8, 1, 1, 1),
        Launch(4, 4, 2, 2, 3),
        Launch(8, 8, 2, 1, 2),
        Launch(4, 4, 4, 4, 2),
        Launch(4, 4, 2, 2, 2, ahead=True),
        Launch(4, 4, 4, 2, 2, stages=1),
        Launch(4, 2, 2, 4, 1, ahead=True, stages=1),
        Launch(4, 4, 4, 2, 1, stages=3),
    ],
    ids=str,
)
def test_every_way_to_cut_a_product(launch):
    weight = make_weight(130, 192, 3)
    packed = pack(weight)
    x = normal(19, 192, dtype=torch.float16)
    cut = launch.with_splits(packed, 19, launch.splits)
    first = gpu_products.matmul(x.to(DEVICE), packed, 4, None, cut)
    check(first, x, weight.dequantize(4))
    assert torch.equal(first, gpu_products.matmul(x.to(DEVICE), packed, 4, None, cut))
    assert not packed.arrived.any()


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_a_slice_reads_one_plane_more_than_its_bits(bits):
    weight = make_weight(20, 64, 1)
    packed = pack(weight)
    packed.planes[bits + 1 :] = -1
    x = normal(1, 64, dtype=torch.float16)
    check(gpu_products.matmul(x.to(DEVICE), packed, bits), x, weight.dequantize(bits))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kernel", ["triton-fused", "triton-tiled"])
def test_bad_activations_propagate(kernel, bad, monkeypatch):
    monkeypatch.setenv("MATGPTQ_KERNEL", kernel)
    weight = make_weight(20, 64, 2)
    x = torch.ones(3, 64, dtype=torch.float16)
    x[1, 5] = bad
    result = dispatch.matmul(x.to(DEVICE), pack(weight), 4).cpu()
    expected = x.float() @ weight.dequantize(4).T
    torch.testing.assert_close(result.float(), expected, equal_nan=True, rtol=2**-10, atol=2**-10)


def test_activations_anywhere_in_memory(monkeypatch):
    monkeypatch.setenv("MATGPTQ_KERNEL", "triton-fused")
    weight = make_weight(20, 64, 2)
    packed = pack(weight)
    flat = normal(1000, dtype=torch.float16).to(DEVICE)
    unaligned = flat[1 : 1 + 3 * 64].view(3, 64)
    strided = flat[:384].view(3, 128)[:, 3:67]
    wide = flat[:384].view(2, 3, 64)
    for x in (unaligned, strided, wide, wide[:0]):
        flat_rows = x.reshape(-1, 64).cpu()
        check(dispatch.matmul(x, packed, 5).reshape(-1, 20), flat_rows, weight.dequantize(5))


@pytest.mark.parametrize("kernel", ["triton-fused", "triton-tiled"])
def test_gradients(kernel, monkeypatch):
    monkeypatch.setenv("MATGPTQ_KERNEL", kernel)
    monkeypatch.setenv("MATGPTQ_AUTOTUNE", "0")
    weight = make_weight(20, 64, 2)
    packed = packed_weight.remember(pack(weight))
    x = normal(3, 64, dtype=torch.float16).to(DEVICE).requires_grad_()
    bias = normal(20, dtype=torch.float16).to(DEVICE).requires_grad_()
    dispatch.matmul(x, packed, 3, bias).sum().backward()
    torch.testing.assert_close(x.grad.cpu(), (torch.ones(3, 20) @ weight.dequantize(3)).half(), rtol=2e-3, atol=2e-3)
    assert torch.equal(bias.grad.cpu(), torch.full((20,), 3.0).half())


def layer(bits: int = 4) -> NestedLinear:
    made = NestedLinear(96, 20, True, 32, (3, 8), bits)
    weight = make_weight(20, 96, 3)
    made.codes.copy_(weight.codes)
    for own in (3, 8):
        getattr(made, f"scales_{own}").copy_(weight.scales[own])
    return made.to(DEVICE)


def test_a_layer_packs_for_the_gpu_and_back(monkeypatch):
    monkeypatch.setenv("MATGPTQ_KERNEL", "triton-fused")
    plain, packed = layer(), layer()
    x = normal(2, 96, dtype=torch.float16).to(DEVICE)
    packed.pack()
    assert isinstance(packed.packed, PlaneWeight)
    assert packed.codes.numel() == 0
    for bits in (2, 3, 8):
        packed.set_bits(bits)
        plain.set_bits(bits)
        assert torch.equal(packed.dequantize(), plain.dequantize())
        check(packed(x).detach().cpu(), x.cpu(), plain.dequantize().cpu(), plain.bias.detach().cpu())
    state = packed.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    packed.unpack()
    assert torch.equal(packed.codes, plain.codes)
    packed.pack(resident=False)
    with pytest.raises(AllocationError, match="resident=True"):
        packed.set_bits(4)
    with pytest.raises(ConfigurationError, match="resident=True"):
        packed.state_dict()


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.float() - expected.float()).norm() / expected.float().norm())


def forms(model) -> set[type]:
    return {type(each.packed) for each in nested_layers(model).values()}


def test_a_model_that_transformers_loads(make_checkpoint, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("MATGPTQ_KERNEL", "triton-fused")
    _, out = make_checkpoint("llama")
    ids = token_ids()[:1, :4].to(DEVICE)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, device_map=DEVICE)
    assert forms(model) == {PlaneWeight}
    with torch.no_grad():
        result = model(ids).logits
        if DEVICE == "cuda":
            model.to("cpu")
            assert PlaneWeight not in forms(model)
            assert relative(model(ids.cpu()).logits, result.cpu()) < 3e-2
            model.to(DEVICE)
            assert forms(model) == {PlaneWeight}
        assert torch.equal(model(ids).logits, result)


def test_a_model_on_the_gpu_kernels(make_checkpoint, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("MATGPTQ_KERNEL", "triton-fused")
    _, out = make_checkpoint("llama")
    ids = token_ids()[:1, :4].to(DEVICE)
    model = matgptq.load(out, bits=4, dtype="bfloat16", device=DEVICE)
    assert forms(model) == {PlaneWeight}
    with torch.no_grad():
        result = model(ids).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative(compiled(input_ids=ids, use_cache=False).logits, result) < 1e-2
        for each in nested_layers(model).values():
            each.unpack()
        monkeypatch.setenv("MATGPTQ_KERNEL", "reference")
        assert relative(result, model(ids).logits) < 3e-2


def test_one_slice_and_head_in_memory(make_checkpoint, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("MATGPTQ_KERNEL", "triton-fused")
    _, out = make_checkpoint("llama")
    model = matgptq.load(out, bits=3, dtype="float16", device=DEVICE, resident=False, head_bits=8)
    layers = [each.packed for each in nested_layers(model).values()]
    assert {len(packed.planes) for packed in layers} == {3}
    assert isinstance(model.get_output_embeddings().packed, PlaneWeight)
    with pytest.raises(ConfigurationError, match="native kernels"):
        matgptq.load(out, activations="int8", device=DEVICE)


def test_the_operator_follows_the_rules_of_torch(monkeypatch):
    monkeypatch.setenv("MATGPTQ_KERNEL", "triton-fused")
    packed = packed_weight.remember(pack(make_weight(20, 64, 2)))
    x = normal(2, 1, 64, dtype=torch.float16).to(DEVICE)
    torch.library.opcheck(torch.ops.matgptq.packed_matmul.default, (x, packed.key, 4, None, "exact"))


def test_the_choice_of_a_kernel(monkeypatch):
    monkeypatch.setattr(gpu_support, "obstacle", lambda device: None if device == "cuda" else "no GPU here")
    monkeypatch.delenv("MATGPTQ_KERNEL", raising=False)
    kernel_choice._choose.cache_clear()

    def chosen(form="planes", device="cuda", dtype=torch.float16, rows=1, activations="exact"):
        return kernel_choice.choose(kernel_choice.Product(form, device, dtype, rows, activations)).name

    try:
        assert chosen() == "triton-fused"
        assert chosen(dtype=torch.bfloat16, rows=kernel_choice.TRITON_FUSED_ROWS) == "triton-fused"
        assert chosen(rows=4096) == "triton-tiled"
        assert chosen(dtype=torch.float32) == "triton-tiled"
        assert chosen(form="codes") == "reference"
        assert chosen(device="cpu") == "reference"
        with pytest.raises(ConfigurationError, match="exact activations only"):
            chosen(activations="int8")
        monkeypatch.setenv("MATGPTQ_KERNEL", "triton-fused")
        assert chosen(rows=4096) == "triton-fused"
        with pytest.raises(ConfigurationError, match="float16 and bfloat16"):
            chosen(dtype=torch.float32)
        with pytest.raises(ConfigurationError, match="not packed"):
            chosen(form="native", device="cpu")
    finally:
        kernel_choice._choose.cache_clear()


def test_importing_the_package_imports_no_triton_and_touches_no_device():
    code = (
        "import sys, torch, matgptq, matgptq.kernels.dispatch, matgptq.core.sweep, matgptq.inference.nested_linear;"
        "assert not any(name.split('.')[0] == 'triton' for name in sys.modules);"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
