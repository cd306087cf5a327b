"""Layers that share an input run as one call and give what each alone would give."""

from __future__ import annotations

import copy

import pytest
import torch
from test_kernels import make_weight
from tiny_models import token_ids

import matgptq
from matgptq import native
from matgptq.inference.nested_linear import NestedLinear, nested_layers, pack_layers, set_bits
from matgptq.kernels import dispatch, kernel_choice
from matgptq.models.families import find_family
from matgptq.models.kv_cache import CACHE_ARGUMENT
from matgptq.native import products

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "native library")


class Attention(torch.nn.Module):
    """Three layers over one input, of different widths, one of them with a bias."""

    def __init__(self, activations: native.Activations = "exact") -> None:
        super().__init__()
        for index, (name, out, bits) in enumerate((("q", 40, 4), ("k", 16, 2), ("v", 8, 7))):
            weight = make_weight(out, 64, 2, seed=index)
            layer = NestedLinear(64, out, name == "k", 32, scale_bits=tuple(weight.scales), bits=bits)
            layer.load_state_dict(
                {"codes": weight.codes, **{f"scales_{own}": scale for own, scale in weight.scales.items()}},
                strict=False,
            )
            self.add_module(name, layer)
        pack_layers(self, activations=activations, shared=[("q", "k", "v")])
        self.requires_grad_(False)  # as of a loaded model

    def alone(self, name: str, x: torch.Tensor) -> torch.Tensor:
        layer = self.get_submodule(name)
        return dispatch.matmul(x, *layer.operand, activations=layer.activations)


@pytest.fixture
def calls(monkeypatch):
    """Numbers of weights in each call of the library."""
    made = []
    original = native.matmul_many

    def counted(x, weights, *rest, **options):
        made.append(len(weights))
        return original(x, weights, *rest, **options)

    for module in (native, products):
        monkeypatch.setattr(module, "matmul_many", counted)
    return made


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 5, 16])
def test_one_call_gives_what_each_layer_gives(rows, inference, activations, calls):
    model = Attention(activations)
    with torch.inference_mode(inference):
        x = torch.randn(2, rows, 64)
        results = {name: model.get_submodule(name)(x) for name in ("q", "k", "v")}
        assert calls == [3]
        for name, result in results.items():
            assert torch.equal(result, model.alone(name, x))


@pytest.mark.parametrize("inference", [False, True])
def test_an_input_changed_in_place_is_another_input(inference, calls):
    model = Attention()
    with torch.inference_mode(inference):
        x = torch.randn(1, 64)
        model.q(x)
        x.mul_(2)
        assert torch.equal(model.k(x), model.alone("k", x))


def test_results_are_handed_out_once_and_widths_may_change_between_steps(calls):
    model = Attention()
    x = torch.randn(1, 64)
    first = model.q(x)
    assert first is not model.q(x)  # asked again: computed again
    model.q.set_bits(8)
    y = torch.randn(1, 64)
    assert torch.equal(model.q(y), model.alone("q", y))
    assert torch.equal(model.v(y), model.alone("v", y))


def test_a_width_changed_between_two_layers_takes_effect():
    model = Attention()
    x = torch.randn(1, 64)
    model.q(x)
    model.k.set_bits(8)
    assert torch.equal(model.k(x), model.alone("k", x))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_width_changed_while_the_library_computes_takes_effect_afterwards(rows, monkeypatch):
    """As another thread may do."""
    model = Attention()
    x = torch.randn(rows, 64)
    expected = model.alone("q", x)
    for module, name in ((dispatch, "matmul_shared"), (native.Joined, "__call__")):
        original = getattr(module, name)

        def meddling(*given, original=original, **options):
            result = original(*given, **options)
            set_bits(model, 8)
            return result

        monkeypatch.setattr(module, name, meddling)
    assert torch.equal(model.q(x), expected)
    assert {model.q.bits, model.k.bits} == {8}
    assert torch.equal(model.k(x), model.alone("k", x))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_bias_takes_effect(dtype, rows):
    model = Attention()
    model.k.bias.data = model.k.bias.data.to(dtype)
    x = torch.randn(rows, 64)
    model.k(x)
    before = model.k(x)
    model.q(x)
    model.k.bias = torch.nn.Parameter(model.k.bias + 100, requires_grad=False)
    torch.testing.assert_close(model.k(x), before + 100)
    model.k.bias.data = model.k.bias.data + 100
    torch.testing.assert_close(model.k(x), before + 200)


@pytest.mark.parametrize("rows", [1, 3])
def test_activations_may_change(rows):
    model = Attention()
    x = torch.randn(rows, 64)
    for change in (("k",), ("q", "k", "v"), ("q",)):
        for name in ("q", "k", "v"):
            model.get_submodule(name).activations = "int8" if name in change else "exact"
        for name in ("q", "k", "v"):
            assert torch.equal(model.get_submodule(name)(x), model.alone(name, x))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_layer_without_the_others_of_its_group(rows):
    model = Attention()
    x = torch.randn(rows, 64)
    expected = model.alone("k", x)
    for layer in (copy.copy(model.k), copy.deepcopy(model.k), copy.deepcopy(model).k):
        torch.testing.assert_close(layer(x), expected)
    del model.q, model.v
    torch.testing.assert_close(model.k(x), expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_one_layer_unpacked(rows):
    model = Attention()
    x = torch.randn(rows, 64)
    model.k.unpack()
    for name in ("q", "k", "v"):
        assert torch.equal(model.get_submodule(name)(x), model.alone(name, x))


def test_prompts_go_layer_by_layer(calls, monkeypatch):
    monkeypatch.setattr(kernel_choice, "fused_rows", lambda dtype: 16)
    model = Attention()
    x = torch.randn(17, 64).bfloat16()
    kernel_choice._choose.cache_clear()  # it may have been asked about such a product when the limit was another
    assert torch.equal(model.q(x), model.alone("q", x))
    kernel_choice._choose.cache_clear()
    assert calls == []


def test_a_product_with_a_gradient_is_made_alone(calls):
    model = Attention()
    x = torch.randn(2, 64)
    with torch.no_grad():
        expected = model.q(x).clone()
    model.k.bias.requires_grad_()
    assert model.k(x).requires_grad
    assert not model.q(x).requires_grad
    assert torch.equal(model.q(x.requires_grad_()), expected)  # nothing that was ready without a gradient
    assert calls == [3, 1, 1, 1]


def test_copies_do_not_share_results():
    model = Attention()
    twin = copy.deepcopy(model)
    x = torch.randn(1, 64)
    twin.q(x)
    assert torch.equal(model.k(x), model.alone("k", x))
    twin.k.set_bits(3)
    assert torch.equal(twin.k(x), twin.alone("k", x))
    assert model.k.bits == 2


def test_a_loaded_model_shares_in_every_block(make_checkpoint, calls):
    _, out = make_checkpoint("llama")
    model = matgptq.load(out, 4)
    model(input_ids=token_ids()[:1, :4])
    per_block = [3, 1, 2, 1]  # q k v, o, gate up, down
    assert calls == per_block * model.config.num_hidden_layers
    model.to("cpu").set_bits({name: 2 + index % 7 for index, name in enumerate(nested_layers(model))})
    mixed = model(input_ids=token_ids()[:1, :4]).logits
    for layer in nested_layers(model).values():
        layer.unpack()
    torch.testing.assert_close(model(input_ids=token_ids()[:1, :4]).logits, mixed, rtol=1e-4, atol=1e-4)


def test_names_of_shared_inputs():
    layers = [f"model.layers.{block}.{path}" for block in range(2) for path in find_family("llama").layers]
    names = find_family("llama").shared_inputs(layers)
    assert names[0] == tuple(f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv")
    assert names[3] == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    layers = [f"gpt_neox.layers.0.{path}" for path in find_family("gpt_neox").layers]
    assert find_family("gpt_neox").shared_inputs(layers) == []


def test_the_gate_and_up_projection_of_an_expert_share_an_input():
    experts = [f"model.layers.1.block_sparse_moe.experts.{number}.w{leaf}" for number in (0, 10) for leaf in (1, 2, 3)]
    names = find_family("mixtral").shared_inputs(experts)
    assert names == [(experts[0], experts[2]), (experts[3], experts[5])]


def test_a_copy_of_a_model_that_has_decoded(make_checkpoint):
    _, out = make_checkpoint("llama")
    model = matgptq.load(out, 4)
    ids = token_ids()[:1, :1]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        copied = copy.deepcopy(model)
        model.set_bits(2)
        assert torch.equal(copied(input_ids=ids).logits, wanted)
        assert not torch.equal(model(input_ids=ids).logits, wanted)


@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_one_row_follows_widths_and_biases(make_checkpoint, activations):
    """The call that is prepared for a row is another one as soon as a width or a bias is another one."""
    _, out = make_checkpoint("llama-biased")
    model = matgptq.load(out, 4, activations=activations)
    ids = token_ids()[:1, :2]

    def logits(row: bool) -> torch.Tensor:
        with torch.no_grad():
            if not row:
                return model(input_ids=ids, use_cache=False).logits[:, -1:]
            first = model(input_ids=ids[:, :1], use_cache=True)
            return model(input_ids=ids[:, 1:], **{CACHE_ARGUMENT: first[CACHE_ARGUMENT]}).logits

    layer = "model.layers.0.self_attn.k_proj"
    for bits in (4, {layer: 2}, {layer: 8}, 3):
        model.set_bits(bits)
        assert torch.allclose(logits(True), logits(False), atol=1e-5)
    before = logits(True)
    with torch.no_grad():
        model.get_submodule(layer).bias.add_(1)
    assert not torch.allclose(logits(True), before)
    assert torch.allclose(logits(True), logits(False), atol=1e-5)


def test_a_model_loaded_in_inference_mode_decodes(make_checkpoint):
    """Its biases count no changes."""
    _, out = make_checkpoint("llama-biased")
    ids = token_ids()[:1, :1]
    with torch.inference_mode():
        logits = matgptq.load(out, 4)(input_ids=ids).logits
    with torch.no_grad():
        assert torch.equal(matgptq.load(out, 4)(input_ids=ids).logits, logits)
