"""The same seed gives the same bytes with the same number of threads.

With another number it does not: the libraries beneath PyTorch cut products by it (docs/scale.md).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import GROUP_SIZE, save_model, token_ids

import matgptq


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("model", "dtype", "options"),
    [
        ("llama", torch.bfloat16, {"quality": "fast"}),
        ("llama", torch.float32, {"quality": "balanced"}),
        ("qwen2", torch.bfloat16, {"quality": "best", "tuning_steps": 2}),
        ("llama", torch.bfloat16, {"method": "paper"}),
        ("mixtral", torch.bfloat16, {"quality": "fast"}),
    ],
    ids=["fast", "balanced", "best", "paper", "experts"],
)
def test_the_same_seed_gives_the_same_bytes(model, dtype, options, threads, tmp_path: Path) -> None:
    # Wide enough that products and the solver hand out work: 1,024 rows, 512 tokens.
    source = save_model(model, tmp_path / "source", dtype, shape={"intermediate_size": 1024})
    for number in (1, 3):
        threads(number)
        written = set()
        for attempt in ("first", "second"):
            out = tmp_path / f"{attempt}-{number}"
            matgptq.quantize(source, out, dataset=token_ids(8, 64), group_size=GROUP_SIZE, **options)
            written.add((out / "model.safetensors").read_bytes())
        assert len(written) == 1
