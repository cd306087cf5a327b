"""The two native calls of a block against PyTorch, step by step: products by unit matrices leave the steps visible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matgptq import native
from matgptq.errors import ConfigurationError
from matgptq.native import BlockCalls, RMSNorm
from matgptq.slicing import PARENT_BITS, ZERO_POINT

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native library: {native.reason()}")

EPS, SCALE = 1e-5, 0.1
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def normals(dtype: torch.dtype, seed: int) -> Callable[..., Tensor]:
    """Values of bfloat16 in either dtype, which products by ones do not round."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator).bfloat16().to(dtype)


def packed(matrix: Tensor) -> native.Weight:
    """A matrix of zeros and ones."""
    codes = (matrix + ZERO_POINT).to(torch.uint8)
    return native.pack_slice(codes, torch.ones(len(codes), 1), PARENT_BITS)


class Block:
    """Calls of a block whose products are by unit matrices, but for those that are to give nothing.

    Args:
        norms: the first of a block's, or all of them.
        options: more, as of ``BlockCalls``.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        heads: int,
        key_heads: int,
        size: int,
        norms: list[Tensor | None],
        **options: Any,
    ) -> None:
        self._options = options
        norms = norms + [None] * (6 - len(norms))
        hidden, keys = heads * size, key_heads * size
        unit, none = torch.eye(hidden), torch.zeros(hidden, hidden)
        self.gated = [packed(each) for each in (unit, unit[:keys], unit[:keys], unit, unit, unit, unit)]
        self.ungated = [*self.gated[:6], packed(none)]
        self._norms = [None if norm is None else RMSNorm(norm, EPS) for norm in norms]
        self._dtype, self._size = dtype, size

    def calls(self, weights: list[native.Weight]) -> BlockCalls:
        widths = [PARENT_BITS] * 7
        return BlockCalls(self._dtype, weights, widths, [None] * 7, self._norms, self._size, SCALE, **self._options)


def normed(x: Tensor, weight: Tensor, from_one: bool = False) -> Tensor:
    wide = x.float()
    factor = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if from_one:
        return (wide * factor * (1 + weight.float())).to(x.dtype)
    return weight * (wide * factor).to(x.dtype)


@DTYPES
@pytest.mark.parametrize("with_head_norms", [False, True], ids=["plain", "head norms"])
@pytest.mark.parametrize("size", [2, 6, 30, 64, 130])
def test_steps_round_where_transformers_rounds(size, with_head_norms, dtype):
    normal, heads, key_heads = normals(dtype, size), 4, 2
    hidden = heads * size
    norms = [normal(hidden), normal(hidden), *([normal(size), normal(size)] if with_head_norms else [])]
    block = Block(dtype, heads, key_heads, size, norms)
    x, cosine, sine = normal(1, hidden), normal(1, 1, size), normal(1, 1, size)
    unit = torch.finfo(dtype).eps
    rounded = 2**-21 if dtype == torch.float32 else 0.0  # by the product, of the largest

    qkv = block.calls(block.gated).start(x, cosine, sine)[0, :, 0]
    query, key, value = qkv.split([heads, key_heads, key_heads])
    expected = normed(x, norms[0]).view(heads, size)
    limit = rounded * float(expected.abs().max())
    torch.testing.assert_close(value, expected[:key_heads], rtol=2 * unit, atol=limit)
    if not with_head_norms:
        turned = torch.cat([-value[:, size // 2 :], value[:, : size // 2]], 1)
        assert torch.equal(key, value * cosine[0] + turned * sine[0])
        assert torch.equal(query[:key_heads], key)
    else:
        for found, norm in ((query[:key_heads], norms[2]), (key, norms[3])):
            head = normed(value, norm)
            turned = torch.cat([-head[:, size // 2 :], head[:, : size // 2]], 1)
            wanted = head * cosine[0] + turned * sine[0]
            torch.testing.assert_close(found, wanted, rtol=4 * unit, atol=4 * unit * float(wanted.abs().max()))

    attended = normal(1, hidden)
    residual = x.clone()
    block.calls(block.ungated).finish(residual, attended)
    assert torch.equal(residual, x + attended)
    found = x.clone()
    block.calls(block.gated).finish(found, attended)
    gate = normed(residual, norms[1])
    update = nn.functional.silu(gate) * gate
    limit = 2 * unit * float(update.abs().max())
    torch.testing.assert_close(found, residual + update, rtol=4 * unit, atol=limit)


@DTYPES
@pytest.mark.parametrize("from_one", [False, True], ids=["weight", "1 + weight"])
@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("size", [2, 30, 64])
def test_what_is_added_is_normed(size, gate, from_one, dtype):
    normal, heads = normals(dtype, size), 2
    hidden = heads * size
    norms = [normal(hidden), normal(hidden), None, None, normal(hidden), normal(hidden)]
    block = Block(dtype, heads, heads, size, norms, gate=gate, norms_from_one=from_one)
    unit = torch.finfo(dtype).eps

    x, attended = normal(1, hidden), normal(1, hidden)
    residual = x.clone()
    block.calls(block.ungated).finish(residual, attended)
    update = normed(attended, norms[4], from_one)
    torch.testing.assert_close(residual, x + update, rtol=2 * unit, atol=2 * unit * float(update.abs().max()))

    found = x.clone()
    block.calls(block.gated).finish(found, attended)
    inner = normed(residual, norms[1], from_one)
    gated = nn.functional.silu(inner) if gate == "silu" else nn.functional.gelu(inner, approximate="tanh")
    update = normed(gated * inner, norms[5], from_one)
    torch.testing.assert_close(found, residual + update, rtol=4 * unit, atol=8 * unit * float(update.abs().max()))


@DTYPES
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(1, 1, 32), (9, 3, 64), (8, 1, 96), (4, 4, 128)])
def test_attention_of_a_token(heads, key_heads, size, dtype):
    normal = normals(dtype, 0)
    hidden = heads * size
    block = Block(dtype, heads, key_heads, size, [torch.ones(hidden, dtype=dtype)] * 2)
    calls = block.calls(block.ungated)
    assert native.attends(size)
    for length in (*range(1, 18), 31, 33, 64, 500):
        sequences = 1 + length % 4
        qkv = normal(sequences, heads + 2 * key_heads, 1, size)
        store = normal(2, sequences, key_heads, length + 3, size + 5)
        keys, values = store[..., 1 : length + 1, :size]
        assert all(map(calls.reads, (keys, values)))
        found, appended = torch.zeros(2, sequences, hidden, dtype=dtype)
        calls.attend(found, qkv, keys, values)
        check_attention(found, qkv[:, :heads], keys, values)
        first = [number * (length - 1) // 3 for number in range(sequences)]
        padded = torch.zeros_like(found)
        calls.attend(padded, qkv, keys, values, first=first)
        for sequence, begin in enumerate(first):
            one = slice(sequence, sequence + 1)
            check_attention(padded[one], qkv[one, :heads], keys[one, :, begin:], values[one, :, begin:])
        calls.attend(appended, qkv, keys, values, append=True)
        for held, last in zip((keys, values), qkv[:, heads:].split(key_heads, 1), strict=True):
            assert torch.equal(held[:, :, -1:], last)
        check_attention(appended, qkv[:, :heads], keys, values)
    assert not calls.reads(keys.double())
    assert not calls.reads(keys.mT.contiguous().mT)


def check_attention(found: Tensor, query: Tensor, keys: Tensor, values: Tensor) -> None:
    wanted = nn.functional.scaled_dot_product_attention(
        query.double(), keys.double(), values.double(), scale=SCALE, enable_gqa=True
    )
    tolerance = 1e-5 if found.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), wanted.flatten(1), rtol=tolerance, atol=tolerance)


def test_what_the_library_refuses():
    block = Block(torch.float32, 2, 1, 16, [torch.ones(32)] * 2)
    calls = block.calls(block.gated)
    assert not native.attends(16)
    held = torch.zeros(1, 1, 3, 16)
    with pytest.raises(ConfigurationError, match="null, negative or not a known value"):
        calls.attend(torch.zeros(1, 32), torch.zeros(1, 4, 1, 16), held, held)
