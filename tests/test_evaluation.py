"""Perplexity, KL and agreement against plain formulas, and the verb on a tiny checkpoint."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_models import VOCAB

import matgptq
from matgptq.checkpoint import open_checkpoint
from matgptq.errors import AllocationError, CalibrationError, ConfigurationError, SourceError
from matgptq.evaluation import Divergence


@pytest.mark.parametrize("positions", [1, 5, 255, 256, 257, 600])
def test_divergence_equals_formulas(positions: int) -> None:
    generator = torch.Generator().manual_seed(positions)
    logits = torch.randn(positions, 50, generator=generator, dtype=torch.float64) * 3
    full = logits + torch.randn(positions, 50, generator=generator, dtype=torch.float64)
    targets = torch.randint(50, (positions,), generator=generator)
    measured = Divergence()
    measured.add(logits.float(), targets, full.float())
    p, q = torch.softmax(full, -1), torch.softmax(logits, -1)
    assert measured.kl / measured.tokens == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    expected = math.exp(float(-q.gather(1, targets[:, None]).log().mean()))
    assert measured.perplexity == pytest.approx(expected, rel=1e-5)
    assert measured.agreements == int((p.argmax(-1) == q.argmax(-1)).sum())


def test_perplexity_overflow_is_infinite() -> None:
    measured = Divergence()
    measured.add(torch.tensor([[0.0, 1e6]]), torch.tensor([0]), None)
    assert measured.perplexity == math.inf


@pytest.fixture
def source(make_checkpoint):
    return make_checkpoint("llama")[0]


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(2, VOCAB - 8, (3, 24), generator=torch.Generator().manual_seed(5))


def test_widths_against_the_source(checkpoint, source, windows) -> None:
    evaluation = matgptq.evaluate(checkpoint, (2, 4, 8), text=windows, reference=source)
    assert [result.bits for result in evaluation.results] == [2, 4, 8]
    kl = [result.kl for result in evaluation.results]
    assert kl[0] > kl[1] > kl[2] > 0
    opened = open_checkpoint(checkpoint)
    for result in evaluation.results:
        assert result.bytes == opened.served_bytes(int(result.bits))
        assert result.bits_per_weight == opened.bits_per_weight(int(result.bits))
        assert 0 <= result.top1 <= 1
    model = matgptq.load(checkpoint, bits=4)
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in windows]
    assert evaluation.results[1].perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_source_is_found_again(checkpoint, windows) -> None:
    assert matgptq.evaluate(checkpoint, (8,), text=windows).results[0].kl is not None


def test_without_the_source_kl_is_absent_and_said(checkpoint, windows) -> None:
    gone = checkpoint.parent / "gone"
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["source"] = str(gone)
    (checkpoint / "config.json").write_text(json.dumps(config))
    notes: list[str] = []

    class Listener:
        def start(self, stage: str, total: int) -> None: ...
        def advance(self, steps: int = 1) -> None: ...
        def note(self, message: str) -> None:
            notes.append(message)

    evaluation = matgptq.evaluate(checkpoint, (8,), text=windows, progress=Listener())
    assert evaluation.results[0].kl is None
    assert evaluation.results[0].top1 is None
    assert any("--reference" in note for note in notes)
    with pytest.raises(SourceError):
        matgptq.evaluate(checkpoint, (8,), text=windows, reference=gone)


def test_allocation(checkpoint, windows) -> None:
    layers = list(open_checkpoint(checkpoint).layers)
    mixed = {name: (2 if index % 2 else 6) for index, name in enumerate(layers)}
    evaluation = matgptq.evaluate(checkpoint, (2, 6), allocation=mixed, text=windows)
    low, high, middle = evaluation.results
    assert low.bytes < middle.bytes < high.bytes
    assert 2 < middle.bits < 6
    assert len(matgptq.evaluate(checkpoint, allocation=mixed, text=windows).results) == 1
    with pytest.raises(AllocationError, match="nowhere"):
        matgptq.evaluate(checkpoint, allocation={"nowhere": 4}, text=windows)


def test_refusals(checkpoint, tmp_path, windows) -> None:
    with pytest.raises(ConfigurationError, match="9"):
        matgptq.evaluate(checkpoint, (9,), text=windows)
    short = tmp_path / "short.txt"
    short.write_text("too short\n")
    with pytest.raises(CalibrationError):
        matgptq.evaluate(checkpoint, (8,), text=short, seqlen=32)
    with pytest.raises(ConfigurationError, match="context"):
        matgptq.evaluate(checkpoint, (8,), text=short, seqlen=100_000)
