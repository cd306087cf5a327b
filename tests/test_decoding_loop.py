"""Requests that are answered together get what each of them gets alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import GROUP_SIZE, make_tokenizer, save_model, token_ids
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

import matgptq
from matgptq import native
from matgptq.inference import block_stack
from matgptq.inference.block_stack import next_logits, takes_groups
from matgptq.inference.width_copies import copy_at
from matgptq.models.kv_cache import CACHE_ARGUMENT, memory_of
from matgptq.serving import decoding_loop
from matgptq.serving.decoding_loop import DecodingLoop, TextRequest, WithdrawnError

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


@pytest.mark.parametrize("length", [1, 9, 10, 11, 37])
def test_a_prompt_is_read_in_pieces_between_steps(model: Any, out: Path, steps: list[int], length: int) -> None:
    events: list[int] = []
    other = copy_at(model, 2)
    model.register_forward_pre_hook(lambda *given: events.append(given[2]["input_ids"].shape[1]), with_kwargs=True)
    other.register_forward_pre_hook(lambda *_: events.append(0), with_kwargs=True)
    loop, gate = DecodingLoop(4, piece=10), threading.Event()
    first = ask(loop, other, prompt(3), Listener(gate), max_new_tokens=40)
    second = ask(loop, model, prompt(length), max_new_tokens=2)
    gate.set()
    assert torch.equal(first.result(60), alone(copy_at(model, 2), prompt(3), max_new_tokens=40))
    pieces = [10] * ((length - 1) // 10) + [(length - 1) % 10 + 1]
    assert [read for read in events if read][: len(pieces)] == pieces
    begin = events.index(pieces[0])
    assert events[begin : begin + 2 * len(pieces) : 2] == pieces  # and the other's steps between them
    assert torch.equal(second.result(60), alone(matgptq.load(out, 4, device="cpu"), prompt(length), max_new_tokens=2))


@pytest.mark.parametrize("when", ["waiting", "reading", "generating", "alone"])
def test_a_withdrawn_request_is_ended(model: Any, when: str) -> None:
    loop, gate = DecodingLoop(2, piece=4), threading.Event()
    options = {"num_beams": 2} if when == "alone" else {}
    settings = GenerationConfig(max_new_tokens=100, do_sample=False, pad_token_id=0, **options)
    request = TextRequest(model, {"input_ids": prompt(20), "generation_config": settings})
    calls = 0

    def withdraw(module: Any, given: Any, keywords: Any) -> None:
        nonlocal calls
        calls += keywords["input_ids"].shape[0] == request.arguments["generation_config"].num_beams or when != "alone"
        if calls == {"reading": 2, "generating": 8, "alone": 5}.get(when):
            request.withdrawn.set()

    if when == "waiting":
        request.withdrawn.set()
    other = ask(loop, copy_at(model, 2), prompt(5), Listener(gate))
    model.register_forward_pre_hook(withdraw, with_kwargs=True)
    loop.submit(request)
    gate.set()
    if when == "alone":
        assert request.answer.result(60).shape[1] < 30
    else:
        with pytest.raises(WithdrawnError):
            request.answer.result(60)
    assert calls == {"waiting": 0, "reading": 2, "generating": 8, "alone": 5}[when]
    assert torch.equal(other.result(60), alone(copy_at(model, 2), prompt(5)))


# ---- what was read before ------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], Any]) -> None:
    """For what the loop does once a text has been answered."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("never")


class Reads:
    """How many tokens each prompt of a model needed to have read."""

    def __init__(self, model: Any) -> None:
        self.tokens: list[int] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, given: Any, keywords: Any) -> None:
        if keywords["input_ids"].shape[1] > 1:
            self.tokens.append(keywords["input_ids"].shape[1])


def test_a_conversation_goes_on(model: Any, out: Path) -> None:
    loop, reads = DecodingLoop(2, 1 << 30), Reads(model)
    plain = matgptq.load(out, 4, device="cpu")
    said = prompt(20)
    for turn in range(3):
        answer = ask(loop, model, said).result(60)
        assert torch.equal(answer, alone(plain, said))
        assert reads.tokens[turn:] == [20 if turn == 0 else 1 + 6]  # the last of the answer, and what is said to it
        said = torch.cat([answer, token_ids(1, 6, seed=turn)], 1)


def test_prompts_with_the_same_beginning(model: Any, out: Path) -> None:
    """Each is read from where it differs, and none touches what another goes on with."""
    loop, reads = DecodingLoop(3, 1 << 30), Reads(model)
    plain = matgptq.load(out, 4, device="cpu")
    instructions = prompt(30)
    questions = [torch.cat([instructions, token_ids(1, length, seed=length)], 1) for length in (5, 9, 7)]
    for question in questions:
        assert torch.equal(ask(loop, model, question).result(60), alone(plain, question))
    assert reads.tokens == [35, 9, 7]
    reads.tokens.clear()
    for question in questions:
        assert torch.equal(ask(loop, model, question).result(60), alone(plain, question))
    assert not reads.tokens  # but for the last token


def test_texts_that_are_being_generated_share_too(model: Any, out: Path) -> None:
    reads, instructions = Reads(model), prompt(30)
    plain = matgptq.load(out, 4, device="cpu")
    loop, gate = DecodingLoop(3, 1 << 30), threading.Event()
    first = ask(loop, model, instructions, Listener(gate), max_new_tokens=40)
    questions = [torch.cat([instructions, token_ids(1, length, seed=length)], 1) for length in (5, 9)]
    others = [ask(loop, model, question) for question in questions]
    gate.set()
    assert torch.equal(first.result(60), alone(plain, instructions, max_new_tokens=40))
    for question, other in zip(questions, others, strict=True):
        assert torch.equal(other.result(60), alone(plain, question))
    assert reads.tokens == [30, 5, 9]


def test_a_width_has_its_own(model: Any, out: Path) -> None:
    other = copy_at(model, 2)
    loop, reads = DecodingLoop(2, 1 << 30), Reads(other)
    ask(loop, model, prompt(30)).result(60)
    assert torch.equal(ask(loop, other, prompt(30)).result(60), alone(matgptq.load(out, 2, device="cpu"), prompt(30)))
    assert reads.tokens == [30]


@pytest.mark.parametrize("texts", [0, 0.9, 1.5, 2.5])
def test_memory_is_limited(model: Any, texts: float) -> None:
    roomy = DecodingLoop(1, 1 << 30)
    ask(roomy, model, prompt(33)).result(60)
    wait_until(lambda: roomy._read._kept)
    limit = int(texts * memory_of(roomy._read._kept[0].cache))
    loop, reads = DecodingLoop(1, limit), Reads(model)
    lengths = (30, 31, 30, 32, 30, 31)
    for length in lengths:
        ask(loop, model, prompt(length)).result(60)
    # 31 is forgotten where two are kept: 30 was used after it
    assert reads.tokens == list(lengths if texts < 2 else (30, 31, 32, 31))
    wait_until(lambda: len(loop._read._kept) == int(texts))
    assert sum(memory_of(text.cache) for text in loop._read._kept) <= limit


def test_what_a_failed_step_left_is_not_kept(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = DecodingLoop(2, 1 << 30)

    def broken(*_: object) -> Tensor:
        raise MemoryError("no more")

    monkeypatch.setattr(decoding_loop, "next_logits", broken)
    with pytest.raises(MemoryError, match="no more"):
        ask(loop, model, prompt(30)).result(60)
    monkeypatch.undo()
    assert torch.equal(ask(loop, model, prompt(30)).result(60), alone(model, prompt(30)))
    wait_until(lambda: len(loop._read._kept) == 1)


def test_what_goes_wrong_before_a_prompt_is_read_fails_its_request(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("no more")

    loop = DecodingLoop(2, 1 << 30)
    monkeypatch.setattr(decoding_loop.PromptCache, "begin", broken)
    with pytest.raises(MemoryError, match="no more"):
        ask(loop, model, prompt(30)).result(60)
    monkeypatch.undo()
    assert torch.equal(ask(loop, model, prompt(30)).result(60), alone(model, prompt(30)))


def test_a_loop_that_is_closed_has_answered(model: Any) -> None:
    loop = DecodingLoop(2)
    futures = [ask(loop, model, prompt(length)) for length in (4, 5, 6)]
    loop.close()
    assert all(future.done() for future in futures)
    assert not loop._thread.is_alive()


def test_a_client_that_went_away_may_come_back(model: Any) -> None:
    loop = DecodingLoop(2, 1 << 30)
    broken = ask(loop, model, prompt(30), Listener(last=3), min_new_tokens=8)
    with pytest.raises(ConnectionError):
        broken.result(60)
    reads = Reads(model)
    ask(loop, model, prompt(30)).result(60)
    assert not reads.tokens


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
