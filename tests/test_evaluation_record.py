"""What ``eval`` keeps beside a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from measurements import SETTINGS, on_tasks, on_text

from matgptq.errors import CheckpointError
from matgptq.evaluation_record import RECORD_NAME, read_record, record_evaluation


def perplexities(entry) -> dict[int, float]:
    return {row["bits"]: row["perplexity"] for row in entry["results"]}


def test_nothing_is_recorded_of_a_new_checkpoint(tmp_path: Path) -> None:
    assert read_record(tmp_path) == {"texts": [], "tasks": []}


def test_rows_of_the_same_way_of_measuring_are_gathered(tmp_path: Path) -> None:
    record_evaluation(tmp_path, on_text({8: 2.0, 3: 4.0}))
    record_evaluation(tmp_path, on_text({8: 1.0}, protocol="another text"))
    record_evaluation(tmp_path, on_text({2: 9.0, 3: 5.0}))
    first, last = read_record(tmp_path)["texts"]
    assert (first["protocol"], perplexities(first)) == ("another text", {8: 1.0})
    assert (last["protocol"], perplexities(last)) == ("some text", {2: 9.0, 3: 5.0, 8: 2.0})
    assert [row["bits"] for row in last["results"]] == [2, 3, 8]
    assert last["reference_perplexity"] == 1.5
    record_evaluation(tmp_path, dataclasses.replace(on_text({3: 7.0}), settings={**SETTINGS, "activations": "int8"}))
    assert len(read_record(tmp_path)["texts"]) == 3
    assert [file.name for file in tmp_path.iterdir()] == [RECORD_NAME]


def test_tasks_are_gathered_by_width(tmp_path: Path) -> None:
    record_evaluation(tmp_path, on_tasks("arc", {3: 0.3, 8: 0.8}, full=0.9))
    record_evaluation(tmp_path, on_tasks("piqa", {3: 0.4}, full=0.7))
    (entry,) = read_record(tmp_path)["tasks"]
    assert entry["shown"] == ["arc", "piqa"]
    values = {
        row["bits"]: {task: row["scores"][task]["acc"]["value"] for task in row["scores"]} for row in entry["results"]
    }
    assert values == {3: {"arc": 0.3, "piqa": 0.4}, 8: {"arc": 0.8}}
    assert {task: score["acc"]["value"] for task, score in entry["reference_scores"].items()} == {
        "arc": 0.9,
        "piqa": 0.7,
    }


def test_allocations_are_not_kept(tmp_path: Path) -> None:
    record_evaluation(tmp_path, on_text({3.5: 3.0}))
    assert not (tmp_path / RECORD_NAME).exists()
    record_evaluation(tmp_path, on_text({3: 4.0, 3.5: 3.0}))
    assert perplexities(read_record(tmp_path)["texts"][0]) == {3: 4.0}


def test_a_path_of_this_machine_is_not_recorded(tmp_path: Path) -> None:
    record_evaluation(tmp_path, dataclasses.replace(on_text({3: 4.0}), reference=str(tmp_path / "llama")))
    assert str(tmp_path) not in (tmp_path / RECORD_NAME).read_text()
    assert read_record(tmp_path)["texts"][0]["reference"] == "llama"


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"texts": 3, "tasks": []}', '{"texts": [], "tasks": [{}]}'])
def test_a_damaged_record_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / RECORD_NAME).write_text(damage)
    with pytest.raises(CheckpointError, match=RECORD_NAME):
        record_evaluation(tmp_path, on_text({3: 4.0}))
    assert (tmp_path / RECORD_NAME).read_text() == damage


def test_a_full_disk_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_evaluation(tmp_path, on_text({3: 4.0}))
    before = json.loads((tmp_path / RECORD_NAME).read_text())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        record_evaluation(tmp_path, on_text({2: 9.0}))
    assert json.loads((tmp_path / RECORD_NAME).read_text()) == before
    assert [file.name for file in tmp_path.iterdir()] == [RECORD_NAME]
