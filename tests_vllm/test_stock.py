"""vLLM without our package serves what we export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from server import Server
from test_families import TOKENS, offline
from test_serving import BFLOAT16_MEAN_TOLERANCE, _difference, _log_probs, _reference, _tokens

import matgptq

EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
OURS_IS_GONE = "import sys\nsys.modules['matgptq'] = None\n"


@pytest.fixture
def hidden(tmp_path: Path) -> str:
    """A place to import from, first by every process when it starts: from then on ``import matgptq`` fails."""
    place = tmp_path / "hidden"
    place.mkdir()
    (place / "sitecustomize.py").write_text(OURS_IS_GONE)
    return str(place)


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_export_at_four_bits(real: Path, serve: Callable[..., Server], hidden: str, tmp_path: Path, form: str) -> None:
    exported = tmp_path / "export"
    matgptq.export(real, exported, format=form, bits=4)
    # VLLM_CPU_INT4_W4A8=0: by default its kernel rounds activations to 8 bits where the processor has AMX.
    server = serve(exported, "--dtype", "bfloat16", PYTHONPATH=hidden, VLLM_PLUGINS="", VLLM_CPU_INT4_W4A8="0")
    tokens = _tokens(real)
    wanted = _log_probs(_reference(real, "bfloat16", bits=4), tokens)
    assert _difference(server.log_probs(tokens), wanted)[1] < BFLOAT16_MEAN_TOLERANCE
    assert "matgptq: serving" not in server.log.read_text()


def test_exported_experts_at_four_bits(make_tiny: Any, hidden: str, tmp_path: Path) -> None:
    checkpoints = {name: make_tiny(name, 32) for name in EXPERTS}
    # Of dense blocks among those with experts, vLLM 0.32 does not find the layers that are listed by name.
    checkpoints["qwen3_moe"] = make_tiny("qwen3_moe", 32, mlp_only_layers=[])
    exported = {name: tmp_path / name for name in EXPERTS}
    for name, checkpoint in checkpoints.items():
        matgptq.export(checkpoint, exported[name], format="compressed-tensors", bits=4)
    results = offline(
        [*exported.values()],
        tmp_path,
        PYTHONPATH=hidden,
        VLLM_PLUGINS="",
        VLLM_CPU_INT4_W4A8="0",
        DEQUANTIZED_EXPERTS="1",
        DTYPE="bfloat16",
    )
    ids = torch.tensor([TOKENS])
    for name, checkpoint in checkpoints.items():
        result = results[str(exported[name])]
        assert "error" not in result, result["error"]
        found = torch.tensor(result["log_probs"])
        differences = {}
        for bits in (4, 8):
            model = matgptq.load(checkpoint, bits, device="cpu", dtype="float32")
            with torch.inference_mode():
                logits = model(ids).logits[0, :-1]
            wanted = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            differences[bits] = _mean_of_most((found - wanted).abs())
        # bfloat16 beside float32, and these logits are large; but it is these four bits that are served
        assert differences[4] < 0.2 * differences[8], (name, differences)


def _mean_of_most(differences: torch.Tensor) -> float:
    """Without the two largest of 39: where bfloat16 turns a router's choice, a token meets another expert."""
    return float(differences.sort().values[:-2].mean())
