"""Every kernel against plain dequantize-then-multiply, through the one dispatch point; packed layers in models."""

from __future__ import annotations

import copy
import itertools
import pickle
import random

import pytest
import torch
from tiny_models import token_ids
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import matgptq
from matgptq import native
from matgptq.errors import AllocationError, ConfigurationError
from matgptq.inference.nested_linear import NestedLinear, nested_layers, pack_layers
from matgptq.kernels import dispatch, kernel_choice, packed_weight
from matgptq.nested_weight import NestedWeight
from matgptq.slicing import WIDTHS

needs_native = pytest.mark.skipif(not native.available(), reason=native.reason() or "native library")
ROWS = (0, 1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 64)


def make_weight(out_features: int, in_features: int, groups: int, seed: int = 0) -> NestedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (out_features, in_features), dtype=torch.uint8, generator=generator)
    scales = {}
    for bits in WIDTHS:
        scale = torch.randn(out_features, groups, generator=generator) * 2**-7
        scale[torch.rand(scale.shape, generator=generator) < 0.1] = 0
        scales[bits] = scale.bfloat16().half()
    return NestedWeight(codes, scales)


def pack(weight: NestedWeight, bits: int | None = None) -> native.Weight:
    scales = {width: scale.float() for width, scale in weight.scales.items()}
    return (
        native.pack_parent(weight.codes, scales)
        if bits is None
        else native.pack_slice(weight.codes, scales[bits], bits)
    )


@pytest.mark.parametrize("kernel", ["native-fused", "native-tiled", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("out_features", "in_features", "groups"), [(37, 96, 3), (64, 128, 2), (16, 96, 1), (7, 45, 1)]
)
def test_against_dequantized(kernel, dtype, out_features, in_features, groups, monkeypatch):
    if kernel != "reference" and not native.available():
        pytest.skip(native.reason())
    monkeypatch.setenv("MATGPTQ_KERNEL", kernel)
    weight = make_weight(out_features, in_features, groups)
    forms = [weight] if kernel == "reference" else [pack(weight)]
    bias = torch.randn(out_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    for form, bits, rows in itertools.product(forms, WIDTHS, random.Random(0).sample(ROWS, 5)):
        x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
        expected = x.double() @ weight.dequantize(bits).double().T + bias.double()
        result = dispatch.matmul(x, form, bits, bias)
        assert result.dtype == dtype
        assert result.shape == (rows, out_features)
        magnitude = x.double().abs() @ weight.dequantize(bits).double().abs().T + bias.double().abs()
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
        assert ((result.double() - expected).abs() <= tolerance * magnitude + 1e-30).all()


@needs_native
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_packed_slice_multiplies_like_the_parent(bits):
    weight = make_weight(40, 128, 4)
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(0))
    parent, only = pack(weight), pack(weight, bits)
    torch.testing.assert_close(dispatch.matmul(x, parent, bits), dispatch.matmul(x, only, bits), rtol=1e-4, atol=1e-4)
    assert only.nbytes < parent.nbytes or bits == 8


@needs_native
@pytest.mark.parametrize("rows", [1, 40])
def test_bad_activations_propagate(rows):
    weight = pack(make_weight(20, 64, 2))
    x = torch.ones(rows, 64)
    x[0, 3] = torch.nan
    result = dispatch.matmul(x, weight, 4)
    assert result[0].isnan().all()
    assert result[1:].isfinite().all()


def test_the_choice_of_a_kernel(monkeypatch):
    few = kernel_choice.Product(form="native", device="cpu", dtype=torch.float32, rows=1, activations="exact")
    assert kernel_choice.choose(few).name == "native-fused"
    many = kernel_choice.Product(form="native", device="cpu", dtype=torch.bfloat16, rows=500, activations="exact")
    assert kernel_choice.choose(many).name == "native-tiled"
    plain = kernel_choice.Product(form="codes", device="cpu", dtype=torch.float16, rows=1, activations="exact")
    assert kernel_choice.choose(plain).name == "reference"
    with pytest.raises(ConfigurationError, match="exact activations only"):
        kernel_choice.choose(kernel_choice.Product("codes", "cpu", torch.float32, 1, "int8"))
    monkeypatch.setenv("MATGPTQ_KERNEL", "native-fused")
    assert kernel_choice.choose(many).name == "native-fused"
    with pytest.raises(ConfigurationError, match="not packed"):
        kernel_choice.choose(plain)
    monkeypatch.setenv("MATGPTQ_KERNEL", "abacus")
    with pytest.raises(ConfigurationError, match="native-fused, native-tiled, triton-fused, triton-tiled, reference"):
        kernel_choice.choose(few)


@needs_native
@pytest.mark.parametrize(
    ("vendor", "isa", "multiplies_bfloat16", "rows"),
    [
        ("intel", "amx", True, (None, 128)),
        ("intel", "avx512", True, (128, 32)),
        ("intel", "avx512", False, (128, 128)),
        ("amd", "avx512", True, (None, 40)),
        ("amd", "avx512", False, (None, None)),
        ("intel", "avx_vnni", False, (48, 48)),
        ("amd", "avx2", False, (12, 12)),
        ("other", "neon", False, (32, 32)),
    ],
)
def test_how_many_rows_are_fused(monkeypatch, vendor, isa, multiplies_bfloat16, rows):
    """As benchmarks/cpu_crossover.py found them, by whose processor it is."""
    monkeypatch.setattr(native, "cpu_vendor", lambda: vendor)
    monkeypatch.setattr(native, "isa", lambda: isa)
    monkeypatch.setattr(kernel_choice, "multiplies_bfloat16", lambda device: multiplies_bfloat16)
    kernel_choice._choose.cache_clear()
    for dtype, limit in zip((torch.float32, torch.bfloat16), rows, strict=True):

        def chosen(count, activations="exact", dtype=dtype):
            return kernel_choice.choose(kernel_choice.Product("native", "cpu", dtype, count, activations)).name

        assert chosen(limit or 100_000) == "native-fused"
        assert limit is None or chosen(limit + 1) == "native-tiled"
        assert chosen(100_000, "int8") == "native-fused"
    kernel_choice._choose.cache_clear()


@needs_native
@pytest.mark.parametrize("bias", [True, False])
def test_tiles_are_multiplied_in_float32_by_a_processor_without_products_of_bfloat16(monkeypatch, bias):
    weight = make_weight(40, 64, 2)
    packed = native.pack_slice(weight.codes, weight.scales[4], 4)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, 64, generator=generator).bfloat16()
    added = torch.randn(40, generator=generator) if bias else None
    dtypes = []
    multiply = torch.mm

    def recording(a, b, *, out):
        dtypes.append(a.dtype)
        return multiply(a, b, out=out)

    monkeypatch.setattr(torch, "mm", recording)
    for multiplies in (True, False):
        monkeypatch.setattr(kernel_choice, "multiplies_bfloat16", lambda device, it=multiplies: it)
        y = kernel_choice._run_tiled(x, packed, 4, added, "exact")
        assert y.dtype == torch.bfloat16
        exact = x.double() @ native.dequantize_rows(packed, 4).double().T + (0 if added is None else added.double())
        # Rounded once, or as often as PyTorch rounds in bfloat16.
        assert (y.double() - exact).abs().max() <= (2**-6 if multiplies else 2**-8) * exact.abs().max()
    assert dtypes == [torch.bfloat16, torch.float32]


@needs_native
def test_packing_and_unpacking_a_layer_lose_nothing():
    layer = NestedLinear(96, 20, True, 32, (3, 8))
    weight = make_weight(20, 96, 3)
    layer.codes.copy_(weight.codes)
    for bits in (3, 8):
        scales = weight.scales[bits].clone()
        scales[scales == 0] = 2**-9  # storable scales are never zero
        getattr(layer, f"scales_{bits}").copy_(scales)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    expected = {bits: (layer.set_bits(bits), layer(x))[1] for bits in WIDTHS}
    layer.pack()
    assert layer.packed is not None
    assert layer.codes.numel() == 0
    for bits in WIDTHS:
        layer.set_bits(bits)
        torch.testing.assert_close(layer(x), expected[bits], rtol=1e-5, atol=1e-6)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    layer.unpack()
    assert torch.equal(layer.codes, weight.codes)


@needs_native
def test_a_model_uses_the_kernels_by_default(make_checkpoint, tmp_path):
    _, out = make_checkpoint("llama")
    ids = token_ids()[:2, :16]
    model = matgptq.load(out, bits=4)
    assert all(layer.packed is not None for layer in nested_layers(model).values())
    expected = {}
    plain = matgptq.load(out)
    for layer in nested_layers(plain).values():
        layer.unpack()
    for bits in WIDTHS:
        plain.set_bits(bits)
        model.set_bits(bits)
        expected[bits] = plain(ids).logits
        torch.testing.assert_close(model(ids).logits, expected[bits], rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path / "again")
    again = matgptq.load(tmp_path / "again", bits=3)
    torch.testing.assert_close(again(ids).logits, expected[3], rtol=1e-3, atol=1e-3)
    twin = copy.deepcopy(model)
    twin.set_bits(2)
    assert {layer.bits for layer in nested_layers(model).values()} == {8}
    torch.testing.assert_close(twin(ids).logits, expected[2], rtol=1e-3, atol=1e-3)


@needs_native
def test_packed_weights_are_copied_by_name_and_not_pickled(make_checkpoint, tmp_path):
    model = matgptq.load(make_checkpoint("llama")[1], bits=3)
    layer = next(iter(nested_layers(model).values()))
    assert copy.copy(layer.packed) is copy.deepcopy(layer.packed) is layer.packed
    for refused in (layer.packed, native.Arena(), layer, model.model.layers[0], model):
        with pytest.raises(TypeError, match="save_pretrained"):
            pickle.dumps(refused)
        with pytest.raises(TypeError, match="save_pretrained"):
            torch.save(refused, tmp_path / "whole.pt")


@needs_native
def test_one_slice_in_memory(make_checkpoint):
    _, out = make_checkpoint("llama")
    ids = token_ids()[:1, :16]
    full, small = matgptq.load(out, bits=3), matgptq.load(out, bits=3, resident=False)
    torch.testing.assert_close(full(ids).logits, small(ids).logits, rtol=1e-3, atol=1e-3)
    held = [sum(layer.packed.nbytes for layer in nested_layers(model).values()) for model in (full, small)]
    assert held[1] < 0.6 * held[0]
    with pytest.raises(AllocationError, match="resident=True"):
        small.set_bits(4)
    with pytest.raises(ConfigurationError, match="resident=True"):
        small.state_dict()


@needs_native
def test_int8_activations_are_close_and_a_choice(make_checkpoint):
    _, out = make_checkpoint("llama")
    ids = token_ids()[:1, :16]
    exact, rounded = matgptq.load(out), matgptq.load(out, activations="int8")
    difference = (exact(ids).logits - rounded(ids).logits).abs().max()
    assert 0 < difference < 0.1 * exact(ids).logits.abs().max()


def test_wishes_that_need_the_library_are_refused_without_it(make_checkpoint, monkeypatch):
    _, out = make_checkpoint("llama")
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "reason", lambda: "built without a compiler")
    assert all(layer.packed is None for layer in nested_layers(matgptq.load(out)).values())
    with pytest.raises(ConfigurationError, match="without a compiler"):
        matgptq.load(out, resident=False)
    with pytest.raises(ConfigurationError, match="int8"):
        matgptq.load(out, activations="int8")


@pytest.mark.parametrize("packed", [True, False])
def test_a_model_compiles_into_one_graph(packed, make_checkpoint):
    if packed and not native.available():
        pytest.skip(native.reason())
    _, out = make_checkpoint("qwen2")
    model = matgptq.load(out, bits=3)
    if not packed:
        for layer in nested_layers(model).values():
            if layer.packed is not None:
                layer.unpack()
    ids = token_ids()[:1, :12]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
        model.set_bits(4)
        expected = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.parametrize("trained", [False, True])
def test_the_operators_follow_the_rules_of_torch(trained):
    weight = packed_weight.remember(pack(make_weight(20, 64, 2)))
    for bias in (None, torch.randn(20, requires_grad=trained)):
        arguments = (torch.randn(3, 2, 64, requires_grad=trained), weight.key, 4, bias, "exact")
        torch.library.opcheck(torch.ops.matgptq.packed_matmul.default, arguments)
    torch.library.opcheck(torch.ops.matgptq.packed_weight.default, (weight.key, 3, torch.bfloat16))


# --- gradients --------------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 5, 64), (40, 64), (0, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_input_and_bias(dtype, shape, activations):
    weight = make_weight(20, 64, 2)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    bias = torch.randn(20, requires_grad=True)
    weights = torch.randn(*shape[:-1], 20, dtype=dtype)
    expected = torch.autograd.grad((dispatch.matmul(x, weight, 3, bias) * weights).sum(), (x, bias))
    for form in (pack(weight), pack(weight, 3)):
        product = dispatch.matmul(x, packed_weight.remember(form), 3, bias, activations=activations)
        found = torch.autograd.grad((product * weights).sum(), (x, bias))
        torch.testing.assert_close(found, expected)
        assert not dispatch.matmul(x.detach(), form, 3, bias.detach()).requires_grad


@needs_native
def test_a_weight_lives_until_its_gradient_is_known():
    layer = NestedLinear(64, 20, False, 32)
    layer.codes.random_(0, 256)
    x = torch.randn(40, 64, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), x)
    layer.pack()
    product = layer(x)
    layer.unpack()
    torch.testing.assert_close(torch.autograd.grad(product.sum(), x), expected)


class Adapter(torch.nn.Module):
    """A layer and a trainable product of two small matrices beside it (LoRA)."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        generator = torch.Generator().manual_seed(layer.out_features)
        self.down = torch.nn.Parameter(torch.randn(2, layer.in_features, generator=generator) * 0.1)
        self.up = torch.nn.Parameter(torch.randn(layer.out_features, 2, generator=generator) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


@needs_native
@pytest.mark.parametrize("tokens", [1, 12, 48])
@pytest.mark.parametrize("compiled", [False, True])
def test_adapters_around_the_layers_of_a_loaded_model_learn(compiled, tokens, make_checkpoint, monkeypatch):
    model = matgptq.load(make_checkpoint("qwen2", torch.float32)[1], bits=3)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for block in model.model.layers:
        block.self_attn.v_proj = Adapter(block.self_attn.v_proj)
        block.mlp.gate_proj = Adapter(block.mlp.gate_proj)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = token_ids(1, tokens, seed=3)

    def gradients(model):
        logits = model(input_ids=ids, use_cache=False).logits
        return torch.autograd.grad(logits.log_softmax(-1)[..., 7].sum(), trained)

    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    found = gradients(run)
    monkeypatch.setenv("MATGPTQ_KERNEL", "reference")
    torch.testing.assert_close(found, gradients(model), rtol=1e-3, atol=1e-4)


# --- what goes on around a product ------------------------------------------------------------------------------------


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


@pytest.fixture
def layers():
    """The same layer packed and not, with nothing to train."""
    pair = [NestedLinear(64, 20, True, 32, bits=3) for _ in range(2)]
    for layer in pair:
        layer.codes.copy_(make_weight(20, 64, 2).codes)
        layer.scales_8.copy_(make_weight(20, 64, 2).scales[8])
        torch.nn.init.ones_(layer.bias)
        layer.requires_grad_(False)
    pack_layers(pair[0])
    return pair


@needs_native
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_tensors_that_are_not_what_lies_in_memory(layers, rows):
    packed, plain = layers
    x = torch.randn(rows, 64)
    torch.testing.assert_close(packed(torch._neg_view(x)), plain(-x))
    found = packed(x.as_subclass(Plain))
    assert type(found) is Plain
    torch.testing.assert_close(found.as_subclass(torch.Tensor), plain(x))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = packed(mode.from_tensor(x))
    assert isinstance(fake, FakeTensor)
    assert fake.shape == (rows, 20)
    torch.testing.assert_close(packed(x), plain(x))


@needs_native
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_a_recorded_product_is_one_of_its_input(layers, rows):
    packed, plain = layers
    traced = torch.jit.trace(packed, torch.randn(rows, 64))
    x = torch.randn(rows, 64)
    torch.testing.assert_close(traced(x), plain(x))
    graph = make_fx(packed)(torch.randn(rows, 64))
    torch.testing.assert_close(graph(x), plain(x))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_is_followed_as_linear_layers_do(layers, dtype, compiled):
    packed, plain = layers
    if compiled:
        torch.compiler.reset()  # graphs of other tests count
        packed = torch.compile(packed, fullgraph=True, backend="aot_eager")
    for rows, cast in itertools.product((1, 5, 40), (torch.bfloat16, torch.float16)):
        x = torch.randn(rows, 64).to(dtype)
        with torch.autocast("cpu", cast):
            found, expected = packed(x), plain(x)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else cast)
        torch.testing.assert_close(
            found, expected, rtol=0.02, atol=0.05
        )  # where codes are unpacked: no rounded weights


@needs_native
def test_transformations(layers):
    packed, plain = layers
    x = torch.randn(3, 5, 64)
    for transformed in (
        lambda layer: torch.vmap(layer)(x),
        lambda layer: torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1],
        lambda layer: torch.func.grad(lambda y: layer(y).square().sum())(x),
        lambda layer: torch.func.jacfwd(layer)(x[0, :2]),
        lambda layer: torch.func.hessian(lambda y: layer(y).square().sum())(x[0, :2]),
    ):
        torch.testing.assert_close(transformed(packed), transformed(plain), rtol=1e-4, atol=1e-4)


@needs_native
def test_a_default_device_is_not_where_weights_lie(layers):
    packed, plain = layers
    x = torch.randn(40, 64)
    with torch.device("meta"):
        found = packed(x)
        dense = packed.dequantize()
    torch.testing.assert_close(found, plain(x))
    assert torch.equal(dense, plain.dequantize())
