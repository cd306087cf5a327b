"""Requests that are answered together get what each of them gets alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import GROUP_SIZE, make_tokenizer, save_model, token_ids
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

import matgptq
from matgptq import block_stack, native
from matgptq.block_stack import next_logits, takes_groups
from matgptq.kv_cache import CACHE_ARGUMENT
from matgptq.serving import decoding_loop
from matgptq.serving.decoding_loop import DecodingLoop, TextRequest
from matgptq.width_copies import copy_at

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native library: {native.reason()}")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    shape = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    source = save_model("llama", directory / "source", torch.float32, shape=shape)
    matgptq.quantize(source, directory / "out", method="rtn", group_size=GROUP_SIZE)
    return directory / "out"


@pytest.fixture
def model(out: Path) -> Any:
    return matgptq.load(out, 4, device="cpu")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each step, how many texts it was for."""
    seen: list[int] = []

    def counted(model: Any, tokens: Tensor, caches: list[Any]) -> Tensor:
        seen.append(len(caches))
        return next_logits(model, tokens, caches)

    monkeypatch.setattr(decoding_loop, "next_logits", counted)
    return seen


class Listener:
    """A streamer: keeps what it is told, and may hold the loop up or break off."""

    def __init__(self, gate: threading.Event | None = None, last: int = 1000) -> None:
        self.told: list[list[int]] = []
        self.ends = 0
        self._gate, self._last = gate, last

    def put(self, tokens: Tensor) -> None:
        if self._gate is not None:
            assert self._gate.wait(60)
        if len(self.told) == self._last:
            raise ConnectionError("gone")
        self.told.append(tokens.flatten().tolist())

    def end(self) -> None:
        self.ends += 1


def prompt(length: int) -> Tensor:
    return token_ids(1, length, seed=length)


def ask(
    loop: DecodingLoop, model: Any, ids: Tensor, streamer: Any = None, seed: int | None = None, **options: Any
) -> Any:
    settings = GenerationConfig(**{"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options})
    arguments = {"input_ids": ids, "generation_config": settings, "tokenizer": make_tokenizer()}
    request = TextRequest(model, arguments, streamer, seed)
    loop.submit(request)
    return request.answer


def ask_together(model: Any, requests: list[dict[str, Any]], parallel: int = 8) -> list[Any]:
    """Futures of requests that are all there before the first of them is answered."""
    loop, gate = DecodingLoop(parallel), threading.Event()
    ask(loop, model, prompt(3), Listener(gate))
    futures = [ask(loop, **{"model": model, **request}) for request in requests]
    gate.set()
    return futures


def alone(model: Any, ids: Tensor, **options: Any) -> Tensor:
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, **settings, tokenizer=make_tokenizer())


def test_each_gets_its_text(model: Any, steps: list[int]) -> None:
    other = copy_at(model, 2)
    requests = [
        {"model": (model, other)[number % 2], "ids": prompt(2 + 5 * number), "max_new_tokens": 12 - number}
        for number in range(9)
    ]
    futures = ask_together(model, requests, parallel=6)
    for request, future in zip(requests, futures, strict=True):
        assert torch.equal(future.result(60), alone(**request))
    assert 1 < max(steps) <= 6


@pytest.mark.parametrize("parallel", [1, 2])
def test_no_more_than_asked_for(model: Any, steps: list[int], parallel: int) -> None:
    futures = ask_together(model, [{"ids": prompt(length)} for length in (4, 5, 6)], parallel)
    for length, future in zip((4, 5, 6), futures, strict=True):
        assert torch.equal(future.result(60), alone(model, prompt(length)))
    assert max(steps) == parallel


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1, "max_new_tokens": 20},
        {"min_new_tokens": 5, "eos_token_id": list(range(2, 200))},
        {"eos_token_id": list(range(2, 200))},
        {"stop_strings": ["a", "e", "\ufffd"]},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"do_sample": True, "top_k": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_a_request_asks_for(model: Any, options: dict[str, Any]) -> None:
    futures = ask_together(model, [{"ids": prompt(7), **options}, {"ids": prompt(9)}])
    assert torch.equal(futures[0].result(60), alone(model, prompt(7), **options))
    assert torch.equal(futures[1].result(60), alone(model, prompt(9)))


def test_a_seed_is_a_requests_own(model: Any) -> None:
    sampled = {"ids": prompt(6), "do_sample": True, "temperature": 1.5, "max_new_tokens": 12}
    first, second, third, fourth = (
        future.result(60).tolist()
        for future in ask_together(
            model, [{**sampled, "seed": 1}, {**sampled, "seed": 2}, {**sampled, "seed": 1}, {**sampled, "seed": -3}]
        )
    )
    assert first == third
    assert len({str(text) for text in (first, second, fourth)}) == 3
    single = ask(DecodingLoop(1), model, **sampled, seed=1)
    assert single.result(60).tolist() == first
    chance = [ask(DecodingLoop(1), model, **sampled).result(60).tolist() for _ in range(3)]
    assert len({str(text) for text in chance}) > 1


def test_streams_tell_every_token_and_the_end(model: Any) -> None:
    listeners = [Listener(), Listener()]
    futures = ask_together(model, [{"ids": prompt(5 + each), "streamer": listeners[each]} for each in range(2)])
    for each, (listener, future) in enumerate(zip(listeners, futures, strict=True)):
        ids = future.result(60)[0].tolist()
        assert listener.told == [ids[: 5 + each], *([token] for token in ids[5 + each :])]
        assert listener.ends == 1


@pytest.mark.parametrize("last", [0, 1, 4])
def test_one_that_breaks_off_leaves_the_others_alone(model: Any, last: int) -> None:
    broken = Listener(last=last)
    futures = ask_together(
        model, [{"ids": prompt(5)}, {"ids": prompt(6), "streamer": broken, "min_new_tokens": 8}, {"ids": prompt(7)}]
    )
    with pytest.raises(ConnectionError, match="gone"):
        futures[1].result(60)
    assert len(broken.told) == last
    assert broken.ends == 0
    for length, future in ((5, futures[0]), (7, futures[2])):
        assert torch.equal(future.result(60), alone(model, prompt(length)))


def test_bad_requests_are_answered_too(model: Any) -> None:
    loop = DecodingLoop(2)
    with pytest.raises(ValueError, match="max_new_tokens"):
        ask(loop, model, prompt(4), max_new_tokens=0).result(60)
    assert torch.equal(ask(loop, model, prompt(5)).result(60), alone(model, prompt(5)))


def test_a_step_that_fails_fails_its_texts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Tensor:
        raise MemoryError("no more")

    monkeypatch.setattr(decoding_loop, "next_logits", broken)
    loop = DecodingLoop(2)
    with pytest.raises(MemoryError, match="no more"):
        ask(loop, model, prompt(4)).result(60)
    monkeypatch.undo()
    assert torch.equal(ask(loop, model, prompt(5)).result(60), alone(model, prompt(5)))


def test_other_models_have_the_loop_to_themselves(make_checkpoint: Any, steps: list[int]) -> None:
    small = matgptq.load(make_checkpoint("llama", torch.float32)[1], 4, device="cpu")  # heads of 16
    assert not takes_groups(small)
    futures = ask_together(
        small, [{"ids": prompt(4)}, {"ids": prompt(5), "do_sample": True, "seed": 3, "temperature": 2.0}]
    )
    greedy, sampled = (future.result(60) for future in futures)
    assert torch.equal(greedy, alone(small, prompt(4)))
    torch.manual_seed(3)
    assert torch.equal(sampled, alone(small, prompt(5), do_sample=True, temperature=2.0))
    assert not steps


# ---- a step --------------------------------------------------------------------------------------------------------


def begun(model: Any, lengths: tuple[int, ...]) -> list[DynamicCache]:
    caches = [DynamicCache(config=model.config) for _ in lengths]
    for length, cache in zip(lengths, caches, strict=True):
        model(prompt(length), **{CACHE_ARGUMENT: cache}, use_cache=True)
    return caches


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("hooked", [False, True], ids=["together", "hooked"])
@torch.no_grad()
def test_a_step_is_that_of_each(out: Path, dtype: str, hooked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: rows of a product do not depend on one another."""
    model = matgptq.load(out, 3, device="cpu", dtype=dtype)
    groups: list[int] = []
    run = block_stack.BlockStack.run

    def counted(self: Any, base: Any, given: Tensor, *others: Any) -> Tensor | None:
        hidden = run(self, base, given, *others)
        groups.extend([] if hidden is None else [len(given)])
        return hidden

    monkeypatch.setattr(block_stack.BlockStack, "run", counted)
    lengths = (3, 17, 9, 1, 30)
    caches, expected = begun(model, lengths), begun(model, lengths)
    if hooked:
        model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    for tokens in token_ids(len(lengths), 5).T:
        groups.clear()
        found = next_logits(model, tokens, caches)
        assert groups == ([] if hooked else [len(lengths)])
        wanted = [
            model(tokens[number].view(1, 1), **{CACHE_ARGUMENT: cache}, use_cache=True).logits[:, -1]
            for number, cache in enumerate(expected)
        ]
        if dtype == "float32":
            assert torch.equal(found, torch.cat(wanted))
        else:  # the head's product of several rows is PyTorch's
            torch.testing.assert_close(found, torch.cat(wanted), rtol=0.02, atol=0.02)
    assert [cache.get_seq_length() for cache in caches] == [length + 5 for length in lengths]
