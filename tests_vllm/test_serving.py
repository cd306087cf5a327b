"""A parent served at a chosen width, over HTTP, against what ``matgptq.load`` computes.

Tolerances of log-probabilities: in float32 both sides differ in the order of sums only. In bfloat16 every layer rounds
its output to 8 bits, each side after other steps: on the text below that moves a log-probability by .055 nats on
average (``matgptq.load`` in bfloat16 against float32), and two sound programs are further apart than one is from
float32. One width further is 1.0 nats, so that the tolerance tells widths apart all the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from server import Server

import matgptq
from matgptq.models.source import load_tokenizer

FLOAT32_TOLERANCE = 2e-3
BFLOAT16_MEAN_TOLERANCE = 0.15
BFLOAT16_TOLERANCE = 0.75
TEXT = "The lighthouse keeper wrote in his journal that the storm had passed, and the sea was calm again by morning."
QUESTION = "What is the capital of France?"
Serve = Callable[..., Server]


def _reference(checkpoint: Path, dtype: str = "float32", **wish: Any) -> Any:
    return matgptq.load(checkpoint, device="cpu", dtype=dtype, **wish)


def _tokens(checkpoint: Path) -> list[int]:
    return list(load_tokenizer(checkpoint)(TEXT)["input_ids"])


def _log_probs(model: Any, tokens: list[int]) -> list[float]:
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        logits = model(ids).logits[0, :-1].float()
    chosen = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return [float(value) for value in chosen]


def _greedy(model: Any, checkpoint: Path, message: str, tokens: int) -> str:
    tokenizer = load_tokenizer(checkpoint)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        answer = model.generate(**prompt, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def _difference(served: list[float], wanted: list[float]) -> tuple[float, float]:
    """Largest and mean."""
    assert len(served) == len(wanted) > 20
    differences = [abs(a - b) for a, b in zip(served, wanted, strict=True)]
    return max(differences), sum(differences) / len(differences)


def test_four_bits_by_environment(real: Path, serve: Serve) -> None:
    before = (real / "config.json").read_bytes()
    server = serve(real, "--dtype", "bfloat16", MATGPTQ_BITS="4")
    tokens = _tokens(real)
    served = server.log_probs(tokens)
    largest, mean = _difference(served, _log_probs(_reference(real, "bfloat16", bits=4), tokens))
    assert mean < BFLOAT16_MEAN_TOLERANCE
    assert largest < BFLOAT16_TOLERANCE
    # Another width is further off than that, so the one that was asked for is served.
    assert (
        _difference(served, _log_probs(_reference(real, "bfloat16", bits=3), tokens))[1] > 4 * BFLOAT16_MEAN_TOLERANCE
    )

    def ask(number: int) -> tuple[int, str]:
        answer = server.completion(f"Here are {number} facts about lighthouses:", 16 + number)
        return answer.usage.completion_tokens, answer.choices[0].finish_reason

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    assert all(reason == "stop" or (count, reason) == (16 + n, "length") for n, (count, reason) in enumerate(answers))
    assert (real / "config.json").read_bytes() == before


def test_three_bits_by_override(real: Path, serve: Serve) -> None:
    override = json.dumps({"quantization_config": {"quant_method": "matgptq", "bits": 3}})
    server = serve(real, "--dtype", "float32", "--hf-overrides", override)
    model, tokens = _reference(real, bits=3), _tokens(real)
    assert _difference(server.log_probs(tokens), _log_probs(model, tokens))[0] < FLOAT32_TOLERANCE

    answer = server.chat(QUESTION, 16).choices[0].message.content
    assert answer == _greedy(model, real, QUESTION, 16)
    pieces = [chunk.choices[0].delta.content or "" for chunk in server.chat(QUESTION, 16, stream=True)]
    assert "".join(pieces) == answer
    assert sum(map(bool, pieces)) > 4

    whole = server.completion(TEXT, 16).choices[0].text
    assert "".join(chunk.choices[0].text for chunk in server.completion(TEXT, 16, stream=True)) == whole
    prompts = [f"{TEXT} It was day {number} of" for number in range(16)]
    alone = [server.completion(prompt, 12).choices[0].text for prompt in prompts]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda prompt: server.completion(prompt, 12).choices[0].text, prompts))
    assert together == alone


def test_allocation_with_unequal_widths_in_stacked_layers(real: Path, serve: Serve) -> None:
    server = serve(real, "--dtype", "float32", MATGPTQ_ALLOCATION="mixed")
    tokens = _tokens(real)
    wanted = _log_probs(_reference(real, allocation="mixed"), tokens)
    assert _difference(server.log_probs(tokens), wanted)[0] < FLOAT32_TOLERANCE


@pytest.mark.parametrize("form", ["parent", "slice"])
def test_two_ranks_with_biases(make_tiny: Callable[[str, int], Path], serve: Serve, tmp_path: Path, form: str) -> None:
    checkpoint = make_tiny("qwen2", 64)
    served, variables = checkpoint, {"MATGPTQ_ALLOCATION": "mixed"}
    if form == "slice":
        served, variables = tmp_path / "slice", {}
        matgptq.export(checkpoint, served, format="matgptq-slice", allocation="mixed")
    server = serve(served, "--dtype", "float32", "--tensor-parallel-size", "2", **variables)
    tokens = torch.randint(2, 256, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = _log_probs(_reference(checkpoint, allocation="mixed"), tokens)
    assert _difference(server.log_probs(tokens), wanted)[0] < FLOAT32_TOLERANCE


def test_compiled(make_tiny: Callable[[str, int], Path], serve: Serve) -> None:
    checkpoint = make_tiny("qwen2", 64)
    server = serve(checkpoint, "--dtype", "float32", "--no-enforce-eager", MATGPTQ_ALLOCATION="mixed")
    tokens = torch.randint(2, 256, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = _log_probs(_reference(checkpoint, allocation="mixed"), tokens)
    assert _difference(server.log_probs(tokens), wanted)[0] < FLOAT32_TOLERANCE
