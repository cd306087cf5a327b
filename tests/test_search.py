"""The search on a tiny checkpoint: budgets, resuming, what is saved and shown, bad input."""

from __future__ import annotations

import json
import math
import shutil
import sys
from fractions import Fraction
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import token_ids

import matgptq
from matgptq.allocation import format_lines, read_allocation
from matgptq.checkpoints.allocation_store import stored_allocations
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.errors import AllocationError, ConfigurationError, MatGPTQError
from matgptq.models.blocks import block_modules
from matgptq.models.families import find_family
from matgptq.models.source import open_source
from matgptq.models.teacher import observe
from matgptq.slicing import WIDTHS
from matgptq.width_search import scoring
from matgptq.width_search.allocation_search import Search
from matgptq.width_search.block_runner import BlockRunner
from matgptq.width_search.evolution import EvolutionSettings
from matgptq.width_search.layer_groups import group_layers
from matgptq.width_search.scoring import Scorer
from matgptq.width_search.settings import Method, make_settings

TEXT = token_ids(24, 16, seed=3)
SMALL: dict[str, Any] = {"dataset": TEXT, "tokens": 256, "seqlen": 16, "generations": 2, "offspring": 4}


def search(checkpoint: Path, target: Any = None, **options: Any) -> Search:
    return matgptq.search(checkpoint, target, **{**SMALL, **options})


def events(checkpoint: Path, name: str) -> list[dict[str, Any]]:
    lines = (checkpoint / "search" / "log.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def test_budget_is_kept_and_the_result_is_served(checkpoint: Path) -> None:
    result = search(checkpoint, 3.5)
    found = result.found[0]
    opened = open_checkpoint(checkpoint)
    record = stored_allocations(opened)["3.5bpw"]
    layers = record["layers"]
    assert set(layers) == set(opened.layers)
    assert opened.served_bits(layers) + found.slack_bits == int(3.5 * opened.quantized_weights)
    assert record["bytes"] == found.bytes == opened.served_bytes(layers)
    assert layers["model.layers.0.self_attn.q_proj"] == layers["model.layers.0.self_attn.v_proj"]
    assert layers["model.layers.1.mlp.gate_proj"] == layers["model.layers.1.mlp.up_proj"]
    assert [each.name for each in result.uniform] == ["3 bits", "4 bits"]

    model = matgptq.load(checkpoint, allocation="3.5bpw")
    assert {name: module.bits for name, module in model.named_modules() if name in layers} == layers
    evaluation = matgptq.evaluate(checkpoint, allocation="3.5bpw", text=token_ids(2, 16))
    assert evaluation.results[0].bytes == found.bytes
    text = checkpoint / "allocations" / "3.5bpw.txt"
    assert text.read_text() == format_lines(layers)
    assert read_allocation(text) == layers


def test_scores_are_those_of_the_whole_model(checkpoint: Path) -> None:
    """Sharing beginnings, batches and pieces changes nothing but the time: compared with evaluate, one by one."""
    family = find_family("llama")
    opened = open_checkpoint(checkpoint)
    groups = group_layers(opened.layers, family)
    model = matgptq.load(checkpoint, 8)
    full = open_source(str(opened.settings.source)).load_model(torch.float32)
    teacher = observe(full, TEXT)
    scorer = Scorer(model, block_modules(model, family), groups, TEXT, teacher)
    genomes = [(8,) * 8, (8,) * 7 + (2,), (8,) * 4 + (3,) + (8,) * 3, (2,) * 8, (8, 2, 3, 4, 5, 6, 7, 8), (8,) * 8]
    rows = [5, 0, 7]
    scores = scorer.score(genomes, rows)
    for genome, score in zip(genomes, scores, strict=True):
        allocation = {layer: bits for group, bits in zip(groups, genome, strict=True) for layer in group.layers}
        result = matgptq.evaluate(checkpoint, allocation=allocation, text=TEXT[rows]).results[0]
        assert score == pytest.approx(result.kl, rel=1e-4, abs=1e-7)
    assert scorer.score(genomes[::-1], rows) == scores[::-1]
    likelihood = Scorer(model, block_modules(model, family), groups, TEXT, None)
    perplexity = matgptq.evaluate(checkpoint, (2,), text=TEXT[rows]).results[0].perplexity
    assert likelihood.score([(2,) * 8], rows)[0] == pytest.approx(math.log(perplexity), rel=1e-5)


@pytest.mark.parametrize("windows", [1, 3])
def test_batches_of_windows(checkpoint: Path, windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    family = find_family("llama")
    groups = group_layers(open_checkpoint(checkpoint).layers, family)
    model = matgptq.load(checkpoint, 8)
    genomes = [(8,) * 8, (8,) * 7 + (2,), (2,) * 8]
    whole = Scorer(model, block_modules(model, family), groups, TEXT, None).score(genomes, range(5))
    monkeypatch.setattr(scoring, "_BATCH_LOGITS", windows * TEXT.shape[1] * 288)
    assert Scorer(model, block_modules(model, family), groups, TEXT, None).score(genomes, range(5)) == pytest.approx(
        whole, rel=1e-5
    )


def test_only_changed_blocks_run(checkpoint: Path) -> None:
    family = find_family("llama")
    model = matgptq.load(checkpoint, 4)
    blocks = block_modules(model, family)
    runner = BlockRunner(model, blocks)
    expected = runner.logits(TEXT[:2])
    ran: list[int] = []
    for index, block in enumerate(blocks):
        block.self_attn.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    for first in range(len(blocks) + 1):
        ran.clear()
        assert torch.equal(runner.logits(TEXT[:2], first), expected)
        assert ran == list(range(first, len(blocks)))


class Stopped(BaseException):
    """Stands for Ctrl-C, which pytest would take for itself."""


@pytest.mark.parametrize("calls", [0, 1, 3, 4])
def test_resumed_search_gives_the_uninterrupted_answer(
    checkpoint: Path, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks of the table are two scores, a generation two more, the final measurement the last."""
    other = shutil.copytree(checkpoint, checkpoint.parent / "other")
    expected = search(other, 3.4)
    done = 0
    original = Scorer.score

    def score(self: Scorer, *arguments: Any) -> list[float]:
        nonlocal done
        if done == calls:
            raise Stopped
        done += 1
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score", score)
        with pytest.raises(Stopped):
            search(checkpoint, 3.4)
    assert events(checkpoint, "end")[-1]["error"].startswith("Stopped")
    assert not list((checkpoint / "allocations").glob("*"))
    resumed = search(checkpoint, 3.4, resume=True)
    assert resumed.found == expected.found
    assert resumed.tokens_scored == expected.tokens_scored
    assert len(events(checkpoint, "generation")) == len(events(other, "generation"))


def test_same_seed_same_answer_and_the_table_is_measured_once(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = []
    original = Scorer.score

    def score(self: Scorer, genomes: Any, rows: Any) -> list[float]:
        scored.append(len(genomes))
        return original(self, genomes, rows)

    monkeypatch.setattr(Scorer, "score", score)
    first = search(checkpoint, 3.4)
    before = sum(scored)
    scored.clear()
    again = search(checkpoint, 3.4)
    assert again.found == first.found
    assert sum(scored) == before - 8 * 2 - 4 * 4 - 1  # groups alone, kinds together, and the base
    assert first.tokens_scored == again.tokens_scored
    scored.clear()
    search(checkpoint, 4.4, generations=0)
    assert sum(scored) == len(search(checkpoint, 4.4, generations=0).uniform) + 1


@pytest.mark.parametrize("method", ["sensitivity", "evolution"])
def test_the_ends_of_the_range_terminate(checkpoint: Path, method: str) -> None:
    opened = open_checkpoint(checkpoint)
    for bits in (2, 8):
        found = search(checkpoint, target_size=opened.served_bytes(bits), method=method).found[0]
        assert set(found.widths) == {bits}
        assert found.bytes == opened.served_bytes(bits)
    with pytest.raises(AllocationError, match="bits per weight cannot be reached"):
        search(checkpoint, 2.0, method=method)
    assert search(checkpoint, Fraction(8), method=method).found[0].slack_bits >= 0


def test_sweep_beside_uniform_widths(checkpoint: Path) -> None:
    result = search(checkpoint, [2.5, 4, "6.5"], save="front")
    assert [found.name for found in result.found] == ["front-2.5bpw", "front-4bpw", "front-6.5bpw"]
    sizes = [found.bytes for found in result.found]
    assert sizes == sorted(sizes)
    assert [each.widths[0] for each in result.uniform] == list(WIDTHS)
    losses = [each.loss for each in result.uniform]
    solved = [
        losses[WIDTHS.index(bits)] for bits in (2, 3, 4, 8)
    ]  # 6 and 7 bits are next to each other, and no targets
    assert solved == sorted(solved, reverse=True)
    assert max(losses[4:]) < losses[2]
    assert set(stored_allocations(open_checkpoint(checkpoint))) == {found.name for found in result.found}
    # Better than what uniform widths of about the same size give.
    assert result.found[0].loss < losses[0]


def test_many_budgets_are_refined_less_unless_asked() -> None:
    def made(budgets: int, method: Method = "sensitivity", **asked: int | None) -> EvolutionSettings:
        options: dict[str, Any] = {"offspring": None, "generations": None, **asked}
        return make_settings(
            method=method, fitness="kl", fuse="serving", widths=WIDTHS, seed=0, tokens=16384, seqlen=512,
            budgets=budgets, **options,
        ).evolution  # fmt: skip

    single, many = made(1), made(16)
    assert many.offspring < single.offspring
    assert many.patience < single.patience
    assert [stage.keep for stage in many.stages] == [many.offspring // 4, 1]
    assert made(16, offspring=24, generations=8).stages == single.stages
    assert made(16, "evolution") == made(1, "evolution")


def test_evolution_starts_near_uniform_and_needs_no_table(checkpoint: Path) -> None:
    result = search(checkpoint, 3.5, method="evolution", widths=(2, 3, 4))
    assert set(result.found[0].widths) <= {2, 3, 4}
    assert not list((checkpoint / "search").glob("sensitivity-*"))
    # 4 starts on 2 windows; 2 generations of 5 on 2 windows and of at most 5 on 8.
    assert result.tokens_scored <= 16 * (4 * 2 + 2 * (5 * 2 + 5 * 8))
    assert search(checkpoint, 3.5, method="evolution", widths=(2, 3, 4), resume=True).found == result.found


def test_layers_of_their_own(checkpoint: Path) -> None:
    result = search(checkpoint, 3.5, fuse="none")
    assert len(result.groups) == 14
    assert (1, "mlp.gate_proj") in result.groups


def test_perplexity_needs_no_full_model(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["source"] = None
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="--fitness ppl"):
        search(checkpoint, 3.5)
    result = search(checkpoint, 3.5, fitness="ppl")
    assert stored_allocations(open_checkpoint(checkpoint))["3.5bpw"]["fitness"]["measure"] == "ppl"
    stored = stored_allocations(open_checkpoint(checkpoint))["3.5bpw"]["fitness"]["value"]
    assert stored == pytest.approx(math.exp(result.found[0].loss))  # a perplexity, not its logarithm
    assert result.found[0].loss > 1  # nats of random text, not a divergence


def test_an_allocation_of_another_checkpoint_is_refused(checkpoint: Path, make_checkpoint: Any) -> None:
    search(checkpoint, 3.5, save="mine", generations=0)
    source = make_checkpoint("llama")[0]
    other = checkpoint.parent / "other"
    matgptq.quantize(source, other, dataset=token_ids(seed=9), group_size=64)
    file = checkpoint / "allocations" / "mine.json"
    with pytest.raises(AllocationError, match="another checkpoint"):
        matgptq.load(other, allocation=file)
    shutil.copytree(checkpoint / "allocations", other / "allocations")
    with pytest.raises(AllocationError, match="another checkpoint"):
        matgptq.evaluate(other, allocation="mine", text=TEXT)
    matgptq.load(other, allocation=file.with_suffix(".txt"))  # on purpose
    for name in ("yours", "y" * 300, "y/" * 3000):
        with pytest.raises(AllocationError, match=r"no such allocation: .* has mine"):
            matgptq.load(checkpoint, allocation=name)


def test_the_identity_is_that_of_the_tensors(checkpoint: Path) -> None:
    identity = open_checkpoint(checkpoint).identity
    moved = shutil.move(checkpoint, checkpoint.parent / "moved")
    config = json.loads((moved / "config.json").read_text())
    config["quantization_config"]["bits"] = 3
    (moved / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(moved).identity == identity


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (None, {}, "give a target"),
        (3.5, {"target_size": "1MB"}, "give a target"),
        ([], {}, "at least one target"),
        (2.2, {}, r"widths 2 to 8 take 2\.\d+ to 8\.\d+, scales included"),
        (9, {}, "scales included"),
        (4, {"widths": (2, 3)}, r"widths 2 to 3 take"),
        (None, {"target_size": "10"}, r"not quantized \(embeddings"),
        (None, {"target_size": "10 potatoes"}, "a size is"),
        (3.5, {"widths": (1, 2)}, "2 to 8"),
        (3.5, {"widths": ()}, "at least one width"),
        (3.5, {"tokens": 64}, "64 tokens are too few to search on: 8 windows of 16 take 128"),
        (3.5, {"seqlen": 4096}, "context of 64 tokens"),
        (3.5, {"tokens": 4096}, "384 are needed"),
        (3.5, {"method": "magic"}, "method must be one of sensitivity, evolution"),
        (3.5, {"fitness": "joy"}, "fitness must be one of"),
        (3.5, {"fuse": "all"}, "fuse must be one of"),
        (3.5, {"offspring": 0}, "offspring"),
        (3.5, {"generations": -1}, "generations"),
        (3.5, {"save": "../escape"}, "name is letters"),
        (3.5, {"save": "x" * 201}, "at most 200 characters, not 201"),
        (3.5, {"reference": "nowhere"}, "nowhere"),
    ],
)
def test_refusals(checkpoint: Path, target: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MatGPTQError, match=message):
        search(checkpoint, target, **options)
    assert not (checkpoint / "allocations").exists()


def test_weights_and_biases(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An extra: refused early where it is not installed, and not imported unless asked for."""
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    search(checkpoint, 3.5, generations=0)
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"matgptq\[wandb\]"):
        search(checkpoint, 3.5, wandb_project="p")
    monkeypatch.undo()

    logged: list[dict[str, Any]] = []
    finished: list[int] = []
    run = SimpleNamespace(log=logged.append, finish=lambda exit_code: finished.append(exit_code))
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.init = lambda project, config: run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    search(checkpoint, 3.5, wandb_project="p", generations=1)
    assert any("generation/fitness" in values for values in logged)
    assert finished == [0]


def test_what_is_logged(checkpoint: Path) -> None:
    result = search(checkpoint, 3.5)
    assert events(checkpoint, "start")[0]["checkpoint"] == open_checkpoint(checkpoint).identity
    generations = events(checkpoint, "generation")
    assert [event["generation"] for event in generations] == [1, 2]
    assert events(checkpoint, "table")[0]["tokens"] + generations[-1]["tokens"] == result.tokens_scored
    assert events(checkpoint, "found")[0]["bytes"] == result.found[0].bytes
    assert events(checkpoint, "end") == [events(checkpoint, "end")[0]]
    assert events(checkpoint, "end")[0]["error"] is None
