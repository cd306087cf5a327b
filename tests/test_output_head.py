"""The output head: as fast as it can be read, or at a few bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import build_model, token_ids
from torch import nn
from transformers import AutoModelForCausalLM

import matgptq
from matgptq import native
from matgptq.errors import ConfigurationError, UnsupportedModelError
from matgptq.inference.output_head import DENSE_ROWS, DenseHead, PackedHead, pack_head, quicken_head

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "native library")


# ---- exact -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Dtypes of the weights that the library multiplied by."""
    made: list[torch.dtype] = []
    original = native.linear

    def noted(x: torch.Tensor, weight: torch.Tensor, *others: Any) -> torch.Tensor:
        made.append(weight.dtype)
        return original(x, weight, *others)

    monkeypatch.setattr(native, "linear", noted)
    return made


def assert_product(head: nn.Linear, x: torch.Tensor) -> None:
    wanted = nn.functional.linear(x.double(), head.weight.double(), None if head.bias is None else head.bias.double())
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if x.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(head(x).double(), wanted, **tolerance)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt_neox", "opt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_head_is_read_as_it_is_stored(name, dtype, stored, make_checkpoint, calls):
    """In 16 bits wherever they hold it, whatever the activations are."""
    _, out = make_checkpoint(name, stored)
    for model in (
        matgptq.load(out, 4, dtype=dtype),
        AutoModelForCausalLM.from_pretrained(out, dtype=getattr(torch, dtype)).requires_grad_(False),
    ):
        head = model.get_output_embeddings()
        assert isinstance(head, DenseHead)
        limit = DENSE_ROWS[head.weight.dtype]
        for rows in (1, 2, limit):
            assert_product(head, torch.randn(rows, head.in_features).to(head.weight.dtype))
        assert_product(head, torch.randn(limit + 1, head.in_features).to(head.weight.dtype))  # PyTorch's
        read = stored if dtype == "float32" else torch.bfloat16
        assert calls == [read] * 3
        size = head.weight.numel()
        assert head.bytes_read == size * read.itemsize
        assert head.bytes_added == (size * 2 if dtype == "float32" and read != torch.float32 else 0)
        calls.clear()


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("copied", [False, True])
def test_an_exact_head_follows_its_weight(copied, name, make_checkpoint, calls):
    model = matgptq.load(make_checkpoint(name)[1], 8)
    if copied:
        held = model.get_output_embeddings()
        model = copy.deepcopy(model)
        assert model.get_output_embeddings().rows.data_ptr() == held.rows.data_ptr()  # one copy is enough for all
    x = torch.randn(3, 64)
    for change in (_merged, _edited, _put_in_place, _replaced, _resized):
        change(model)
        head = model.get_output_embeddings()
        assert_product(head, x)
        assert torch.bfloat16 not in calls
        calls.clear()
    values = model.get_output_embeddings().weight.data.clone()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model.get_output_embeddings().weight.data = values.to(dtype).float()
        quicken_head(model)
        assert_product(model.get_output_embeddings(), x)
    assert calls == [torch.float32, torch.bfloat16, torch.float16]


def test_an_exact_head_can_be_trained(make_checkpoint, calls):
    model = matgptq.load(make_checkpoint("llama")[1], 8)
    head = model.get_output_embeddings()
    head.weight.requires_grad_()
    x = torch.randn(2, 64, requires_grad=True)
    head(x).sum().backward()
    assert head.weight.grad is not None
    assert x.grad is not None
    head.weight.requires_grad_(False)
    head(x).sum().backward()
    assert not calls
    with torch.no_grad():
        head(x)
    assert calls == [torch.bfloat16]


def test_what_an_exact_head_leaves_to_pytorch(make_checkpoint, calls, monkeypatch):
    model = matgptq.load(make_checkpoint("llama")[1], 8)
    head, x = model.get_output_embeddings(), torch.randn(2, 64)
    wanted = nn.functional.linear(x, head.weight)
    with monkeypatch.context() as patch:
        patch.setenv("MATGPTQ_KERNEL", "reference")
        assert torch.equal(head(x), wanted)
    for compiled in (
        torch.compile(head, fullgraph=True, backend="aot_eager"),
        torch.jit.trace(head, x, check_trace=False),
    ):
        torch.testing.assert_close(compiled(x), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x).dtype == torch.bfloat16
    assert torch.func.vmap(head)(x[None]).shape == (1, *wanted.shape)
    half = copy.deepcopy(head).half()
    assert half(x.half()).dtype == torch.float16
    with torch.device("meta"):
        assert copy.deepcopy(head).to("meta")(torch.empty(2, 64)).is_meta
    assert not calls
    assert head(torch.empty(0, 64)).shape == (0, head.out_features)


def test_heads_that_are_not_touched():
    class Other(nn.Linear):
        pass

    model = build_model("llama")
    model.lm_head.__class__ = Other
    quicken_head(model)
    assert type(model.lm_head) is Other
    model = build_model("llama").half()
    quicken_head(model)
    assert type(model.lm_head) is nn.Linear
    quicken_head(build_model("llama").model)  # has none


def test_a_saved_exact_head_is_the_weight(make_checkpoint, tmp_path):
    _, out = make_checkpoint("llama")
    matgptq.load(out, 8).save_pretrained(tmp_path / "again")
    tokens = token_ids()[:1, :5]
    again, expected = (matgptq.load(path, 8)(input_ids=tokens).logits for path in (tmp_path / "again", out))
    assert torch.equal(again, expected)


# ---- at a few bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt_neox", "opt"])
def test_head_bits(name, make_checkpoint):
    _, out = make_checkpoint(name, torch.float32)
    exact = matgptq.load(out, 8)
    expected = exact(input_ids=token_ids()[:2, :9]).logits
    distances = []
    for bits in (2, 4, 6, 8):
        model = matgptq.load(out, 8, head_bits=bits)
        assert isinstance(model.get_output_embeddings(), PackedHead)
        logits = model(input_ids=token_ids()[:2, :9]).logits
        distances.append(((logits - expected).norm() / expected.norm()).item())
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.02


def test_the_full_precision_head_is_what_is_saved(make_checkpoint, tmp_path):
    _, out = make_checkpoint("llama")
    model = matgptq.load(out, 8, head_bits=2)
    model.save_pretrained(tmp_path / "again")
    tokens = token_ids()[:1, :5]
    again, expected = (matgptq.load(path, 8)(input_ids=tokens).logits for path in (tmp_path / "again", out))
    assert torch.equal(again, expected)


def _resized(model):
    model.resize_token_embeddings(300, mean_resizing=False)


def _merged(model):
    model.get_output_embeddings().weight.data += 0.01


def _edited(model):
    with torch.no_grad():
        model.get_output_embeddings().weight[:7] = 0


def _replaced(model):
    other = torch.linspace(-1, 1, 288 * 64).view(288, 64)  # not what few bits hold exactly
    model.get_output_embeddings().weight = torch.nn.Parameter(other, requires_grad=False)


def _put_in_place(model):
    weight = model.get_output_embeddings().weight
    weight.data = weight.data + 1


def _trained(model):
    model.get_output_embeddings().weight.requires_grad_()


@pytest.mark.parametrize(
    "change", [_resized, _edited, _replaced, _put_in_place, _trained], ids=lambda f: f.__name__[1:]
)
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_head_that_was_changed_is_the_one_that_serves(copied, name, change, make_checkpoint):
    model = matgptq.load(make_checkpoint(name, torch.float32)[1], 8, head_bits=2)
    if copied:
        model = copy.deepcopy(model)
    change(model)
    head = model.get_output_embeddings()
    x = torch.randn(3, 64)
    logits = head(x)
    torch.testing.assert_close(logits, torch.nn.functional.linear(x, head.weight))
    assert logits.requires_grad == (change is _trained)
    if change is not _trained:
        assert not getattr(copy.deepcopy(head), "is_current", False)  # resizing may make a plain one of it
        pack_head(model, 8)
        assert 0 < (model.get_output_embeddings()(x) - logits).abs().max() < 0.1 * logits.abs().max()


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_head_that_was_copied_or_cast_is_still_packed(name, make_checkpoint):
    model = matgptq.load(make_checkpoint(name, torch.float32)[1], 8, head_bits=2)
    x = torch.randn(3, 64)
    expected = model.get_output_embeddings()(x)
    twice_cast = copy.deepcopy(model).bfloat16().double()
    for twin in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model).bfloat16()), copy.copy(model), twice_cast):
        head = twin.get_output_embeddings()
        assert head.is_current
        assert torch.equal(head(x), expected)
    compiled = torch.compile(model.get_output_embeddings(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


def test_head_bits_are_checked(make_checkpoint):
    _, out = make_checkpoint("llama")
    with pytest.raises(ConfigurationError, match="1"):
        matgptq.load(out, head_bits=1)
    with pytest.raises(ConfigurationError, match="head_bits=8 needs the native kernels"):
        matgptq.load(out, head_bits=8, dtype="float16")
    with pytest.raises(UnsupportedModelError, match="lm_head"):
        pack_head(build_model("llama", hidden_size=40, head_dim=10), 8)
