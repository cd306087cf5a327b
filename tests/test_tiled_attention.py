"""Causal attention in tiles against PyTorch's, forward and backward, and what is left to PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from matgptq.machine import tiled_attention
from matgptq.machine.tiled_attention import TiledAttention, causal_attention


def parts(heads: int, key_heads: int, tokens: int, size: int = 16, value_size: int | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(heads, size), (key_heads, size), (key_heads, value_size or size)]
    made = [torch.randn(2, count, tokens, each, generator=generator).bfloat16() for count, each in shapes]
    return [each.requires_grad_() for each in made]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found.float() - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("tokens", [1, 2, 31, 64, 65, 200, 300])
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (6, 2), (4, 4), (12, 1)])
@pytest.mark.parametrize("value_size", [16, 8])
def test_output_and_gradients(heads: int, key_heads: int, tokens: int, value_size: int) -> None:
    query, key, value = parts(heads, key_heads, tokens, value_size=value_size)
    plain = [each.detach().float().requires_grad_() for each in (query, key, value)]
    expected = scaled_dot_product_attention(*plain, is_causal=True, enable_gqa=True, scale=0.3)
    found = causal_attention(query, key, value, 0.3)
    assert found.dtype == torch.bfloat16
    assert relative(found, expected) < 0.01
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(upstream)
    found.backward(upstream.bfloat16())
    for mine, theirs in zip((query, key, value), plain, strict=True):
        if float(theirs.grad.norm()) > 1e-3:  # a single token has no gradient in its scores
            # Of two tokens the gradient is a small difference of what was rounded.
            assert relative(mine.grad, theirs.grad) < (0.02 if tokens > 2 else 0.1)


def test_large_scores_do_not_overflow() -> None:
    query, key, value = parts(2, 1, 64)
    found = causal_attention(query * 100, key * 100, value, 1.0)
    assert torch.isfinite(found).all()


def test_the_mode_takes_causal_attention_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        tiled_attention, "causal_attention", lambda *given: calls.append(given[3]) or causal_attention(*given)
    )
    query, key, value = (each.detach().float() for each in parts(4, 2, 256))
    with TiledAttention():
        found = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        assert calls == [0.25]
        assert (
            relative(
                found, scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=0.25)
            )
            < 1e-2
        )
        calls.clear()
        mask = torch.ones(256, 256, dtype=torch.bool).tril()
        masked = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        scaled_dot_product_attention(query, key, value, enable_gqa=True)
        scaled_dot_product_attention(
            query[:, :, :255], key[:, :, :255], value[:, :, :255], is_causal=True, enable_gqa=True
        )
        scaled_dot_product_attention(query[:, :, :1], key, value, is_causal=True, enable_gqa=True)
    assert not calls
    assert relative(found, masked) < 1e-2
    scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert not calls
