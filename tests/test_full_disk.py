"""Disks that fill up while a model is quantized, or cannot be written: a clear error, and finished blocks stay good."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import GROUP_SIZE, save_model, token_ids

import matgptq
from matgptq.errors import CheckpointError
from matgptq.quantization import block_quantizer
from matgptq.quantization import run as quantization_run
from matgptq.quantization.work_directory import WorkDirectory, work_path

BLOCKS = 3
SIZE = 64 << 20
SOLVES_PER_BLOCK = 4


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)], capture_output=True, text=True
        )
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if done.returncode:
        pytest.skip(f"this user may not mount file systems: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model") / "source", torch.bfloat16, num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(source, out)
    return (out / "model.safetensors").read_bytes()


def quantize(source: Path, out: Path) -> None:
    matgptq.quantize(source, out, dataset=token_ids(), group_size=GROUP_SIZE, quality="fast")


def fill(disk: Path) -> None:
    """Leave nothing to write to."""
    with (disk / "filler").open("wb", buffering=0) as handle:
        for size in (1 << 20, 1 << 12):
            while True:
                try:
                    handle.write(bytes(size))
                except OSError:
                    break


def after(monkeypatch: pytest.MonkeyPatch, solves: int, happens: Callable[[], None]) -> list[int]:
    """Let something happen before a solve; the list grows with every solve."""
    real, calls = block_quantizer.solve, []

    def solve(*arguments: Any) -> Any:
        if len(calls) == solves:
            happens()
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(block_quantizer, "solve", solve)
    return calls


def test_the_same_command_goes_on_when_there_is_space_again(
    disk: Path, source: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = disk / "out"
    after(monkeypatch, SOLVES_PER_BLOCK, lambda: fill(disk))  # the first block is finished
    with pytest.raises(CheckpointError, match="No space left") as caught:
        quantize(source, out)
    assert str(out) in str(caught.value)
    assert not out.exists()
    (disk / "filler").unlink()
    assert len(list(work_path(out).glob("block-*.json"))) == 1
    monkeypatch.undo()
    calls = after(monkeypatch, -1, lambda: None)
    quantize(source, out)
    assert len(calls) == SOLVES_PER_BLOCK * (BLOCKS - 1)  # what was finished is not solved again
    assert (out / "model.safetensors").read_bytes() == whole
    assert {file.name for file in disk.iterdir()} == {"out"}


def test_a_read_only_place_is_refused_before_the_first_token(
    disk: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    def read(*_: object, **__: object) -> None:
        raise AssertionError("calibration text was asked for")

    monkeypatch.setattr(quantization_run, "calibration_windows", read)
    with pytest.raises(CheckpointError, match="is read-only"):
        quantize(source, disk / "out")


def test_a_place_that_is_too_small_is_refused_before_the_first_token(
    disk: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(disk)

    def read(*_: object, **__: object) -> None:
        raise AssertionError("calibration text was asked for")

    monkeypatch.setattr(quantization_run, "calibration_windows", read)
    with pytest.raises(matgptq.errors.MatGPTQError, match="disk"):
        quantize(source, disk / "out")


def test_no_room_to_sum_in(disk: Path) -> None:
    """Of a mapped file whose place is missing, the process would die."""
    with WorkDirectory(disk / "out", {}) as work:
        with work.scratch("sums", 1000) as memory:
            assert torch.equal(memory, torch.zeros(1000))
            memory[3] = 1
        fill(disk)
        with pytest.raises(CheckpointError, match="disk"), work.scratch("sums", 1 << 18):
            pass
        assert not (work.path / "sums").exists()


def test_files_follow_the_umask(source: Path, tmp_path: Path) -> None:
    """Some libraries make files that only their owner may read."""
    before = os.umask(0o027)
    try:
        quantize(source, tmp_path / "out")
        matgptq.refine(tmp_path / "out", (2,), steps=1, dataset=token_ids(6), nsamples=2)
        for form in ("dense", "matgptq-slice", "gguf"):
            matgptq.export(tmp_path / "out", tmp_path / form, format=form, bits=4)
    finally:
        os.umask(before)
    modes = {file: file.stat().st_mode & 0o777 for file in tmp_path.rglob("*") if file.is_file()}
    assert {file: oct(mode) for file, mode in modes.items() if mode != 0o640} == {}
