"""Checksums: written with the tensors, kept right by everything that changes them, and no flipped bit passes."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import GROUP_SIZE, token_ids
from typer.testing import CliRunner

import matgptq
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.checkpoints.integrity import check_integrity
from matgptq.checkpoints.scale_replacement import replace_scales
from matgptq.checkpoints.writer import CheckpointWriter
from matgptq.cli import app
from matgptq.errors import CheckpointError, SourceError
from matgptq.files.checksums import CHECKSUMS_NAME, read_checksum
from matgptq.files.stored_tensors import data_starts, read_header, read_headers
from matgptq.files.tensor_file import write_tensors

Q = "model.layers.0.self_attn.q_proj"


def by_hand(directory: Path) -> dict[str, str]:
    """The specification, read from the files by safetensors alone."""
    digests = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                tensor = handle.get_tensor(name)
                line = f"{name} {handle.get_slice(name).get_dtype()} {tuple(tensor.shape)}\n"
                content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                digests[name] = hashlib.sha256(line.encode() + content).hexdigest()
    return digests


def stored(directory: Path) -> dict[str, str]:
    record = json.loads((directory / CHECKSUMS_NAME).read_text())
    assert record["algorithm"] == "sha256"
    digests: dict[str, str] = record["tensors"]
    return digests


def flip(file: Path, position: int, bit: int = 0) -> None:
    """Change one bit of a file in place, as a disk would."""
    with file.open("r+b") as handle:
        handle.seek(position)
        value = handle.read(1)[0]
        handle.seek(position)
        handle.write(bytes([value ^ (1 << bit)]))


@pytest.fixture(scope="module")
def sharded(make_checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("checksums") / "out"
    matgptq.quantize(
        make_checkpoint("llama")[0], out, dataset=token_ids(), group_size=GROUP_SIZE, method="rtn", shard_bytes=40_000
    )
    return out


def test_every_writer_writes_them(make_checkpoint, sharded, tmp_path) -> None:
    _, whole = make_checkpoint("llama")
    matgptq.load(whole).save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    matgptq.export(whole, tmp_path / "slice", format="matgptq-slice", bits=3)
    matgptq.load(tmp_path / "slice").save_pretrained(tmp_path / "slice-saved")
    matgptq.export(whole, tmp_path / "dense", format="dense", bits=3)
    for path in (whole, sharded, *tmp_path.iterdir()):
        assert stored(path) == by_hand(path), path
        result = check_integrity(path)
        assert result.passed, path
        assert result.checked == result.tensors == len(stored(path))
        assert result.bytes == sum(info.bytes for info in read_headers(path).values())
    assert check_integrity(tmp_path / "slice").kind == "slice"
    assert check_integrity(tmp_path / "dense").kind == "export"
    # However tensors are spread over files. The others are in the dtype that the model was loaded in.
    for name, digest in stored(whole).items():
        assert name.endswith(".weight") or stored(tmp_path / "saved")[name] == digest


def test_saving_over_a_checkpoint_replaces_them(checkpoint, sharded) -> None:
    model = matgptq.load(sharded)
    model.save_pretrained(checkpoint)
    assert stored(checkpoint) == by_hand(checkpoint)
    assert check_integrity(checkpoint).passed


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_replaced_scales_are_brought_up_to_date_and_older_damage_stays_known(
    kind, make_checkpoint, sharded, tmp_path
) -> None:
    path = shutil.copytree(make_checkpoint("llama")[1] if kind == "whole" else sharded, tmp_path / "out")
    before = stored(path)
    info = open_checkpoint(path).tensors[f"{Q}.codes"]
    flip(info.file, data_starts(info.file)[f"{Q}.codes"] + 7)
    scales = {
        name: torch.full((layer.out_features, layer.in_features // layer.group_size), 0.5)
        for name, layer in open_checkpoint(path).layers.items()
    }
    replace_scales(path, 3, scales, {})
    changed = {name for name, digest in stored(path).items() if before.get(name) != digest}
    own = {3} if kind == "whole" else {2, 3}  # rtn had scales of 8 bits only, which 2 bits go on reading as a copy
    assert changed == {f"{name}.scales_{bits}" for name in scales for bits in own}
    [damage] = check_integrity(path).damage
    assert damage.tensor == f"{Q}.codes"
    assert damage.file == str(open_checkpoint(path).tensors[f"{Q}.codes"].file)


def test_a_checkpoint_of_an_earlier_release_opens_and_says_that_it_has_none(checkpoint) -> None:
    (checkpoint / CHECKSUMS_NAME).unlink()
    matgptq.load(checkpoint)
    result = check_integrity(checkpoint)
    assert result.passed
    assert result.checked is None
    shown = CliRunner().invoke(app, ["verify", str(checkpoint)])
    assert shown.exit_code == 0
    assert "written before there were any" in shown.stdout
    scales = {
        name: torch.full((layer.out_features, layer.in_features // layer.group_size), 0.5)
        for name, layer in open_checkpoint(checkpoint).layers.items()
    }
    replace_scales(checkpoint, 3, scales, {})  # would vouch for what nobody checked
    assert not (checkpoint / CHECKSUMS_NAME).exists()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_flipped_bit_of_any_tensor_is_named(sharded, tmp_path_factory, data) -> None:
    path = shutil.copytree(sharded, tmp_path_factory.mktemp("flipped") / "out")
    tensors = {name: info for name, info in read_headers(path).items() if info.bytes}
    name = data.draw(st.sampled_from(sorted(tensors)))
    info = tensors[name]
    start = data_starts(info.file)[name]
    flip(info.file, start + data.draw(st.integers(0, info.bytes - 1)), data.draw(st.integers(0, 7)))
    [damage] = check_integrity(path).damage
    assert (damage.tensor, damage.file) == (name, str(info.file))
    shutil.rmtree(path.parent)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_flipped_bit_of_a_header_is_found_or_changes_no_tensor(sharded, tmp_path_factory, data) -> None:
    path = shutil.copytree(sharded, tmp_path_factory.mktemp("flipped") / "out")
    before = by_hand(path)
    file = data.draw(st.sampled_from(sorted(path.glob("*.safetensors"))))
    length = int.from_bytes(file.read_bytes()[:8], "little")
    flip(file, data.draw(st.integers(0, 7 + length)), data.draw(st.integers(0, 7)))
    try:
        found = check_integrity(path)
    except CheckpointError as error:
        assert str(path) in str(error) or "layer" in str(error)  # noqa: PT017
    else:
        assert not found.passed or by_hand(path) == before
    shutil.rmtree(path.parent)


def test_added_and_missing_tensors_are_named(checkpoint) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["model.more.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    damage = {each.tensor: each for each in check_integrity(checkpoint).damage}
    assert set(damage) == {"model.more.weight", "model.norm.weight"}
    assert "missing" in damage["model.norm.weight"].problem
    assert damage["model.more.weight"].file == str(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_scales_that_were_written_wrong_are_named(value, checkpoint) -> None:
    """By a program that keeps the checksums right, or to a checkpoint without any."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{Q}.scales_4"][3, 0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    (checkpoint / CHECKSUMS_NAME).unlink()
    [damage] = check_integrity(checkpoint).damage
    assert damage.tensor == f"{Q}.scales_4"
    assert "NaN, Inf or zero" in damage.problem


BROKEN = {
    "not-json": ("{", "cannot be read as JSON"),
    "other-algorithm": ('{"algorithm": "md5", "tensors": {}}', "algorithm 'md5'"),
    "no-tensors": ('{"algorithm": "sha256"}', "no usable tensors"),
    "no-digest": ('{"algorithm": "sha256", "tensors": {"a": "12"}}', "checksum of a is not sha256"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_of_checksums_is_named(name, checkpoint) -> None:
    content, message = BROKEN[name]
    (checkpoint / CHECKSUMS_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=f"{CHECKSUMS_NAME}: .*{message}"):
        check_integrity(checkpoint)


def test_the_command(checkpoint, tmp_path) -> None:
    run = CliRunner().invoke
    shown = run(app, ["verify", str(checkpoint), "--json", str(tmp_path / "good.json")])
    assert shown.exit_code == 0, shown.output
    assert "whole" in shown.stdout
    record = json.loads((tmp_path / "good.json").read_text())
    assert record["passed"]
    assert record["checked"] == record["tensors"]
    flip(checkpoint / "model.safetensors", (checkpoint / "model.safetensors").stat().st_size - 5)
    shown = run(app, ["verify", str(checkpoint), "--json", str(tmp_path / "bad.json")])
    assert shown.exit_code == 1
    record = json.loads((tmp_path / "bad.json").read_text())
    [damage] = record["damage"]
    assert damage["file"] == str(checkpoint / "model.safetensors")
    assert damage["tensor"] in shown.stdout.replace("\n", "")
    assert not record["passed"]


def test_an_export_to_another_kind_of_file_says_what_to_do(make_checkpoint, tmp_path) -> None:
    (tmp_path / "matgptq_export.json").write_text("{}")
    with pytest.raises(CheckpointError, match="--against OUT"):
        check_integrity(tmp_path)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        check_integrity(tmp_path / "nowhere")


def test_bytes_that_are_copied_are_hashed_as_those_in_memory(tmp_path) -> None:
    tensors = {"a": torch.arange(7, dtype=torch.int16), "b": torch.rand(3, 5), "c": torch.empty(0)}
    first = write_tensors(tmp_path / "one.safetensors", tensors)
    (tmp_path / "two").mkdir()
    with CheckpointWriter(tmp_path / "out") as writer:
        shutil.copyfile(tmp_path / "one.safetensors", tmp_path / "two" / "model.safetensors")
        for name, info in read_headers(tmp_path / "two").items():
            writer.add_stored(name, info)
        writer.commit()
    assert stored(tmp_path / "out") == first == by_hand(tmp_path / "out")


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path) -> None:
    """Its header was right when it was opened."""
    source = tmp_path / "source.safetensors"
    save_file({"long": torch.zeros(1000)}, source)
    (info,) = read_header(source).values()
    start = data_starts(source)["long"]
    source.write_bytes(source.read_bytes()[:-400])
    with pytest.raises(SourceError, match=r"source\.safetensors: ends inside tensor long"):
        read_checksum("long", info, start)
    with pytest.raises(OSError, match=r"source\.safetensors: ends too early"):
        write_tensors(tmp_path / "copy.safetensors", {"long": info})
