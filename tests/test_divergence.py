"""Predictions compared a part of the vocabulary at a time, against formulas on whole logits in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB, build_model, token_ids
from torch import Tensor, nn

from matgptq.errors import UnsupportedModelError
from matgptq.inference.output_head import DenseHead, PackedHead
from matgptq.models import divergence, logits
from matgptq.models.divergence import Predictor, compare, kl_gradient, normalizers
from matgptq.models.logits import OutputHead, chunks, output_head, softmax_


def make_head(
    hidden: int, vocabulary: int, seed: int, *, bias: bool = False, softcap: float | None = None
) -> OutputHead:
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(hidden, vocabulary, bias).requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return OutputHead(module, softcap)


def double_logits(predictor: Predictor) -> Tensor:
    module = predictor.head.module
    logits = predictor.states.double() @ module.weight.double().T
    if module.bias is not None:
        logits = logits + module.bias.double()
    cap = predictor.head.softcap
    return logits if cap is None else torch.tanh(logits / cap) * cap


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "_CPU_PART", (3, 7))
    monkeypatch.setattr(logits, "CHUNK_ELEMENTS", 70)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    positions=st.integers(1, 9),
    hidden=st.integers(1, 12),
    vocabulary=st.integers(1, 40),
    rows=st.integers(1, 9),
    words=st.integers(1, 41),
    size=st.floats(0.01, 20),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 5.0]),
)
def test_everything_equals_formulas(
    seed: int, positions: int, hidden: int, vocabulary: int, rows: int, words: int, size: float, bias: bool,
    softcap: float | None,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(positions, hidden, generator=generator) * size for _ in range(3)]
    predictors = [
        Predictor(make_head(hidden, vocabulary, seed % 1000 + index, bias=bias, softcap=softcap), each)
        for index, each in enumerate(states)
    ]
    tokens = torch.randint(vocabulary, (positions,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divergence, "_CPU_PART", (rows, words))
        found = compare(predictors, tokens)
    exact = [torch.log_softmax(double_logits(each), -1) for each in predictors]
    largest = max(float(double_logits(each).abs().max()) for each in predictors)
    error = hidden * 2**-22 * (1 + largest * 10)
    for each, expected in zip(found, exact, strict=True):
        kl = (exact[0].exp() * (exact[0] - expected)).sum(-1)
        assert torch.allclose(each.kl, kl, rtol=1e-4, atol=error)
        of_tokens = expected.gather(1, tokens[:, None])[:, 0]
        assert each.log_probability is not None
        assert torch.allclose(each.log_probability, of_tokens, rtol=1e-5, atol=error)
        chosen = expected.gather(1, each.most_probable[:, None])[:, 0]
        assert torch.all(chosen >= expected.amax(-1) - error)


def test_of_equal_logits_the_first_word_counts_in_whatever_part(small_parts: None) -> None:
    values = torch.tensor([[1.0, 5.0, 0.0, 2.0, 0.0, 5.0, 0.0, 0.0, 5.0, 4.0], [3.0] * 10, [0.0] * 9 + [1.0]])
    head = OutputHead(nn.Linear(10, 10, bias=False).requires_grad_(False), None)
    head.module.weight.copy_(torch.eye(10))
    assert compare([Predictor(head, values)])[0].most_probable.tolist() == [1, 0, 9]


def test_positions_are_told_and_kl_of_the_first_is_zero(small_parts: None) -> None:
    head, told = make_head(4, 30, 0), []
    found = compare([Predictor(head, torch.randn(8, 4))] * 2, tick=told.append)
    assert told == [3, 3, 2]
    assert found[0].kl.tolist() == [0] * 8
    assert found[1].kl.abs().max() < 1e-6
    assert found[0].log_probability is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_told(small_parts: None, value: float) -> None:
    head = make_head(4, 30, 0)
    states = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    broken = states.clone()
    broken[3, 1] = value
    found = compare([Predictor(head, states), Predictor(head, broken)], torch.zeros(5, dtype=torch.int64))[1]
    assert found.kl.isfinite().tolist() == [True, True, True, False, True]
    assert found.log_probability is not None
    assert found.log_probability.isfinite().tolist() == [True, True, True, False, True]


def test_a_probability_beyond_float32_counts(small_parts: None) -> None:
    head = OutputHead(nn.Identity(), None)
    found = compare([Predictor(head, torch.tensor([[0.0, 1e6]]))], torch.tensor([0]))[0]
    assert found.log_probability is not None
    assert found.log_probability.tolist() == [-1e6]


def test_few_bit_heads_and_hooks_are_seen(small_parts: None) -> None:
    module = nn.Linear(64, 30, bias=False).requires_grad_(False)
    packed, dense = PackedHead(module, 3), DenseHead(module)
    states = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    heads = [OutputHead(each, None) for each in (module, packed, dense)]
    assert [head.has_parts for head in heads] == [True, False, True]
    plain, few, exact = (compare([Predictor(heads[0], states), Predictor(head, states)])[1].kl for head in heads)
    assert plain.max() < 1e-6
    assert exact.max() < 1e-5
    p, q = (torch.log_softmax(head(states).double(), -1) for head in heads[:2])
    assert torch.allclose(few, (p.exp() * (p - q)).sum(-1), atol=1e-5)
    assert few.min() > 1e-4
    handle = module.register_forward_hook(lambda *arguments: arguments[-1] * 2)
    assert compare([Predictor(heads[2], states), Predictor(heads[0], states)])[1].kl.min() > 1e-3
    handle.remove()


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("hooked", [False, True])
def test_the_gradient_is_that_of_autograd(small_parts: None, softcap: float | None, hooked: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    states = [torch.randn(10, 6, generator=generator) for _ in range(2)]
    full, other = (
        Predictor(make_head(6, 25, index, bias=True, softcap=softcap), each) for index, each in enumerate(states)
    )
    leaf = other.states.clone().requires_grad_()
    p, q = (torch.log_softmax(double_logits(each), -1) for each in (full, other._replace(states=leaf)))
    (p.exp() * (p - q)).sum(-1).mean().backward()
    if hooked:
        other.head.module.register_forward_hook(lambda *arguments: arguments[-1] * 1)
    found = kl_gradient(full, normalizers(full), other)
    assert leaf.grad is not None
    assert torch.allclose(found, leaf.grad, rtol=1e-4, atol=1e-6)
    assert not other.states.requires_grad


def test_normalizers(small_parts: None) -> None:
    predictor = Predictor(make_head(5, 33, 2), torch.randn(8, 5) * 4)
    assert torch.allclose(normalizers(predictor), double_logits(predictor).logsumexp(-1), rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 5), (7, 33), (3, 1 << 18)])
def test_softmax_in_place(shape: tuple[int, int]) -> None:
    values = torch.randn(shape) * 10
    expected = torch.softmax(values.double(), -1)
    found = softmax_(values)
    assert found.data_ptr() == values.data_ptr()
    assert torch.allclose(found.double(), expected, rtol=1e-4)


def test_chunks_cover_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "CHUNK_ELEMENTS", 3 * VOCAB)
    assert [piece.stop - piece.start for piece in chunks(16, VOCAB)] == [3, 3, 3, 3, 3, 1]
    assert [piece.stop - piece.start for piece in chunks(2, 100 * VOCAB)] == [1, 1]


def test_parts_of_a_model_s_head_are_its_logits() -> None:
    model = build_model("gemma2", final_logit_softcapping=3.0)
    head = output_head(model)
    with torch.no_grad():
        states = model.base_model(input_ids=token_ids(1, 12)).last_hidden_state[0]
        whole, part = head(states), head.parts(states)(slice(3, 8))
    assert head.vocabulary(states) == VOCAB
    assert torch.allclose(part, whole[:, 3:8], atol=1e-6)


def test_an_unknown_treatment_of_logits_is_refused() -> None:
    model = build_model("llama")
    original = model.forward

    def scaled(**arguments: object) -> object:
        output = original(**arguments)
        output.logits = output.logits * 3
        return output

    model.forward = scaled
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        output_head(model)
