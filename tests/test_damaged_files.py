"""Random damage to checkpoints, slices and allocations: an error of ours that says where, or exactly what is stored.

``MATGPTQ_FUZZ=50 pytest tests/test_damaged_files.py`` tries fifty times as much as usual.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import (
    Damage,
    HangError,
    answered,
    byte_damage,
    changed_json,
    file_damage,
    fuzz,
    header_damage,
    json_damage,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors import safe_open
from tiny_models import GROUP_SIZE, token_ids
from transformers import AutoModelForCausalLM

import matgptq
from matgptq.checkpoints.allocation_store import find_allocation, stored_allocations
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.checkpoints.integrity import check_integrity
from matgptq.errors import AllocationError, CheckpointError, MatGPTQError
from matgptq.files.stored_tensors import INDEX_NAME
from matgptq.inference.nested_linear import NestedLinear, nested_layers
from matgptq.slicing import WIDTHS


@pytest.fixture(scope="module")
def stored(make_checkpoint, tmp_path_factory) -> dict[str, Path]:
    """A parent in one file, one in several, a slice."""
    root = tmp_path_factory.mktemp("whole")
    source, whole = make_checkpoint("llama")
    matgptq.quantize(
        source, root / "sharded", dataset=token_ids(), group_size=GROUP_SIZE, method="rtn", shard_bytes=60_000
    )
    matgptq.export(whole, root / "slice", format="matgptq-slice", bits=3)
    shutil.copytree(whole, root / "parent")
    return {name: root / name for name in ("parent", "sharded", "slice")}


@pytest.fixture(autouse=True)
def reference_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers stay as they are stored, so that they can be compared with the files."""
    monkeypatch.setenv("MATGPTQ_KERNEL", "reference")


def linked(path: Path, target: Path) -> Path:
    """A copy to be damaged, by hard links; damage replaces files and never writes into them."""
    return shutil.copytree(path, target, copy_function=os.link)


def damage_to(path: Path) -> st.SearchStrategy[Damage]:
    """All that can happen to a checkpoint."""
    shards = sorted(path.glob("*.safetensors"))
    config = path / "config.json"
    record = json.loads(config.read_text())

    def with_record(changed: Any) -> Damage:
        def do(path: Path) -> None:
            (path / "config.json").unlink()
            (path / "config.json").write_text(json.dumps({**record, "quantization_config": changed}))

        return do

    kinds = [
        json_damage(config),
        changed_json(record["quantization_config"]).map(with_record),
        byte_damage(config),
        st.sampled_from(shards).flatmap(header_damage),
        st.sampled_from(shards).flatmap(byte_damage),
        st.sampled_from([config, *shards]).flatmap(lambda file: file_damage(file.name)),
    ]
    if (path / INDEX_NAME).exists():
        kinds += [json_damage(path / INDEX_NAME), byte_damage(path / INDEX_NAME), file_damage(INDEX_NAME)]
    return st.one_of(kinds)


def files_hold(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by safetensors alone."""
    tensors: dict[str, torch.Tensor] = {}
    index = path / INDEX_NAME
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else ["model.safetensors"]
    for shard in shards:
        with safe_open(path / shard, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                assert name not in tensors, f"{name} is in two files, and one of them was believed"
                tensors[name] = handle.get_tensor(name)
    return tensors


def check_model(model: Any, path: Path) -> None:
    """Every parameter and buffer is the stored one, and nothing is made up."""
    held = files_hold(path)
    state = model.state_dict()
    for name, tensor in state.items():
        if name not in held:
            assert name in model.all_tied_weights_keys, name
            continue
        expected = held.pop(name)
        torch.testing.assert_close(tensor, expected.to(tensor.dtype), rtol=0, atol=0, equal_nan=True)
    for name, layer in nested_layers(model).items():
        assert isinstance(layer, NestedLinear)
        for bits in layer.scale_bits:
            scales = getattr(layer, f"scales_{bits}")
            assert bool((torch.isfinite(scales) & (scales != 0)).all()), name


def has_endless_blocks(path: Path) -> bool:
    """transformers builds as many blocks as the config asks for before it looks at anything else."""
    config = path / "config.json"
    if not config.is_file():  # a pipe, say
        return False
    try:
        blocks = json.loads(config.read_text())["num_hidden_layers"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(blocks, int) and blocks > 1000


KINDS = pytest.mark.parametrize("kind", ["parent", "sharded", "slice"])


@KINDS
@fuzz(150)
@given(data=st.data())
def test_opening(kind, stored, tmp_path_factory, data) -> None:
    harm = data.draw(damage_to(stored[kind]))
    path = linked(stored[kind], tmp_path_factory.mktemp("harmed") / "out")
    harm(path)
    with answered(path, CheckpointError):
        opened = open_checkpoint(path, slices=True)
        assert opened.identity
        assert opened.other_bytes >= 0
        assert opened.widths_held
        assert all(opened.bits_per_weight(width) > width for width in WIDTHS)
        check_integrity(path)


@KINDS
@fuzz(40)
@given(data=st.data())
def test_loading(kind, stored, tmp_path_factory, data) -> None:
    harm = data.draw(damage_to(stored[kind]))
    path = linked(stored[kind], tmp_path_factory.mktemp("harmed") / "out")
    harm(path)
    with answered(path, MatGPTQError):
        check_model(matgptq.load(path, device="cpu"), path)


@KINDS
@fuzz(20)
@given(data=st.data())
def test_from_pretrained(kind, stored, tmp_path_factory, data) -> None:
    """transformers reports what it cannot read in its own words; but what it loads is right."""
    harm = data.draw(damage_to(stored[kind]))
    path = linked(stored[kind], tmp_path_factory.mktemp("harmed") / "out")
    harm(path)
    with answered(path, MatGPTQError):
        assume(not has_endless_blocks(path))
        try:
            model = AutoModelForCausalLM.from_pretrained(path)
        except (HangError, MatGPTQError):
            raise
        except Exception:
            return
        if any(isinstance(module, NestedLinear) for module in model.modules()):
            check_model(model, path)


@fuzz(150)
@given(data=st.data())
def test_allocations(stored, tmp_path_factory, data) -> None:
    path = linked(stored["parent"], tmp_path_factory.mktemp("harmed") / "out")
    opened = open_checkpoint(path)
    widths = {layer: 2 + index % 7 for index, layer in enumerate(opened.layers)}
    record = {"name": "a", "checkpoint": opened.identity, "layers": widths, "bits": 5.0}
    (path / "allocations").mkdir()
    file = path / "allocations" / "a.json"
    lines = "".join(f"{layer}: {bits}\n" for layer, bits in widths.items())
    file.write_text(json.dumps(record) if data.draw(st.booleans()) else lines)
    strategy = [byte_damage(file), file_damage(file.name)]
    if file.read_text().startswith("{"):
        strategy.append(json_damage(file))
    data.draw(st.one_of(strategy))(file.parent)
    with answered(path, AllocationError):
        found = find_allocation(opened, "a")
        assert set(found) == set(opened.layers)
        assert set(found.values()) <= set(WIDTHS)
        if file.read_text().lstrip().startswith("{"):
            stored_allocations(opened)
