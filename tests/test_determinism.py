"""The same seed gives the same bytes, whatever the number of threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import GROUP_SIZE, save_model, token_ids

import matgptq
from matgptq.calibration import block_hessians
from matgptq.models.source import open_source
from matgptq.text.self_text import generate_windows


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def quantized(source: Path, out: Path, **options) -> bytes:
    matgptq.quantize(source, out, dataset=token_ids(8, 64), group_size=GROUP_SIZE, **options)
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("model", "dtype", "options"),
    [
        ("llama", torch.bfloat16, {"quality": "fast"}),
        ("llama", torch.float32, {"quality": "balanced"}),
        ("qwen2", torch.bfloat16, {"quality": "best", "tuned_bits": ()}),
        ("llama", torch.bfloat16, {"method": "paper"}),
        ("mixtral", torch.bfloat16, {"quality": "fast"}),
        ("mixtral", torch.float32, {"quality": "balanced", "min_expert_tokens": 1000}),
        ("llama", torch.float32, {"quality": "balanced", "activations": "disk"}),
    ],
    ids=["fast", "balanced", "rotated", "paper", "experts", "starved experts", "activations on disk"],
)
def test_the_same_seed_gives_the_same_bytes(model, dtype, options, threads, tmp_path: Path) -> None:
    # Wide enough that products and the solver hand out work: 1,024 rows, 512 tokens.
    source = save_model(model, tmp_path / "source", dtype, shape={"intermediate_size": 1024})
    written = set()
    for number in (1, 2, 3, 5):
        threads(number)
        written.add(quantized(source, tmp_path / str(number), **options))
        assert torch.get_num_threads() == number
    assert len(written) == 1


def test_tuned_scales_have_the_same_bytes(threads, tmp_path: Path) -> None:
    source = save_model("qwen2", tmp_path / "source", torch.bfloat16, shape={"intermediate_size": 1024})
    written = set()
    for number in (1, 2, 3):
        threads(number)
        written.add(quantized(source, tmp_path / str(number), quality="best", tuning_steps=2))
    assert len(written) == 1


def test_scales_tuned_block_by_block_have_the_same_bytes(threads, tmp_path: Path) -> None:
    source = save_model("mixtral", tmp_path / "source", torch.float32, shape={"intermediate_size": 1024})
    written = set()
    for number in (1, 2, 3):
        threads(number)
        out = tmp_path / str(number)
        before = quantized(source, out, quality="fast")
        matgptq.refine(out, (2,), scope="block", steps=24, dataset=token_ids(24, 64), learning_rate=3e-3)
        written.add((out / "model.safetensors").read_bytes())
    assert len(written) == 1
    assert before not in written


def test_the_model_writes_the_same_text(threads, tmp_path: Path) -> None:
    source = open_source(save_model("llama", tmp_path / "source", torch.float32))
    model, tokenizer = source.load_model(torch.float32, torch.device("cpu")), source.load_tokenizer()
    texts, sizes = [], {"nsamples": 4, "seqlen": 24, "document_tokens": 8, "batch_size": 2}
    for number in (1, 3):
        threads(number)
        place = tmp_path / f"cache-{number}"
        texts.append(generate_windows(model, tokenizer, seed=0, cache_dir=place, **sizes))
    assert torch.equal(*texts)


def test_an_error_in_a_thread_is_raised_and_the_threads_are_given_back(threads, monkeypatch, tmp_path: Path) -> None:
    source = save_model("llama", tmp_path / "source", torch.float32)
    run_block, calls = block_hessians.run_block, []

    def fail_late(*given) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("out of memory, say")
        return run_block(*given)

    monkeypatch.setattr(block_hessians, "run_block", fail_late)
    threads(3)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        quantized(source, tmp_path / "out")
    assert torch.get_num_threads() == 3
    assert not (tmp_path / "out").exists()
