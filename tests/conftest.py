"""Tiny checkpoints, made once per test session and never changed in place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import GROUP_SIZE, save_model, token_ids

import matgptq

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter then; it has to know before anything imports it.
    os.environ["TRITON_INTERPRET"] = "1"

MakeCheckpoint = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeCheckpoint]:
    """``make_checkpoint("llama", torch.bfloat16)`` gives ``(source directory, checkpoint directory)``."""
    made: dict[Any, tuple[Path, Path]] = {}
    root = tmp_path_factory.mktemp("tiny")

    def make(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, Path]:
        if (name, dtype) not in made:
            directory = root / f"{name}-{dtype}"
            source = save_model(name, directory / "source", dtype)
            # What is not quantized is then the source's, bit for bit.
            options = {"group_size": GROUP_SIZE, "channel_scaling": 0.0}
            matgptq.quantize(source, directory / "out", dataset=token_ids(), **options)
            made[name, dtype] = (source, directory / "out")
        return made[name, dtype]

    yield make
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def plain_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``plain_checkpoint("llama", 32)``: the path of one in float32 with heads of that size, rounded to nearest."""
    made: dict[tuple[str, int], str] = {}

    def make(name: str, head_dim: int = 32) -> str:
        if (name, head_dim) not in made:
            directory = tmp_path_factory.mktemp(name)
            sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": head_dim}
            if name == "mistral":
                sizes["sliding_window"] = None  # with one shorter than the context there is a mask
            source = save_model(name, directory / "source", torch.float32, shape=sizes)
            matgptq.quantize(source, directory / "out", method="rtn", group_size=GROUP_SIZE)
            made[name, head_dim] = str(directory / "out")
        return made[name, head_dim]

    return make


@pytest.fixture
def float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float32 also where a CPU multiplies bfloat16 faster, for tests that compare to the last digit."""
    monkeypatch.setattr("matgptq.machine.devices.multiplies_bfloat16", lambda device: False)


@pytest.fixture
def checkpoint(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A private copy of a small checkpoint, to be damaged at will."""
    return shutil.copytree(make_checkpoint("llama")[1], tmp_path / "checkpoint")
