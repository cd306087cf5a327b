"""Every family that the plugin is said to serve, as tiny random models: log-probabilities against ``matgptq.load``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from server import environment

import matgptq

TOLERANCE = 5e-5  # of a log-probability in float32
FAMILIES = (
    "llama", "llama-biased", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt_neox", "opt",
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe",
)  # fmt: skip
TOKENS = torch.randint(2, 256, (40,), generator=torch.Generator().manual_seed(1)).tolist()


def offline(models: list[Path], directory: Path, **variables: str) -> dict[str, dict[str, Any]]:
    """``{model: what vLLM says}``, all in one process."""
    (directory / "tokens.json").write_text(json.dumps(TOKENS))
    program = [sys.executable, str(Path(__file__).with_name("offline.py")), str(directory / "tokens.json")]
    done = subprocess.run(
        [*program, *map(str, models)],
        env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", **variables),
        capture_output=True,
        text=True,
    )
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(models), done.stdout + done.stderr
    return {record["model"]: record for record in map(json.loads, lines)}


@pytest.fixture(scope="module")
def served(make_tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    checkpoints = {name: make_tiny(name, 32) for name in FAMILIES}
    results = offline([*checkpoints.values()], tmp_path_factory.mktemp("offline"), MATGPTQ_ALLOCATION="mixed")
    return {name: (checkpoint, results[str(checkpoint)]) for name, checkpoint in checkpoints.items()}


def check(checkpoint: Path, result: dict[str, Any]) -> None:
    """vLLM's log-probabilities against those of ``matgptq.load``."""
    assert "error" not in result, result["error"]
    model = matgptq.load(checkpoint, allocation="mixed", device="cpu", dtype="float32")
    ids = torch.tensor([TOKENS])
    with torch.inference_mode():
        logits = model(ids).logits[0, :-1].float()
    wanted = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    difference = (torch.tensor(result["log_probs"]) - wanted).abs().max()
    assert difference < TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, served: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    check(*served[name])


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_compiled(name: str, make_tiny: Any, tmp_path: Path) -> None:
    checkpoint = make_tiny(name, 32)
    check(checkpoint, offline([checkpoint], tmp_path, MATGPTQ_ALLOCATION="mixed", COMPILED="1")[str(checkpoint)])


def test_layers_at_full_precision(make_tiny: Any, tmp_path: Path) -> None:
    """Those that vLLM asks for by the name of their stack, a shared expert's among them, and a whole block."""
    kept = {
        "llama": ("lm_head", "model.layers.0.*", "*.gate_proj", "*.up_proj"),
        "qwen2_moe": ("lm_head", "*.self_attn.*", "*.shared_expert.*"),
    }
    checkpoints = [make_tiny(name, 32, ignore=ignore) for name, ignore in kept.items()]
    results = offline(checkpoints, tmp_path, MATGPTQ_ALLOCATION="mixed")
    for checkpoint in checkpoints:
        check(checkpoint, results[str(checkpoint)])
