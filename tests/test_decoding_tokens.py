"""A few tokens of each sequence through all blocks in one call, against transformers' own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_models import PLAIN, token_ids
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import matgptq
from matgptq import native
from matgptq.inference import block_stack
from matgptq.inference.block_stack import MOST_TOKENS, BlockStack
from matgptq.inference.decoding import RowBlock
from matgptq.kernels import kernel_choice
from matgptq.models.kv_cache import CACHE_ARGUMENT

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native library: {native.reason()}")


@pytest.fixture
def checkpoint(plain_checkpoint: Callable[..., str]) -> Callable[..., str]:
    return plain_checkpoint


@pytest.fixture
def llama(checkpoint: Callable[..., str]) -> nn.Module:
    return matgptq.load(checkpoint("llama"), 8, device="cpu")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens of each sequence went the short way, an entry for each call that did."""
    seen: list[int] = []
    run = BlockStack.run

    def noted(self: BlockStack, base: nn.Module, given: Tensor, *more: object) -> Tensor | None:
        hidden = run(self, base, given, *more)
        seen.extend([] if hidden is None else [given.shape[1]])
        return hidden

    monkeypatch.setattr(BlockStack, "run", noted)
    return seen


@contextmanager
def long_way() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_stack, "MOST_TOKENS", 0)
        patch.setattr(RowBlock, "takes", lambda *_: False)
        yield


def read(model: nn.Module, ids: Tensor, *cuts: int, cache: object = None, **options: object) -> tuple[Tensor, object]:
    """Logits of all tokens, which are given in pieces that end before the cuts, and the cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits = []
    with torch.inference_mode():
        for begin, end in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
            output = model(ids[:, begin:end], **{CACHE_ARGUMENT: cache}, use_cache=True, **options)
            logits.append(output.logits.float())
    return torch.cat(logits, 1), cache


def assert_alike(found: Tensor, expected: Tensor, dtype: str = "float32") -> None:
    # bfloat16 keeps 8 bits: where attention's sum goes the other way, so does all that follows.
    tolerance = 1e-5 if dtype == "float32" else 0.03
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [32, 96])
@pytest.mark.parametrize("name", PLAIN)
def test_tokens_compute_what_transformers_computes(name, head_dim, dtype, checkpoint, taken):
    model = matgptq.load(checkpoint(name, head_dim), 4, device="cpu", dtype=dtype)
    for sequences, cuts in ((1, (3, 15)), (1, (12, 13)), (2, (5, 9)), (3, (1, 5))):
        ids = token_ids(sequences, 17)
        taken.clear()
        found, cache = read(model, ids, *cuts)
        assert taken == [cuts[0], cuts[1] - cuts[0], 17 - cuts[1]]
        with long_way():
            expected, expected_cache = read(model, ids, *cuts)
        assert len(taken) == 3
        assert_alike(found, expected, dtype)
        for layer, wanted in zip(cache.layers, expected_cache.layers, strict=True):
            assert_alike(layer.keys.float(), wanted.keys.float(), dtype)
            assert_alike(layer.values.float(), wanted.values.float(), dtype)


@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_any_number_of_tokens(activations, checkpoint, taken):
    model = matgptq.load(checkpoint("qwen3"), 3, device="cpu", activations=activations)
    for tokens in (*range(1, 18), 31, 33, MOST_TOKENS):
        ids = token_ids(1, 6 + tokens, seed=tokens)
        found, _ = read(model, ids, 6)
        with long_way():
            expected, _ = read(model, ids, 6)
        # Where attention's sum goes the other way, so may an activation that is rounded to 8 bits.
        assert_alike(found, expected, "float32" if activations == "exact" else "bfloat16")
    taken.clear()
    read(model, token_ids(1, MOST_TOKENS + 1))
    assert not taken


def test_padded_sequences(checkpoint, taken):
    model = matgptq.load(checkpoint("qwen3"), 8, device="cpu")
    ids, mask = token_ids(3, 12), torch.ones(3, 12, dtype=torch.int64)
    mask[0, :4] = mask[2, :6] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def second_piece() -> Tensor:
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            for piece in (slice(0, 8), slice(8, 12)):
                output = model(
                    ids[:, piece], attention_mask=mask[:, : piece.stop], position_ids=positions[:, piece],
                    **{CACHE_ARGUMENT: cache}, use_cache=True,
                )  # fmt: skip
        return output.logits

    found = second_piece()
    assert taken == [4]  # in the first piece there is padding
    with long_way():
        expected = second_piece()
    assert_alike(found, expected)
    for number in range(3):
        seen = mask[number].bool()
        with long_way():
            alone, _ = read(model, ids[number : number + 1, seen])
        assert_alike(found[number], alone[0, -4:])


@pytest.mark.parametrize(
    ("options", "short"),
    [
        ({}, True),
        ({"attention_mask": torch.ones(1, 12, dtype=torch.int64)}, True),
        ({"attention_mask": torch.arange(12)[None] > 4}, True),
        ({"attention_mask": torch.arange(12)[None] != 4}, False),
        ({"attention_mask": torch.arange(12)[None] > 7}, False),
        ({"attention_mask": torch.arange(12)[None] != 11}, False),
        ({"attention_mask": torch.zeros(1, 1, 5, 12)}, False),
        ({"position_ids": torch.arange(7, 12)[None]}, True),
        ({"position_ids": torch.tensor([[7, 8, 7, 8, 9]])}, True),
        ({"output_hidden_states": True}, False),
        ({"use_cache": False}, True),
    ],
)
def test_what_a_caller_asks_for(options, short, llama, taken):
    def some_tokens() -> Tensor:
        _, cache = read(llama, token_ids(1, 7))
        with torch.inference_mode():
            return llama(token_ids(1, 5, seed=2), **{CACHE_ARGUMENT: cache}, **options).logits

    found = some_tokens()
    assert taken == ([7, 5] if short else [7])
    with long_way():
        expected = some_tokens()
    assert_alike(found[:, -1:], expected[:, -1:])
    if options.get("attention_mask") is None or options["attention_mask"].ndim == 2:
        assert_alike(found, expected)


@pytest.mark.parametrize(("positions", "short"), [([0, 1, 2, 3, 4, 5], True), ([0, 1, 2, 0, 1, 2], False)])
def test_sequences_that_are_packed_into_one_go_the_long_way(positions, short, llama, taken):
    options = {"position_ids": torch.tensor([positions])}
    found, _ = read(llama, token_ids(1, 6), **options)
    assert taken == ([6] if short else [])
    with long_way():
        expected, _ = read(llama, token_ids(1, 6), **options)
    assert_alike(found, expected)


@pytest.mark.parametrize("kind", ["static", "without configuration"])
def test_other_caches(kind, llama, taken):
    make = {
        "static": lambda: StaticCache(config=llama.config, max_cache_len=32),
        "without configuration": DynamicCache,
    }[kind]
    found, _ = read(llama, token_ids(1, 9), 4, cache=make())
    assert taken == ([] if kind == "static" else [4, 5])
    with long_way():
        expected, _ = read(llama, token_ids(1, 9), 4, cache=make())
    assert_alike(found, expected)


def test_more_rows_than_are_fused_go_the_long_way(llama, taken, monkeypatch):
    monkeypatch.setattr(kernel_choice, "fused_rows", lambda _: 6)
    kernel_choice._choose.cache_clear()
    try:
        for sequences, tokens in ((1, 6), (1, 7), (2, 3), (2, 4)):
            taken.clear()
            found, _ = read(llama, token_ids(sequences, 4 + tokens), 2)
            assert taken == ([2, 2 + tokens] if sequences * (2 + tokens) <= 6 else [2])
            with long_way():
                expected, _ = read(llama, token_ids(sequences, 4 + tokens), 2)
            assert_alike(found, expected)
    finally:
        kernel_choice._choose.cache_clear()


@pytest.mark.parametrize("together", [False, True])
def test_where_each_token_attends_alone_there_is_a_limit(together, llama, taken, monkeypatch):
    """As many positions as all tokens see, but for one token and where matrix units attend."""
    monkeypatch.setattr(block_stack, "MOST_SEEN", 60)
    monkeypatch.setattr(native, "attends_to_many", lambda dtype: together and dtype is torch.float32)
    found, _ = read(llama, token_ids(1, 90), 6, 10, 15, 16)
    assert taken == ([6, 4, 5, 1, 74] if together else [6, 4, 1])
    with long_way():
        expected, _ = read(llama, token_ids(1, 90), 6, 10, 15, 16)
    assert_alike(found, expected)


def test_gradients_and_hooks_go_the_long_way(llama, taken):
    llama(token_ids(1, 5), use_cache=True, **{CACHE_ARGUMENT: DynamicCache(config=llama.config)})
    assert not taken
    embedded = llama.get_input_embeddings()(token_ids(1, 5)).detach().requires_grad_()
    llama(inputs_embeds=embedded, use_cache=True).logits.sum().backward()
    assert torch.isfinite(embedded.grad).all()
    assert not taken
    seen = []
    llama.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    read(llama, token_ids(1, 5))
    assert seen == [1]
    assert not taken


def test_embedded_tokens(llama, taken):
    ids = token_ids(1, 6)
    with torch.inference_mode():
        embedded = llama.get_input_embeddings()(ids)
        before = embedded.clone()
        found = llama(inputs_embeds=embedded, use_cache=True, **{CACHE_ARGUMENT: DynamicCache()}).logits
    assert taken == [6]
    assert torch.equal(embedded, before)
    with long_way():
        expected, _ = read(llama, ids)
    assert_alike(found, expected)


def test_a_draft_of_fewer_bits(llama, taken):
    """What a draft model proposed is looked at in one call; the text is that of the model alone."""
    draft = llama.copy_at(2)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with long_way():
        alone = llama.generate(token_ids(1, 5), **options)
    assert not taken
    together = llama.generate(token_ids(1, 5), assistant_model=draft, **options)
    assert torch.equal(together, alone)
    assert any(tokens > 1 for tokens in taken[1:])


def test_a_cropped_cache_goes_on_where_it_ends(llama):
    ids = token_ids(1, 14)
    with long_way():
        expected, _ = read(llama, ids)
    found, cache = read(llama, ids[:, :9], 4)
    cache.crop(-3)
    again, _ = read(llama, ids[:, 6:], 2, cache=cache)
    assert_alike(torch.cat([found[:, :6], again], 1), expected)
