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


@pytest.fixture
def float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float32 also where a CPU multiplies bfloat16 faster, for tests that compare to the last digit."""
    monkeypatch.setattr("matgptq.machine.devices.multiplies_bfloat16", lambda device: False)


@pytest.fixture
def checkpoint(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A private copy of a small checkpoint, to be damaged at will."""
    return shutil.copytree(make_checkpoint("llama")[1], tmp_path / "checkpoint")
