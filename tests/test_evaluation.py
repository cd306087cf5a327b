"""Perplexity, KL and agreement against plain formulas, and the verb on a tiny checkpoint."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_models import VOCAB, save_model
from torch import nn
from transformers import AutoModelForCausalLM

import matgptq
from matgptq.allocation import Allocation, format_lines
from matgptq.checkpoints.allocation_store import save_allocation, stored_allocations
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.checkpoints.evaluation_record import read_record, record_evaluation
from matgptq.console import allocations_table
from matgptq.errors import AllocationError, CalibrationError, ConfigurationError, SourceError
from matgptq.evaluation.text_evaluation import Divergence
from matgptq.inference.nested_linear import nested_layers
from matgptq.models.divergence import Predictor, compare
from matgptq.models.logits import OutputHead
from matgptq.models.source import load_tokenizer
from matgptq.text.windows import Windows


@pytest.mark.parametrize("positions", [1, 5, 255, 256, 257, 600])
def test_divergence_equals_formulas(positions: int) -> None:
    generator = torch.Generator().manual_seed(positions)
    logits = torch.randn(positions, 50, generator=generator, dtype=torch.float64) * 3
    full = logits + torch.randn(positions, 50, generator=generator, dtype=torch.float64)
    targets = torch.randint(50, (positions,), generator=generator)
    measured = Divergence()
    head = OutputHead(nn.Identity(), None)
    of_full, of_slice = compare([Predictor(head, full.float()), Predictor(head, logits.float())], targets)
    measured.add(of_slice, of_full)
    p, q = torch.softmax(full, -1), torch.softmax(logits, -1)
    assert measured.kl / measured.tokens == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    expected = math.exp(float(-q.gather(1, targets[:, None]).log().mean()))
    assert measured.perplexity == pytest.approx(expected, rel=1e-5)
    assert measured.agreements == int((p.argmax(-1) == q.argmax(-1)).sum())


def test_perplexity_overflow_is_infinite() -> None:
    measured = Divergence()
    head = OutputHead(nn.Identity(), None)
    measured.add(compare([Predictor(head, torch.tensor([[0.0, 1e6]]))], torch.tensor([0]))[0], None)
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


@pytest.mark.parametrize("bits", [2, 8])
def test_without_a_full_model_the_parent_writes_the_text(bits, checkpoint, monkeypatch) -> None:
    """Whatever width the checkpoint serves by default."""
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] |= {"source": None, "bits": bits}
    (checkpoint / "config.json").write_text(json.dumps(config))
    widths = []

    def read(*_, model, **__):
        widths.append({layer.bits for layer in nested_layers(model).values()})
        return Windows(torch.ones(1, 4, dtype=torch.int64), "ones")

    monkeypatch.setattr("matgptq.evaluation.text_evaluation.evaluation_windows", read)
    matgptq.evaluate(checkpoint, (2, 8), seqlen=4)
    assert widths == [{8}]


def test_texts_of_one_name_are_told_apart(checkpoint, source, tmp_path) -> None:
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(f"this is {name}, " * 20)
        found.append(matgptq.evaluate(checkpoint, 8, text=tmp_path / name / "text.txt", windows=1, seqlen=16))
    assert found[0].protocol == found[1].protocol
    assert found[0].measured_on != found[1].measured_on
    for evaluation in found:
        record_evaluation(open_checkpoint(checkpoint), evaluation)
    assert len(read_record(open_checkpoint(checkpoint))["texts"]) == 2


def test_a_file_called_like_a_stored_allocation_is_not_it(checkpoint, windows, tmp_path) -> None:
    opened = open_checkpoint(checkpoint)
    layers = dict.fromkeys(opened.layers, 3)
    save_allocation(opened, Allocation("mine", opened.identity, "", 3, 3, 1, 0, {}, {}, layers))
    other = tmp_path / "mine"
    other.write_text(format_lines(dict.fromkeys(opened.layers, 8)))
    evaluation = matgptq.evaluate(checkpoint, allocation=other, text=windows)
    assert evaluation.results[0].allocation == str(other)
    record_evaluation(opened, evaluation)
    assert not (checkpoint / "evaluation.json").exists()
    assert matgptq.evaluate(checkpoint, allocation="mine", text=windows).results[0].allocation == "mine"


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


@pytest.mark.parametrize("stride", [None, 1, 7, 15])
def test_windows_that_overlap_are_scored_at_their_end(checkpoint, source, tmp_path, stride) -> None:
    """Each token after the first window counts once, with at least seqlen - stride tokens before it."""
    text = "".join(chr(97 + n * n % 26) for n in range(60))
    (tmp_path / "a.txt").write_text(text)
    options = {"text": tmp_path / "a.txt", "seqlen": 16, "stride": stride, "windows": "all", "reference": source}
    evaluation = matgptq.evaluate(checkpoint, (3,), **options)
    ids = load_tokenizer(checkpoint)(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    model, full = matgptq.load(checkpoint, bits=3), AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    losses, kl = [], []
    for number, start in enumerate(range(0, len(ids) - 15, stride or 16)):
        window = ids[start : start + 16]
        keep = 15 if stride is None or number == 0 else stride
        with torch.no_grad():
            p, q = (each(window[None]).logits[0, :-1].log_softmax(-1)[-keep:] for each in (full, model))
        losses.append(-q.gather(1, window[-keep:, None]))
        kl.append((p.exp() * (p - q)).sum(-1))
    assert len(torch.cat(losses)) == (45 if stride is None else 15 + (len(losses) - 1) * stride)
    (result,) = evaluation.results
    assert result.perplexity == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)
    assert result.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)


def test_texts_are_refused_before_a_model_is_loaded(checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("was loaded"))
    for options, error in (
        ({"text": tmp_path / "missing.txt"}, CalibrationError),
        ({"stride": 4}, ConfigurationError),  # of text that the model writes
        ({"protocol": "gptq"}, ConfigurationError),
        ({"seqlen": 65}, ConfigurationError),
    ):
        with pytest.raises(error):
            matgptq.evaluate(checkpoint, (8,), **options)


def test_protocols_decide_how_many_windows(checkpoint, tmp_path) -> None:
    """A figure that is to compare with a published one takes all of the text, also on a CPU."""
    (tmp_path / "a.txt").write_text("x" * 100)
    for options, count in (({}, 4), ({"windows": "all"}, 6), ({"protocol": "gptq"}, 6), ({"windows": 2}, 2)):
        protocol = matgptq.evaluate(checkpoint, (8,), text=tmp_path / "a.txt", seqlen=16, **options).protocol
        assert protocol.startswith(f"{count} windows of 16 tokens")


def test_refusals(checkpoint, tmp_path, windows) -> None:
    with pytest.raises(ConfigurationError, match="9"):
        matgptq.evaluate(checkpoint, (9,), text=windows)
    short = tmp_path / "short.txt"
    short.write_text("too short\n")
    with pytest.raises(CalibrationError):
        matgptq.evaluate(checkpoint, (8,), text=short, seqlen=32)
    with pytest.raises(ConfigurationError, match="context"):
        matgptq.evaluate(checkpoint, (8,), text=short, seqlen=100_000)


def test_a_recorded_model_that_is_another_one_now_is_left_out(checkpoint, windows, tmp_path) -> None:
    other = save_model("llama", tmp_path / "other", shape={"vocab_size": 320})
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["source"] = str(other)
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert matgptq.evaluate(checkpoint, 8, text=windows).results[0].kl is None
    with pytest.raises(ConfigurationError, match="320 tokens in its vocabulary"):
        matgptq.evaluate(checkpoint, 8, text=windows, reference=other)


def test_token_ids_are_checked_like_text(checkpoint) -> None:
    for shape, options, message in (((2, 128), {}, "context of 64"), ((2, 8), {"seqlen": 0}, "2 tokens")):
        with pytest.raises(ConfigurationError, match=message):
            matgptq.evaluate(checkpoint, 8, text=torch.ones(shape, dtype=torch.int64), **options)


def test_allocations_by_hand_are_shown_and_damaged_ones_do_no_harm(checkpoint, windows) -> None:
    (checkpoint / "allocations").mkdir()
    layers = dict.fromkeys(open_checkpoint(checkpoint).layers, 3)
    (checkpoint / "allocations" / "mine.json").write_text(json.dumps(layers))
    opened = open_checkpoint(checkpoint)
    table = allocations_table(stored_allocations(opened), [opened.identity])
    assert table.row_count == 1
    (checkpoint / "allocations" / "odd.json").write_text(json.dumps({"layers": layers, "scales": 3}))
    record_evaluation(opened, matgptq.evaluate(checkpoint, 8, text=windows))
    assert len(read_record(opened)["texts"]) == 1
