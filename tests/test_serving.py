"""One checkpoint served at all its widths: names, OpenAI's routes, errors, a server in a process of its own."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from typer.testing import CliRunner

import matgptq
from matgptq import native
from matgptq.allocation import Allocation
from matgptq.checkpoints.allocation_scales import save_scales
from matgptq.checkpoints.allocation_store import save_allocation
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.cli import app
from matgptq.errors import AllocationError, ConfigurationError
from matgptq.inference.block_stack import takes_groups
from matgptq.inference.nested_linear import nested_layers
from matgptq.serving.served_models import ServedModels, UnknownModelError, open_models
from matgptq.serving.server import listen
from matgptq.serving.usage import events_with_cached_tokens

pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
pytest.importorskip("uvicorn", reason="serving needs the extra `serve`")
pytest.importorskip("openai", reason="serving needs the extra `serve`")

from fastapi.testclient import TestClient

from matgptq.serving.app import make_app

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
PROMPT, TOKENS = "hello there", 6
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
STREAM = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def out(make_checkpoint: Any) -> Path:
    return make_checkpoint("llama", torch.float32)[1]


@pytest.fixture(scope="module")
def models(out: Path) -> ServedModels:
    return open_models(out, 4, name="tiny")


@pytest.fixture(scope="module")
def client(models: ServedModels) -> TestClient:
    return TestClient(make_app(models, 4))


@pytest.fixture(scope="module")
def texts(out: Path) -> dict[int, str]:
    """What each width continues the prompt with."""
    model, tokenizer = matgptq.load(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    found = {}
    for bits in WIDTHS:
        model.set_bits(bits)
        new = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
        found[bits] = tokenizer.decode(new, skip_special_tokens=True)
    return found


def ask(client: TestClient, path: str = "/v1/completions", **body: Any) -> Any:
    response = client.post(path, json={"prompt": PROMPT, "max_tokens": TOKENS, **body})
    assert response.status_code == 200, response.text
    return response.json()


def store(path: Path, name: str, layers: dict[str, int]) -> None:
    opened = open_checkpoint(path)
    bits = opened.bits_per_weight(layers)
    found = {"method": "by hand"}
    save_allocation(
        opened, Allocation(name, opened.codes_identity, "by hand", bits, bits, 1, 0, {"value": 1.0}, found, layers)
    )


# ---- names ---------------------------------------------------------------------------------------------------------


def test_every_width_is_served_from_the_same_memory(models: ServedModels) -> None:
    assert models.names == ["tiny", "tiny:4", *(f"tiny:{bits}" for bits in WIDTHS if bits != 4)]
    first = nested_layers(models.get("tiny"))
    assert models.get("tiny") is models.get("tiny:4")
    for bits in WIDTHS:
        layers = nested_layers(models.get(f"tiny:{bits}"))
        assert {layer.bits for layer in layers.values()} == {bits}
        assert all(layer.packed is first[name].packed for name, layer in layers.items())
    assert {layer.bits for layer in first.values()} == {4}
    for name in ("tiny:9", "other", "", "tiny:"):
        with pytest.raises(UnknownModelError, match="tiny:8"):
            models.get(name)


def test_allocations_are_served_beside_the_widths(checkpoint: Path) -> None:
    layers = {layer: (2, 6)[number % 2] for number, layer in enumerate(open_checkpoint(checkpoint).layers)}
    store(checkpoint, "small", layers)
    store(checkpoint, "3", dict.fromkeys(layers, 7))  # a width's name stays the width's
    served = open_models(checkpoint)
    assert served.names[:2] == ["checkpoint", "checkpoint:8"]
    assert len(served.names) == 2 + 6 + 1
    small = nested_layers(served.get("checkpoint:small"))
    assert {name: layer.bits for name, layer in small.items()} == layers
    assert {layer.bits for layer in nested_layers(served.get("checkpoint:3")).values()} == {3}

    first = open_models(checkpoint, allocation="small")
    assert first.names[:2] == ["checkpoint", "checkpoint:small"]
    assert {name: layer.bits for name, layer in nested_layers(first.get("checkpoint")).items()} == layers


def test_scales_of_an_allocations_own_rule_out_the_rest(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    layers = dict.fromkeys(opened.layers, 3)
    store(checkpoint, "tuned", layers)
    scales = {
        layer: torch.ones(info.out_features, info.in_features // info.group_size)
        for layer, info in opened.layers.items()
    }
    save_scales(opened, "tuned", layers, scales, {})
    assert "checkpoint:tuned" not in open_models(checkpoint).names
    assert open_models(checkpoint, allocation="tuned").names == ["checkpoint", "checkpoint:tuned"]


def test_a_slice_serves_itself(out: Path, tmp_path: Path) -> None:
    assert open_models(out, 3, name="n", resident=False).names == ["n", "n:3"]
    matgptq.export(out, tmp_path / "slice", format="matgptq-slice", bits=2)
    assert open_models(tmp_path / "slice").names == ["slice", "slice:2"]
    with pytest.raises(AllocationError, match="only the slice of 2 bits"):
        open_models(tmp_path / "slice", 4)


def test_the_thread_that_loads_does_not_stay(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts took twice the time beside OpenMP's workers of the main thread."""
    threads = []

    def noted(*given: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return matgptq.load(*given, **options)

    monkeypatch.setattr("matgptq.serving.served_models.load", noted)
    open_models(out, 4)
    assert threads[0] is not threading.main_thread()
    assert not threads[0].is_alive()


# ---- routes --------------------------------------------------------------------------------------------------------


def test_a_request_chooses_its_width(client: TestClient, texts: dict[int, str]) -> None:
    assert len(set(texts.values())) > 2  # or the widths could not be told apart
    for bits in (*WIDTHS, *WIDTHS):
        answer = ask(client, model=f"tiny:{bits}")
        assert answer["choices"][0]["text"] == texts[bits]
        assert answer["model"] == f"tiny:{bits}"
    for nameless in (ask(client), ask(client, model=None), ask(client, model="tiny")):
        assert nameless["choices"][0]["text"] == texts[4]
        assert nameless["model"] == "tiny"


def test_models_are_listed(client: TestClient, models: ServedModels) -> None:
    assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == models.names
    assert client.get("/health").json() == {"status": "ok"}


def test_a_stream_says_the_same_and_ends(client: TestClient, texts: dict[int, str]) -> None:
    body = {"model": "tiny:2", "prompt": PROMPT, "max_tokens": TOKENS, **STREAM}
    with client.stream("POST", "/v1/completions", json=body) as response:
        parts = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert parts[-1] == "[DONE]"
    chunks = [json.loads(part) for part in parts[:-1]]
    said = "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1])
    assert said.rstrip("\ufffd") == texts[2].rstrip("\ufffd")  # of a character that does not end
    assert chunks[-1]["usage"]["completion_tokens"] == TOKENS


def test_conversations(client: TestClient, models: ServedModels) -> None:
    messages = [{"role": "user", "content": "hello"}]
    prompt = models.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    said = models.get("tiny").generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt.input_ids.shape[1] :]
    answer = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 4}).json()
    message = {"role": "assistant", "content": models.tokenizer.decode(said, skip_special_tokens=True)}
    assert answer["choices"][0]["message"].items() >= message.items()
    assert answer["usage"]["completion_tokens"] == len(said) > 0
    body = {"messages": messages, "max_completion_tokens": 4, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    answer = client.post("/v1/responses", json={"input": "hello", "max_output_tokens": 4}).json()
    assert answer["object"] == "response"
    assert answer["output"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [TEXT, CHAT, "/v1/responses"])
@pytest.mark.skipif(not native.available(), reason=f"no native library: {native.reason()}")
def test_a_response_tells_what_was_read_before(make_checkpoint: Any, path: str, stream: bool) -> None:
    models = open_models(make_checkpoint("qwen3", torch.float32)[1], 4, name="tiny")
    assert takes_groups(models.get("tiny")), "what other models read is not kept"
    words = 'data: {"usage":{"a": 1}} ' * 2  # as in a response
    chat = {"messages": [{"role": "user", "content": words}], "max_tokens": 3}
    body = {TEXT: {"prompt": words, "max_tokens": 3}, CHAT: chat, "/v1/responses": {"input": words}}[path]
    body = {**body, **({"max_output_tokens": 3} if path == "/v1/responses" else {}), **(STREAM if stream else {})}
    client = TestClient(make_app(models, 2, cache_bytes=2**20))

    def usage() -> Any:
        response = client.post(path, json=body)
        assert response.status_code == 200, response.text
        if not stream:
            return response.json()["usage"]
        lines = [line.removeprefix("data: ") for line in response.text.split("\n")]
        event = json.loads([line for line in lines if line not in ("", "[DONE]")][-1])
        return event.get("response", event)["usage"]

    prompt = "input_tokens" if path == "/v1/responses" else "prompt_tokens"
    first, again = usage(), usage()
    assert first[f"{prompt}_details"]["cached_tokens"] == 0
    assert again[f"{prompt}_details"]["cached_tokens"] == again[prompt] - 1 > 16
    assert without_details(first) == without_details(again)


def without_details(usage: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in usage.items() if not key.endswith("_details")}


@given(st.text(), st.integers(0, 10))
def test_usage_within_a_text_is_no_usage(text: str, cached: int) -> None:
    for said in (text, text + '"usage":{', 'data: {"usage":{}}\n\n' + text):
        chunk = json.dumps({"text": said}, ensure_ascii=False, separators=(",", ":"))
        last = json.dumps({"text": said, "usage": {"prompt_tokens": 9}}, ensure_ascii=False, separators=(",", ":"))
        assert events_with_cached_tokens(f"data: {chunk}\n\n", cached) == f"data: {chunk}\n\n"
        told = events_with_cached_tokens(f"data: {chunk}\n\ndata: {last}\n\n", cached)
        head, tail = told.removesuffix("\n\n").split("\n\n")
        assert head == f"data: {chunk}"
        usage = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": cached}}
        assert json.loads(tail.removeprefix("data: ")) == {"text": said, "usage": usage}


def test_a_temperature_samples(client: TestClient, texts: dict[int, str]) -> None:
    sampled = {ask(client, temperature=1.5, seed=seed)["choices"][0]["text"] for seed in range(4)}
    assert len(sampled) > 1
    assert ask(client, temperature=1.5, seed=2)["choices"] == ask(client, temperature=1.5, seed=2)["choices"]
    assert ask(client, temperature=0)["choices"][0]["text"] == texts[4]
    assert len({ask(client, top_p=0.9, seed=seed)["choices"][0]["text"] for seed in range(4)}) > 1


def test_text_ends_with_the_context(client: TestClient, models: ServedModels) -> None:
    context = models.get("tiny").config.max_position_embeddings
    prompt = models.tokenizer(PROMPT).input_ids
    answer = ask(client, max_tokens=10 * context, temperature=1.0, seed=0, logit_bias=None)
    assert answer["usage"]["total_tokens"] <= context
    assert answer["usage"]["prompt_tokens"] == len(prompt)


BAD = {
    "another model": (TEXT, {"model": "gpt"}, 404, "no model 'gpt' is served here; there are tiny, tiny:4"),
    "no width": (TEXT, {"model": "tiny:9"}, 404, "tiny:9"),
    "a number": (TEXT, {"model": 4}, 404, "no model 4"),
    "a list": (TEXT, {"model": []}, 400, "unhashable"),
    "a long prompt": (TEXT, {"prompt": PROMPT * 500}, 400, r"the prompt has \d+ tokens, the model's context 64"),
    "no prompt": (TEXT, {"prompt": ""}, 400, "the prompt is empty"),
    "prompts": (TEXT, {"prompt": ["a", "b"]}, 400, "must be a string"),
    "an unknown field": (TEXT, {"colour": "red"}, 422, "colour"),
    "no tokens": (TEXT, {"max_tokens": 0}, 400, "max_new_tokens"),
    "a stream of no tokens": (TEXT, {"max_tokens": 0, "stream": True}, 400, "max_new_tokens"),
    "a long prompt of a stream": (TEXT, {"prompt": PROMPT * 500, "stream": True}, 400, "the model's context 64"),
    "a large seed": (TEXT, {"seed": 2**64}, 400, "64 bits"),
    "an unknown setting": (TEXT, {"generation_config": '{"colour": 1}'}, 400, "no settings .* colour"),
    "settings in words": (TEXT, {"generation_config": "warm"}, 400, "Expecting value"),
    "tokens in words": (TEXT, {"max_tokens": "ten"}, 400, "ten"),
    "a cold temperature": (TEXT, {"temperature": -1}, 400, "temperature"),
    "no messages": (CHAT, {}, 400, "lacks 'messages'"),
    "no role": (CHAT, {"messages": [{"content": "a"}]}, 400, "lacks 'role'"),
    "messages of text": (CHAT, {"messages": ["a"]}, 400, "indices"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(client: TestClient, case: str) -> None:
    path, body, status, reason = BAD[case]
    given = {"prompt": PROMPT, "max_tokens": 4, **body} if path == TEXT else body
    response = client.post(path, json=given)
    assert response.status_code == status
    assert re.search(reason, response.json()["error"]["message"])


@pytest.mark.parametrize("content", ["{", "[1]", "null", ""])
def test_what_is_no_request(client: TestClient, content: str) -> None:
    response = client.post(TEXT, content=content)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_without_a_chat_template_there_are_completions(out: Path, texts: dict[int, str]) -> None:
    served = open_models(out, 4, name="tiny")
    served.tokenizer.chat_template = None
    client = TestClient(make_app(served, 4))
    response = client.post(CHAT, json={"messages": [{"role": "user", "content": "a"}]})
    assert response.status_code == 400
    assert "/v1/completions" in response.json()["error"]["message"]
    assert ask(client)["choices"][0]["text"] == texts[4]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [TEXT, CHAT, "/v1/responses"])
def test_nothing_is_generated_for_a_client_that_has_gone(models: ServedModels, path: str, stream: bool) -> None:
    model = models.get("tiny:5")
    steps = 0

    def slow(*_: Any) -> None:
        nonlocal steps
        steps += 1
        time.sleep(0.1)

    body = {
        TEXT: {"prompt": PROMPT, "max_tokens": 50},
        CHAT: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 40},
        "/v1/responses": {"input": "a", "max_output_tokens": 40},
    }[path]
    application = make_app(models, 2)
    body = {"model": "tiny:5", "stream": stream, **body}
    messages = [{"type": "http.request", "body": json.dumps(body).encode()}]
    answers = []

    async def receive() -> Any:
        if messages:
            return messages.pop()
        while not steps:
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        answers.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    hook = model.register_forward_pre_hook(slow)
    try:
        asyncio.run(application(scope, receive, send))
        assert all(message.get("more_body") for message in answers[1:])  # nobody reads an end
        assert stream or not answers
        seen = steps
        ask(TestClient(application), model="tiny:5")  # waits for the thread
        assert steps <= seen + 2 + TOKENS < 40
    finally:
        hook.remove()


# ---- a process -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(out: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "matgptq", "serve", str(out), "--port", "0", "--name", "tiny"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        said = ""
        for line in process.stderr or ():
            said += line
            if "startup complete" in line:
                break
        found = re.search(r"serving at (\S+)", said)
        assert found, said
        yield found[1]
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
        assert "Traceback" not in rest


def test_requests_at_once_get_the_widths_that_they_asked_for(url: str, texts: dict[int, str]) -> None:
    from openai import OpenAI

    api = OpenAI(base_url=url, api_key="none")
    assert [model.id for model in api.models.list()][:2] == ["tiny", "tiny:8"]

    def complete(bits: int) -> str:
        stream = bits % 2 == 0
        answer = api.completions.create(model=f"tiny:{bits}", prompt=PROMPT, max_tokens=TOKENS, stream=stream)
        return "".join(part.choices[0].text for part in answer) if stream else answer.choices[0].text

    asked = WIDTHS * 3
    with ThreadPoolExecutor(6) as pool:
        for bits, text in zip(asked, pool.map(complete, asked), strict=True):
            assert text.rstrip("\ufffd") == texts[bits].rstrip("\ufffd")


def test_refused_before_anything_is_loaded(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matgptq.serving.served_models.load", lambda *_, **__: pytest.fail("loaded"))
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", str(out), "--port", str(port)])
    assert isinstance(result.exception, ConfigurationError)
    assert f"cannot listen on localhost:{port}" in str(result.exception)
    with pytest.raises(ConfigurationError, match=r"cannot listen on no\.such\.host"):
        listen("no.such.host.invalid", 80)
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    result = CliRunner().invoke(app, ["serve", str(out)])
    assert 'pip install "matgptq[serve]"' in str(result.exception)
    monkeypatch.setattr("transformers.__version__", "5.24.1")
    result = CliRunner().invoke(app, ["serve", str(out)])
    assert "needs transformers 5.25 or newer, and this is 5.24.1" in str(result.exception)
