"""What ``eval`` keeps beside a checkpoint."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from measurements import SETTINGS, on_tasks, on_text
from safetensors.torch import load_file, save_file

from matgptq.allocation import Allocation
from matgptq.checkpoints.allocation_scales import widths_scales
from matgptq.checkpoints.allocation_store import ALLOCATIONS, save_allocation
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.checkpoints.evaluation_record import Record, read_record, record_evaluation
from matgptq.checkpoints.evaluation_results import Evaluation, TaskEvaluation
from matgptq.checkpoints.format import RECORD_NAME
from matgptq.checkpoints.scale_replacement import replace_scales
from matgptq.errors import CheckpointError


def perplexities(entry) -> dict[Any, float]:
    return {row["allocation"] or row["bits"]: row["perplexity"] for row in entry["results"]}


def record(checkpoint: Path, *evaluations: Evaluation | TaskEvaluation) -> None:
    for evaluation in evaluations:
        record_evaluation(open_checkpoint(checkpoint), evaluation)


def read(checkpoint: Path) -> Record:
    return read_record(open_checkpoint(checkpoint))


def allocate(checkpoint: Path, name: str, bits: int) -> None:
    opened = open_checkpoint(checkpoint)
    layers = dict.fromkeys(opened.layers, bits)
    save_allocation(opened, Allocation(name, opened.identity, "", bits, bits, 1, 0, {}, {}, layers))


def test_nothing_is_recorded_of_a_new_checkpoint(checkpoint: Path) -> None:
    assert read(checkpoint) == {"texts": [], "tasks": []}


def test_rows_of_the_same_way_of_measuring_are_gathered(checkpoint: Path) -> None:
    before = {file.name for file in checkpoint.iterdir()}
    record(checkpoint, on_text({8: 2.0, 3: 4.0}), on_text({8: 1.0}, protocol="another text"), on_text({2: 9.0, 3: 5.0}))
    first, last = read(checkpoint)["texts"]
    assert (first["protocol"], perplexities(first)) == ("another text", {8: 1.0})
    assert (last["protocol"], perplexities(last)) == ("some text", {2: 9.0, 3: 5.0, 8: 2.0})
    assert [row["bits"] for row in last["results"]] == [2, 3, 8]
    assert last["reference_perplexity"] == 1.5
    record(checkpoint, dataclasses.replace(on_text({3: 7.0}), settings={**SETTINGS, "activations": "int8"}))
    assert len(read(checkpoint)["texts"]) == 3
    assert {file.name for file in checkpoint.iterdir()} == before | {RECORD_NAME}


def test_tasks_are_gathered_by_width(checkpoint: Path) -> None:
    record(checkpoint, on_tasks("arc", {3: 0.3, 8: 0.8}, full=0.9), on_tasks("piqa", {3: 0.4}, full=0.7))
    (entry,) = read(checkpoint)["tasks"]
    assert entry["shown"] == ["arc", "piqa"]
    columns = [(row["bits"], row["scores"]) for row in entry["results"]] + [("full", entry["reference_scores"])]
    values = {name: {task: scores[task]["acc"]["value"] for task in scores} for name, scores in columns}
    assert values == {3: {"arc": 0.3, "piqa": 0.4}, 8: {"arc": 0.8}, "full": {"arc": 0.9, "piqa": 0.7}}


def test_allocations_are_kept_that_lie_with_the_checkpoint(checkpoint: Path) -> None:
    record(checkpoint, on_text({3.5: 3.0}, allocation="elsewhere.json"))
    assert not (checkpoint / RECORD_NAME).exists()
    allocate(checkpoint, "small", 3)
    record(checkpoint, on_text({3: 4.0}), on_text({3.0: 3.0}, allocation="small"))
    assert perplexities(read(checkpoint)["texts"][0]) == {3: 4.0, "small": 3.0}
    allocate(checkpoint, "small", 4)  # another one under the same name
    assert perplexities(read(checkpoint)["texts"][0]) == {3: 4.0}
    record(checkpoint, on_text({4.0: 2.0}, allocation="small"))
    assert perplexities(read(checkpoint)["texts"][0]) == {3: 4.0, "small": 2.0}
    shutil.rmtree(checkpoint / ALLOCATIONS)
    assert perplexities(read(checkpoint)["texts"][0]) == {3: 4.0}


def test_figures_of_other_scales_are_forgotten(checkpoint: Path) -> None:
    record(checkpoint, on_text({3: 4.0}))
    assert read(checkpoint)["texts"]
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(name for name in tensors if name.endswith("scales_3"))
    tensors[name] *= 2
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert not read(checkpoint)["texts"]
    record(checkpoint, on_text({2: 9.0}))
    assert perplexities(read(checkpoint)["texts"][0]) == {2: 9.0}


def test_a_path_of_this_machine_is_not_recorded(checkpoint: Path) -> None:
    record(checkpoint, dataclasses.replace(on_text({3: 4.0}), reference=str(checkpoint.parent / "llama")))
    assert str(checkpoint.parent) not in (checkpoint / RECORD_NAME).read_text()
    assert read(checkpoint)["texts"][0]["reference"] == "llama"


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"texts": 3, "tasks": []}', '{"texts": [], "tasks": [{}]}'])
def test_a_damaged_record_is_named(checkpoint: Path, damage: str) -> None:
    (checkpoint / RECORD_NAME).write_text(damage)
    with pytest.raises(CheckpointError, match=RECORD_NAME):
        record(checkpoint, on_text({3: 4.0}))
    assert (checkpoint / RECORD_NAME).read_text() == damage


def test_a_full_disk_leaves_the_old_record(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(checkpoint, on_text({3: 4.0}))
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        record(checkpoint, on_text({2: 9.0}))
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before


def test_new_scales_of_a_width_leave_the_figures_of_others(checkpoint: Path) -> None:
    for name, bits in (("low", 2), ("high", 8)):
        allocate(checkpoint, name, bits)
        record(checkpoint, on_text({bits: 3.0}, allocation=name))
    record(checkpoint, on_text({2: 9.0, 8: 2.0}))
    scales = {layer: tensor * 1.5 for layer, tensor in widths_scales_of(checkpoint, 2).items()}
    replace_scales(checkpoint, 2, scales, {})
    assert perplexities(read(checkpoint)["texts"][0]) == {8: 2.0, "high": 3.0}
    record(checkpoint, on_text({3: 5.0}))
    assert perplexities(read(checkpoint)["texts"][0]) == {3: 5.0, 8: 2.0, "high": 3.0}


def widths_scales_of(checkpoint: Path, bits: int):
    opened = open_checkpoint(checkpoint)
    return widths_scales(opened, dict.fromkeys(opened.layers, bits))
