"""Checkpoints on disk: whole or not at all, and nothing damaged is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import GROUP_SIZE, save_model, token_ids
from transformers import AutoModelForCausalLM

import matgptq
from matgptq.checkpoints import writer as checkpoint_writer
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.checkpoints.format import FORMAT_VERSION, Settings, parse_settings
from matgptq.checkpoints.integrity import check_integrity
from matgptq.checkpoints.scale_replacement import replace_scales
from matgptq.checkpoints.writer import CheckpointWriter, check_destination
from matgptq.errors import AllocationError, CheckpointError, ConfigurationError, SourceError, UnsupportedModelError
from matgptq.files import directories
from matgptq.files.stored_tensors import read_headers, read_tensor
from matgptq.inference.nested_linear import nested_layers
from matgptq.nested_weight import scale_source
from matgptq.slicing import WIDTHS

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def quantize(source: Path, out: Path, **options):
    options = {"group_size": GROUP_SIZE, "channel_scaling": 0.0, **options}  # as make_checkpoint does
    return matgptq.quantize(source, out, dataset=token_ids(), **options)


def logits(model):
    with torch.no_grad():
        return model(token_ids(2, 12, seed=9)).logits


def everything_under(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


# --- shards -----------------------------------------------------------------------------------------------------------


def test_sharded_output_is_the_same_checkpoint(make_checkpoint, tmp_path):
    source, whole = make_checkpoint("llama")
    quantize(source, tmp_path / "out", shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert set(index["weight_map"].values()) == set(files)
    sharded, single = read_headers(tmp_path / "out"), read_headers(whole)
    assert set(index["weight_map"]) == set(sharded) == set(single)
    assert index["metadata"]["total_size"] == sum(info.bytes for info in single.values())
    for name, info in sharded.items():
        assert info.file.name == index["weight_map"][name]
        assert torch.equal(read_tensor(info), read_tensor(single[name]))
    for file in files[:-1]:
        size = sum(info.bytes for info in sharded.values() if info.file.name == file)
        assert size <= 20_000 or sum(info.file.name == file for info in sharded.values()) == 1
    assert torch.equal(logits(matgptq.load(tmp_path / "out", bits=3)), logits(matgptq.load(whole, bits=3)))


def test_sharded_input(make_checkpoint, tmp_path):
    _, whole = make_checkpoint("llama")
    source = save_model("llama", tmp_path / "source", torch.bfloat16, max_shard_size="40KB")
    assert len(list(source.glob("model-*.safetensors"))) > 2
    quantize(source, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    got, wanted = load_file(tmp_path / "out" / "model.safetensors"), load_file(whole / "model.safetensors")
    assert set(got) == set(wanted)
    assert all(torch.equal(got[name], wanted[name]) for name in got)


# --- the destination --------------------------------------------------------------------------------------------------


def test_an_existing_destination_is_refused_before_work(checkpoint, make_checkpoint, monkeypatch):
    before = everything_under(checkpoint)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("was loaded"))
    with pytest.raises(CheckpointError, match=r"exists already; use --force"):
        quantize(make_checkpoint("llama")[0], checkpoint)
    assert everything_under(checkpoint) == before


def test_force_replaces_a_checkpoint_and_nothing_stays(checkpoint, make_checkpoint):
    (checkpoint / "left over").write_text("x")
    quantize(make_checkpoint("llama")[0], checkpoint, force=True, bits=[2, 8])
    assert not (checkpoint / "left over").exists()
    assert open_checkpoint(checkpoint).settings.target_bits == (2, 6, 8)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_force_fills_an_empty_directory(make_checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    quantize(make_checkpoint("llama")[0], tmp_path / "out", force=True, method="rtn")
    open_checkpoint(tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_force_does_not_delete_what_is_not_ours(make_checkpoint, tmp_path):
    source = shutil.copytree(make_checkpoint("llama")[0], tmp_path / "source")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = everything_under(tmp_path)
    for name, problem in [
        ("source", "not a matgptq checkpoint"),
        ("home", "not a matgptq checkpoint"),
        ("file", "is a file"),
        ("link", "is a file"),
    ]:
        with pytest.raises(CheckpointError, match=problem):
            quantize(source, tmp_path / name, force=True)
        with pytest.raises(CheckpointError, match="exists already"):
            check_destination(tmp_path / name, force=False)
    assert everything_under(tmp_path) == before


def test_a_destination_that_appears_during_the_run_is_not_replaced(make_checkpoint, tmp_path, monkeypatch):
    source, whole = make_checkpoint("llama")
    out = tmp_path / "out"
    real = checkpoint_writer.write_tensors

    def write(*arguments):
        out.mkdir()
        return real(*arguments)

    monkeypatch.setattr(checkpoint_writer, "write_tensors", write)
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(source, out)
    assert [*out.iterdir()] == []
    monkeypatch.undo()
    out.rmdir()
    quantize(source, out)  # what was finished is not lost
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_directory_has_ordinary_permissions(make_checkpoint, tmp_path):
    quantize(make_checkpoint("llama")[0], tmp_path / "out", method="rtn")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("call", [0, 1, 2])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()],
    ids=["full-disk", "ctrl-c"],
)
def test_a_failing_write_changes_nothing_and_the_same_command_goes_on(
    error, call, force, make_checkpoint, tmp_path, monkeypatch
):
    """The first shard, one in the middle, and the last one, which ``commit`` writes."""
    source, whole = make_checkpoint("llama")
    out = tmp_path / "out"
    if force:
        shutil.copytree(whole, out)
    before = everything_under(tmp_path)
    calls = []
    real = checkpoint_writer.write_tensors

    def write(file, tensors):
        calls.append(file)
        if len(calls) > call * 5:
            Path(file).write_bytes(b"half a shard")
            raise error
        return real(file, tensors)

    monkeypatch.setattr(checkpoint_writer, "write_tensors", write)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        quantize(source, out, force=force, shard_bytes=10_000, method="rtn")
    assert len(calls) == call * 5 + 1
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value)
        assert str(out) in str(caught.value)
    work = tmp_path / ".out.unfinished"
    assert {name: content for name, content in everything_under(tmp_path).items() if work.name not in name} == before
    assert sorted(file.name for file in work.glob("block-*.json")) == ["block-00000.json", "block-00001.json"]
    assert not (work / "checkpoint").exists()
    monkeypatch.undo()
    monkeypatch.setattr("matgptq.quantization.block_quantizer.solve", lambda *_: pytest.fail("was solved again"))
    quantize(source, out, force=force, shard_bytes=10_000, method="rtn")
    open_checkpoint(out)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "broken")], ids=["ctrl-c", "io-error"])
def test_stopped_between_the_two_renames_the_old_checkpoint_comes_back(error, checkpoint, monkeypatch):
    before = everything_under(checkpoint.parent)
    real = directories.os.rename

    def rename(old, new):
        if Path(new) == checkpoint and ".partial-" in str(old):
            raise error
        real(old, new)

    class NoExchange:  # a system that cannot swap two directories in one step
        renameat2 = None

    with CheckpointWriter(checkpoint, force=True) as writer:
        writer.add("a", torch.zeros(2))
        monkeypatch.setattr(directories.ctypes, "CDLL", lambda _: NoExchange)
        monkeypatch.setattr(directories.os, "rename", rename)
        with pytest.raises((KeyboardInterrupt, CheckpointError)):
            writer.commit()
    assert everything_under(checkpoint.parent) == before
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_leaving_without_commit_writes_nothing(tmp_path):
    with CheckpointWriter(tmp_path / "out", shard_bytes=1) as writer:
        writer.add("a", torch.zeros(2))
        writer.add("b", torch.zeros(2))
    assert not list(tmp_path.iterdir())


def test_a_tensor_written_twice_is_refused(tmp_path):
    with CheckpointWriter(tmp_path / "out", shard_bytes=1) as writer:
        for name in "ab":
            writer.add(name, torch.zeros(2))
        for name in "ab":  # one is in a shard already, the other still pending
            with pytest.raises(CheckpointError, match=f"tensor {name} is written twice"):
                writer.add(name, torch.zeros(2))


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits")
def test_the_system_refuses_to_write(make_checkpoint, tmp_path):
    """A real failure from safetensors' own writer: the process may not make files beyond 20 kB."""
    source, _ = make_checkpoint("llama")
    code = f"""
        import resource, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import matgptq
        from matgptq.errors import CheckpointError
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            matgptq.quantize({str(source)!r}, {str(tmp_path / "out")!r}, method="rtn")
        except CheckpointError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "cannot be written" in done.stdout
    assert "File too large" in done.stdout
    assert not list(tmp_path.iterdir())


# --- damaged checkpoints ----------------------------------------------------------------------------------------------


def edit_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    for key, value in changes.items():
        if value is None:
            del config["quantization_config"][key]
        else:
            config["quantization_config"][key] = value
    (path / "config.json").write_text(json.dumps(config))


def edit_tensors(path: Path, drop=(), **add) -> None:
    tensors = load_file(path / "model.safetensors")
    for name in drop:
        del tensors[name]
    tensors.update({name.replace("__", "."): tensor for name, tensor in add.items()})
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def tensor(path: Path, name: str) -> torch.Tensor:
    return load_file(path / "model.safetensors")[name]


def change(name, function):
    return lambda path: edit_tensors(path, **{name.replace(".", "__"): function(tensor(path, name)).contiguous()})


DAMAGE = {
    # name: (what to do to the directory, what the error says)
    "unsupported-version": (lambda p: edit_config(p, format_version=2), "config.json: format_version 2"),
    "no-version": (lambda p: edit_config(p, format_version=None), "config.json: format_version None"),
    "other-parent": (lambda p: edit_config(p, parent_bits=6), "config.json: parent_bits must be 8, not 6"),
    "bits-out-of-range": (lambda p: edit_config(p, bits=9), "config.json: .*bits must be an integer from 2 to 8"),
    "bits-as-text": (lambda p: edit_config(p, bits="4"), "config.json: .*bits must be an integer.*'4'"),
    "no-target-bits": (lambda p: edit_config(p, target_bits=None), "config.json: .*target_bits must be a list"),
    "no-parent-scales": (lambda p: edit_config(p, scale_bits=[2, 3, 4]), "config.json: .*parent's own scales"),
    "odd-scale-source": (lambda p: edit_config(p, scale_source={"2": 8}), "config.json: .*scale_source must be"),
    "group-size-zero": (lambda p: edit_config(p, group_size=0), "config.json: .*group_size must be"),
    "wrong-group-size": (
        lambda p: edit_config(p, group_size=32),
        r"layer model\.layers\.0.*: scales_2 is F16 .*group size 32",
    ),
    "indivisible": (
        lambda p: edit_config(p, group_size=48),
        r"layer model\.layers\.0.*: group size 48 does not divide its 64",
    ),
    "unknown-exception": (
        lambda p: edit_config(p, layer_group_sizes={DOWN: 32, DOWN.replace("1", "0"): 32, "model.nowhere": 32}),
        "model.nowhere",
    ),
    "ignored-layer-with-codes": (lambda p: edit_config(p, ignore=["lm_head", Q]), f"layer {Q}: .*not quantized"),
    "missing-scales": (lambda p: edit_tensors(p, [f"{Q}.scales_3"]), f"no {Q}.scales_3"),
    "stray-scales": (
        lambda p: edit_config(p, scale_bits=[2, 3, 8], scale_source=None),
        r"layer model\.layers\.0.*: scales_4 is in",
    ),
    "missing-codes": (lambda p: edit_tensors(p, [f"{Q}.codes"]), f"no {Q}.codes"),
    "missing-guard": (lambda p: edit_tensors(p, [f"{Q}.weight"]), f"no {Q}.weight"),
    "full-guard": (change(f"{Q}.weight", lambda t: torch.zeros(64, 64)), f"layer {Q}: .*weight must be empty"),
    "codes-dtype": (change(f"{Q}.codes", lambda t: t.to(torch.int8)), f"layer {Q}: codes is I8 .*must be U8"),
    "codes-dimensions": (change(f"{Q}.codes", lambda t: t.flatten()), f"layer {Q}: codes is U8"),
    "scales-dtype": (change(f"{Q}.scales_8", lambda t: t.float()), f"layer {Q}: scales_8 is F32 .*must be F16"),
    "scales-shape": (change(f"{Q}.scales_8", lambda t: t[:-1]), f"layer {Q}: scales_8 is F16 .63, 1."),
    "stray-scales-without-codes": (
        lambda p: edit_tensors(p, model__nowhere__scales_8=torch.ones(2, 2, dtype=torch.float16)),
        "layer model.nowhere",
    ),
    "truncated": (lambda p: cut(p / "model.safetensors", 0.5), "model.safetensors"),
    "corrupt-header": (lambda p: poke(p / "model.safetensors"), "model.safetensors"),
    "empty-file": (lambda p: (p / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "no-weights": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors"),
}
# Only the architecture can tell: headers alone look fine.
ARCHITECTURE_DAMAGE = {
    "stray-layer": (
        lambda p: edit_tensors(
            p,
            model__extra__codes=torch.zeros(4, 64, dtype=torch.uint8),
            model__extra__weight=torch.empty(0),
            **{f"model__extra__scales_{r}": torch.ones(4, 1, dtype=torch.float16) for r in range(2, 9)},
        ),
        "layer model.extra: .*no such layer",
    ),
    "codes-of-another-shape": (
        lambda p: edit_tensors(
            p,
            **{f"{Q}.codes": torch.zeros(60, 64, dtype=torch.uint8)},
            **{f"{Q}.scales_{r}": torch.ones(60, 1, dtype=torch.float16) for r in range(2, 9)},
        ),
        f"layer {Q}: codes is U8 .60, 64., must be U8 .64, 64.",
    ),
    "layer-lost": (
        lambda p: edit_tensors(
            p, [f"{Q}.{leaf}" for leaf in ("codes", "weight", *(f"scales_{r}" for r in range(2, 9)))]
        ),
        f"no {Q}.codes",
    ),
    "missing-norm": (lambda p: edit_tensors(p, ["model.norm.weight"]), "no tensor model.norm.weight"),
    "missing-head": (lambda p: edit_tensors(p, ["lm_head.weight"]), "no tensor lm_head.weight"),
    "missing-embedding": (lambda p: edit_tensors(p, ["model.embed_tokens.weight"]), "no tensor model.embed_tokens"),
    "norm-of-another-shape": (
        change("model.norm.weight", lambda t: t[:-1]),
        r"model.norm.weight is \[63\], must be \[64\]",
    ),
}


def cut(file: Path, share: float) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def poke(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[20:30] = b"\xff" * 10
    file.write_bytes(data)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_when_opening_and_loading(name, checkpoint):
    harm, message = DAMAGE[name]
    open_checkpoint(checkpoint)
    harm(checkpoint)
    for reader in (open_checkpoint, matgptq.load):
        with pytest.raises(CheckpointError, match=message):
            reader(checkpoint)


@pytest.mark.parametrize("name", [*DAMAGE, *ARCHITECTURE_DAMAGE])
def test_damage_is_named_by_from_pretrained(name, checkpoint):
    """Where transformers alone would warn, and start from random numbers."""
    harm, message = {**DAMAGE, **ARCHITECTURE_DAMAGE}[name]
    harm(checkpoint)
    # Files that cannot be read at all transformers itself reports first, by name.
    unreadable = name in ("truncated", "corrupt-header", "empty-file", "no-weights")
    with pytest.raises(Exception if unreadable else CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("name", ARCHITECTURE_DAMAGE)
def test_damage_against_the_architecture_is_named_when_loading(name, checkpoint):
    harm, message = ARCHITECTURE_DAMAGE[name]
    harm(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        matgptq.load(checkpoint)


@pytest.fixture(scope="module")
def sharded(make_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded") / "out"
    quantize(make_checkpoint("llama")[0], out, shard_bytes=40_000, method="rtn")
    return out


INDEX = "model.safetensors.index.json"


def shard(path: Path, number: int) -> Path:
    return sorted(path.glob("model-*.safetensors"))[number]


def edit_index(path: Path, function) -> None:
    index = json.loads((path / INDEX).read_text())
    function(index)
    (path / INDEX).write_text(json.dumps(index))


INDEX_DAMAGE = {
    "missing-shard": (lambda p: shard(p, 1).unlink(), "model-00002-of-.*safetensors"),
    "truncated-shard": (lambda p: cut(shard(p, 2), 0.7), "model-00003-of-.*safetensors"),
    "index-not-json": (lambda p: (p / INDEX).write_text('{"weight_map":'), "index.json: cannot be read as JSON"),
    "index-without-map": (lambda p: edit_index(p, lambda i: i.pop("weight_map")), "index.json: no usable weight_map"),
    "index-names-nothing": (
        lambda p: edit_index(p, lambda i: i["weight_map"].update({f"{Q}.x": shard(p, 0).name})),
        rf"model-00001-of-.*tensor {Q}\.x of model.safetensors.index.json is not in it",
    ),
    "index-forgets-a-tensor": (
        lambda p: edit_index(p, lambda i: i["weight_map"].pop(f"{Q}.scales_8")),
        f"holds tensor {Q}.scales_8, but model.safetensors.index.json does not know it",
    ),
    "shard-outside": (
        lambda p: edit_index(p, lambda i: i["weight_map"].update({"x": "../model.safetensors"})),
        "index.json: a shard lies outside",
    ),
}


def twice(path: Path) -> None:
    """Two shards hold a tensor; the index knows which one counts, programs that read whole shards do not."""
    first, second = load_file(shard(path, 0)), load_file(shard(path, 1))
    name = min(first)
    save_file({**second, name: first[name] + 1}, shard(path, 1), metadata={"format": "pt"})


INDEX_DAMAGE["tensor-in-two-shards"] = (twice, "model-00002-of-.*holds tensor .*, but .* puts it into model-00001-of-")
INDEX_DAMAGE["index-is-a-directory"] = (lambda p: ((p / INDEX).unlink(), (p / INDEX).mkdir()), "index.json: not a file")


@pytest.mark.parametrize("name", INDEX_DAMAGE)
def test_broken_shards_are_named(name, sharded, tmp_path):
    harm, message = INDEX_DAMAGE[name]
    path = shutil.copytree(sharded, tmp_path / "out")
    harm(path)
    for reader in (open_checkpoint, matgptq.load):
        with pytest.raises(CheckpointError, match=message):
            reader(path)


@pytest.mark.parametrize("name", ["missing-shard", "truncated-shard"])
def test_broken_shards_do_not_load_with_from_pretrained(name, sharded, tmp_path):
    harm, message = INDEX_DAMAGE[name]
    path = shutil.copytree(sharded, tmp_path / "out")
    harm(path)
    with pytest.raises((CheckpointError, OSError), match=message):
        AutoModelForCausalLM.from_pretrained(path)


def test_a_tensor_in_two_shards_does_not_load_with_from_pretrained(sharded, tmp_path):
    path = shutil.copytree(sharded, tmp_path / "out")
    twice(path)
    with pytest.raises(CheckpointError, match=r"model-00002-of-.*holds tensor .*, and model-00001-of-.* does, too"):
        AutoModelForCausalLM.from_pretrained(path)


def put(name: str, make) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        make(path / name)

    return do


def header(path: Path, **tensors) -> None:
    """A safetensors file of eight bytes of data."""
    text = json.dumps(tensors).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))


def sparse(file: Path) -> None:
    with file.open("wb") as handle:
        handle.truncate(1 << 33)


ODD_FILES = {
    # would wait, or fill the memory, for ever
    "config-is-a-pipe": (put("config.json", os.mkfifo), "no config.json"),
    "config-is-a-device": (put("config.json", lambda f: f.symlink_to("/dev/zero")), "no config.json"),
    "index-is-a-pipe": (put(INDEX, os.mkfifo), "index.json: not a file"),
    "index-is-a-device": (put(INDEX, lambda f: f.symlink_to("/dev/zero")), "index.json: not a file"),
    "index-leads-nowhere": (put(INDEX, lambda f: f.symlink_to("nowhere")), "index.json: cannot be read"),
    "weights-are-a-pipe": (put("model.safetensors", os.mkfifo), "model.safetensors: file is missing"),
    "weights-lead-to-themselves": (
        put("model.safetensors", lambda f: f.symlink_to(f.name)),
        "model.safetensors: file is missing",
    ),
    "config-is-huge": (put("config.json", sparse), "config.json: too large"),
    "weights-are-empty-space": (put("model.safetensors", sparse), "model.safetensors: truncated or not"),
    "config-nested-too-deeply": (
        put("config.json", lambda f: f.write_text('{"a":' * 100_000)),
        "config.json: cannot be read as JSON",
    ),
    "more-blocks-than-tensors": (
        lambda p: (p / "config.json").write_text(
            json.dumps({**json.loads((p / "config.json").read_text()), "num_hidden_layers": 10**9})
        ),
        "config.json: num_hidden_layers is 1000000000, but the files hold only",
    ),
    "unknown-dtype": (
        lambda p: header(p, x={"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}),
        "model.safetensors: tensor x is F4",
    ),
    "header-longer-than-the-file": (
        lambda p: (p / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}"),
        "model.safetensors: truncated or not",
    ),
    "shape-beyond-all-memory": (
        lambda p: header(p, x={"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}),
        "model.safetensors: truncated or not",
    ),
}


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes and devices in its file system")
@pytest.mark.parametrize("name", ODD_FILES)
def test_odd_files_are_named_at_once(name, checkpoint):
    harm, message = ODD_FILES[name]
    harm(checkpoint)
    for reader in (open_checkpoint, matgptq.load, check_integrity):
        with pytest.raises(CheckpointError, match=message):
            reader(checkpoint)


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_act", "none"), ("rope_parameters", {"rope_type": []}), ("num_attention_heads", 0), ("vocab_size", -1)],
)
def test_a_config_that_transformers_cannot_use_is_named(key, value, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises((CheckpointError, SourceError), match=f"{checkpoint}.*config"):
        matgptq.load(checkpoint)


@pytest.mark.parametrize(
    ("scale", "message"), [(torch.nan, "holds NaN or Inf"), (torch.inf, "holds NaN or Inf"), (-0.0, "holds zeros")]
)
def test_a_scale_that_is_none_is_refused(scale, message, checkpoint):
    change(f"{DOWN}.scales_3", lambda t: t.index_fill(0, torch.tensor([5]), scale))(checkpoint)
    for load in (matgptq.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=f"layer {DOWN}: scales_3 {message}"):
            load(checkpoint)


def test_what_is_not_a_checkpoint_is_refused_by_name(make_checkpoint, tmp_path):
    source, _ = make_checkpoint("llama")
    for reader in (open_checkpoint, matgptq.load):
        with pytest.raises(CheckpointError, match=r"config.json: no quantization_config"):
            reader(source)
        with pytest.raises(CheckpointError, match=r"no config.json"):
            reader(tmp_path)
    other = shutil.copytree(source, tmp_path / "gptq")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    for reader in (open_checkpoint, matgptq.load):
        with pytest.raises(CheckpointError, match=r"quant_method is 'gptq', not 'matgptq'"):
            reader(other)
    (other / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read as JSON"):
        open_checkpoint(other)


def test_codes_without_any_layer_are_refused(make_checkpoint, checkpoint):
    shutil.copyfile(make_checkpoint("llama")[0] / "model.safetensors", checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tensor in it holds codes"):
        open_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=r"no .*proj\.codes"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_a_checkpoint_is_not_quantized_again(checkpoint, tmp_path):
    with pytest.raises(UnsupportedModelError, match="already quantized with matgptq"):
        quantize(checkpoint, tmp_path / "out")


# --- the record and sizes ---------------------------------------------------------------------------------------------

widths = st.sets(st.sampled_from(WIDTHS), min_size=1).map(lambda s: tuple(sorted(s)))
group_sizes = st.one_of(st.just(-1), st.integers(1, 4096))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
records = st.dictionaries(st.text(max_size=8), json_values, max_size=3)
any_settings = st.builds(
    Settings,
    bits=st.sampled_from(WIDTHS),
    target_bits=widths,
    scale_bits=widths.map(lambda w: tuple(sorted({*w, 8}))),
    group_size=group_sizes,
    layer_group_sizes=st.dictionaries(st.text(max_size=12), group_sizes, max_size=3),
    ignore=st.lists(st.text(max_size=12), max_size=3).map(tuple),
    recipe=records,
    calibration=records,
    source=st.none() | st.text(max_size=12),
)


@given(any_settings, st.sampled_from(WIDTHS))
def test_settings_survive_the_file(settings, bits):
    record = json.loads(json.dumps(settings.to_dict()))
    assert parse_settings(record, "here") == settings
    assert record["format_version"] == FORMAT_VERSION
    assert record["scale_source"] == {str(r): own for r, own in scale_source(settings.scale_bits).items()}
    # Another default width is one number, and nothing else names it.
    assert parse_settings({**record, "bits": bits}, "here") == dataclasses.replace(settings, bits=bits)
    assert {**record, "bits": bits} == dataclasses.replace(settings, bits=bits).to_dict()


@given(any_settings, st.sampled_from(sorted(Settings(8, (8,), (8,), 64).to_dict())), json_values)
def test_a_broken_record_is_a_checkpoint_error_or_valid(settings, key, value):
    record = {**settings.to_dict(), key: value}
    with contextlib.suppress(CheckpointError):
        assert parse_settings(record, "here").to_dict().keys() == record.keys()


def test_scale_source_is_the_next_larger_width():
    assert scale_source([8]) == dict.fromkeys(WIDTHS, 8)
    assert scale_source([8, 3, 2]) == {2: 2, 3: 3, 4: 8, 5: 8, 6: 8, 7: 8, 8: 8}
    assert scale_source([4, 6, 8]) == {2: 4, 3: 4, 4: 4, 5: 6, 6: 6, 7: 8, 8: 8}
    with pytest.raises(ConfigurationError, match="parent's own scales"):
        scale_source([2, 4])


def test_sizes_as_served(make_checkpoint):
    source, out = make_checkpoint("llama")
    opened = open_checkpoint(out)
    # q, o: 64x64; k, v: 32x64; gate, up: 96x64; down: 64x96 in groups of 32; two blocks
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
    scales = 2 * (2 * 64 + 2 * 32 + 2 * 96 + 64 * 3)
    assert opened.quantized_weights == weights
    whole = sum(info.bytes for info in read_headers(source).values())
    for bits in WIDTHS:
        assert opened.served_bits(bits) == weights * bits + scales * 16
        assert opened.bits_per_weight(bits) == pytest.approx(bits + scales * 16 / weights)
        assert opened.served_bytes(bits) == (weights * bits + scales * 16) // 8 + whole - weights * 2
    mixed = {layer: 2 + index % 7 for index, layer in enumerate(opened.layers)}
    by_hand = sum(
        info.out_features * info.in_features * mixed[layer]
        + 16 * info.out_features * info.in_features // info.group_size
        for layer, info in opened.layers.items()
    )
    assert opened.served_bits(mixed) == by_hand
    with pytest.raises(AllocationError, match="no width for layer"):
        opened.served_bits({Q: 4})
    with pytest.raises(AllocationError, match="unknown layer x"):
        opened.served_bits({**mixed, "x": 4})


def test_the_record_says_how_it_was_made(make_checkpoint):
    source, out = make_checkpoint("llama")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["source"] == str(source.resolve())
    assert config["bits"] == 8
    assert config["target_bits"] == [2, 3, 4, 6, 8]
    assert config["scale_bits"] == [2, 3, 4, 5, 6, 7, 8]
    assert config["recipe"]["method"] == "matgptq"
    assert config["recipe"]["seed"] == 0
    assert config["calibration"]["dataset"] == "token ids"
    assert (config["calibration"]["nsamples"], config["calibration"]["seqlen"]) == (4, 16)
    report = json.loads((out / "report.json").read_text())
    layers = [layer["name"] for layer in report["layers"]]
    assert set(layers) == set(open_checkpoint(out).layers) == set(nested_layers(matgptq.load(out)))
    assert report["fallbacks"]["smaller group size"] == 2


def new_scales(path: Path, bits: int = 2) -> dict[str, torch.Tensor]:
    return {
        name: torch.full((layer.out_features, layer.in_features // layer.group_size), 0.5 + bits)
        for name, layer in open_checkpoint(path).layers.items()
    }


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 30_000])
def test_replaced_scales(
    exchange: bool, shard_bytes: int, make_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:  # a system that cannot swap two names in one step
        monkeypatch.setattr("matgptq.files.directories.ctypes.CDLL", lambda _: object())
    path = tmp_path / "out"
    matgptq.quantize(
        make_checkpoint("llama")[0], path, dataset=token_ids(), group_size=GROUP_SIZE, shard_bytes=shard_bytes
    )
    (path / "allocations").mkdir()
    (path / "allocations" / "small.json").write_text("{}")
    links = shutil.copytree(path, tmp_path / "links", copy_function=os.link)
    (tmp_path / "name").symlink_to("out")
    before = everything_under(path)
    scales = new_scales(path)
    replace_scales(tmp_path / "name", 2, scales, {"steps": 3})

    assert everything_under(links) == before  # whoever shares our files keeps the old ones
    changed = {name for name, content in everything_under(path).items() if before[name] != content}
    assert everything_under(path).keys() == before.keys()
    assert {"config.json", "report.json"} <= changed
    opened = open_checkpoint(path)
    assert opened.settings.refinement == {"2": {"steps": 3}}
    assert changed - {"config.json", "report.json", "checksums.json"} <= {
        opened.tensors[f"{layer}.scales_2"].file.name for layer in scales
    }
    model = matgptq.load(path, bits=2)
    for name, layer in nested_layers(model).items():
        assert torch.equal(layer.scales_2.float(), scales[name])
    assert (tmp_path / "name").is_symlink()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["links", "name", "out"]


def test_new_scales_in_a_sharded_checkpoint_are_in_the_index(make_checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "out"
    matgptq.quantize(make_checkpoint("llama")[0], path, method="rtn", group_size=32, shard_bytes=30_000)
    replace_scales(path, 4, new_scales(path, 4), {})
    opened = open_checkpoint(path)
    assert opened.settings.scale_bits == (3, 4, 8)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(opened.tensors)
    assert index["metadata"]["total_size"] == sum(info.bytes for info in opened.tensors.values())
    for layer in opened.layers:
        stored = [read_tensor(opened.tensors[f"{layer}.scales_{bits}"]) for bits in (3, 8)]
        assert torch.equal(*stored)


@pytest.mark.parametrize(
    "place",
    [
        *(f"matgptq.checkpoints.scale_replacement.{name}" for name in ("write_tensors", "exchange", "sync")),
        "os.replace",
    ],
)
def test_scales_that_cannot_be_written_leave_the_old_ones(
    place: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    before = everything_under(checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with pytest.raises(CheckpointError, match="No space left"):
            replace_scales(checkpoint, 2, new_scales(checkpoint), {})
    assert everything_under(checkpoint) == before
    assert [each.name for each in checkpoint.parent.iterdir()] == [checkpoint.name]
