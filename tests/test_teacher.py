"""The compact teacher against full logits, and the stated bound on the error of a KL."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import MODELS, VOCAB, build_model, token_ids
from torch import nn

from matgptq.models.divergence import Predictor, compare
from matgptq.models.logits import OutputHead, last_hidden, output_head
from matgptq.models.teacher import observe


def kl_error_bound(kl: float, logit_error: float) -> float:
    """How far ``KL(teacher || other)`` at a position can be off if the teacher's logits are off by ``logit_error``.

    ``(exp(2d) - 1) (KL + sqrt(2 KL)) + d^2 / 2``: with p' for the teacher that is off,
    ``KL' - KL = sum (p' - p) log(p/q) + KL(p' || p)``. Every log-probability moves by at most 2d, and
    ``E_p |log(p/q)| <= KL + sqrt(2 KL)`` by Pinsker's inequality; ``KL(p' || p) <= d^2 / 2`` by Hoeffding's lemma.

    Args:
        kl: at that position, in nats.
        logit_error: d.
    """
    return math.expm1(2 * logit_error) * (kl + math.sqrt(2 * kl)) + logit_error**2 / 2


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_reproduced_from_its_hidden_states(name: str) -> None:
    model = build_model(name, **({"final_logit_softcapping": 3.0} if name in ("gemma2", "gemma3_text") else {}))
    windows = token_ids(2, 12)
    teacher = observe(model, windows)
    assert teacher.vocabulary == VOCAB
    with torch.no_grad():
        for index, window in enumerate(windows):
            expected = torch.log_softmax(model(input_ids=window[None]).logits[0], -1)
            assert torch.allclose(teacher.log_probabilities(index, slice(None)), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_is_that_of_full_logits(dtype: torch.dtype) -> None:
    full, other = build_model("llama", dtype), build_model("llama-biased", dtype)
    windows = token_ids(3, 16)
    teacher = observe(full, windows)
    assert teacher.hidden.dtype == dtype
    head = output_head(other)
    expected = []
    with torch.no_grad():
        for window in windows:
            p, q = (torch.log_softmax(model(input_ids=window[None]).logits[0].double(), -1) for model in (full, other))
            expected.append((p.exp() * (p - q)).sum(-1))
        found = teacher.mean_kl(lambda index: last_hidden(other, windows[index : index + 1])[0], head)
    assert found == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(2, 400),
    spread=st.floats(0.1, 12),
    distance=st.floats(1e-3, 4),
    error=st.floats(1e-6, 0.5),
)
def test_bound_on_the_kl_error(seed: int, vocabulary: int, spread: float, distance: float, error: float) -> None:
    generator = torch.Generator().manual_seed(seed)

    def noise() -> torch.Tensor:
        return torch.randn(8, vocabulary, generator=generator, dtype=torch.float64)

    logits = noise() * spread
    other = torch.log_softmax(logits + noise() * distance, -1)
    exact = torch.log_softmax(logits, -1)
    # Errors at the ends of the interval are the worst ones.
    off = torch.log_softmax(logits + error * noise().sign(), -1)
    kl, kl_off = ((p.exp() * (p - other)).sum(-1) for p in (exact, off))
    for value, value_off in zip(kl.tolist(), kl_off.tolist(), strict=True):
        assert abs(value_off - value) <= kl_error_bound(max(value, 0.0), error) + 1e-12


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), hidden=st.integers(1, 96), vocabulary=st.integers(2, 700), size=st.floats(0.1, 30))
def test_recomputed_logits_keep_the_bound(seed: int, hidden: int, vocabulary: int, size: float) -> None:
    """What is cached is enough: the KL differs from the one in float64 by no more than rounding of logits allows."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(hidden, vocabulary, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(vocabulary, hidden, generator=generator) / math.sqrt(hidden))
    states = torch.randn(1, 5, hidden, generator=generator) * size
    as_they_are = OutputHead(nn.Identity(), None)
    logits = states[0].double() @ head.weight.detach().double().T
    others = logits + torch.randn(5, vocabulary, generator=generator)
    p, q = torch.log_softmax(logits, -1), torch.log_softmax(others.float().double(), -1)
    exact = (p.exp() * (p - q)).sum(-1)
    error = float(hidden * 2**-23 * (states[0].abs() @ head.weight.detach().abs().T).max()) + 1e-5
    predictors = [Predictor(OutputHead(head, None), states[0]), Predictor(as_they_are, others.float())]
    for value, found in zip(exact.tolist(), compare(predictors)[1].kl.tolist(), strict=True):
        assert abs(found - value) <= kl_error_bound(max(value, 0.0), error) + 1e-5
