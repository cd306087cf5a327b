"""What must stop at start, with our message, instead of serving noise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from server import refused
from vllm.engine.arg_utils import EngineArgs

import matgptq
from matgptq.vllm_plugin import register

Damage = Callable[[Path], None]
MakeTiny = Callable[[str, int], Path]


@pytest.fixture
def checkpoint(make_tiny: MakeTiny, tmp_path: Path) -> Path:
    return shutil.copytree(make_tiny("qwen2", 64), tmp_path / "copy")


@pytest.fixture(autouse=True)
def no_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BITS", "ALLOCATION", "ACTIVATIONS"):
        monkeypatch.delenv(f"MATGPTQ_{name}", raising=False)
    register()
    register()  # vLLM may call it more than once in a process


def configure(model: Path, **options: Any) -> Any:
    """What ``vllm serve`` does before it starts the processes that load the model."""
    return EngineArgs(model=str(model), max_model_len=64, enforce_eager=True, **options).create_engine_config()


def test_a_sound_checkpoint_is_accepted(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MATGPTQ_BITS", "3")
    config = configure(checkpoint).quant_config
    assert {layer.bits for layer in config.layers.values()} == {3}
    assert config.sizes == [1, 2]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MATGPTQ_BITS": "9"}, "9"),
        ({"MATGPTQ_BITS": "four"}, "MATGPTQ_BITS must be a width from 2 to 8, not 'four'"),
        ({"MATGPTQ_ALLOCATION": "small"}, "small: no such file, and no such allocation: .*copy has mixed"),
        ({"MATGPTQ_ACTIVATIONS": "int4"}, "MATGPTQ_ACTIVATIONS must be exact or int8, not 'int4'"),
    ],
)
def test_wishes(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        configure(checkpoint)


def test_an_override_that_makes_no_sense(checkpoint: Path) -> None:
    record = {"quant_method": "matgptq", "bits": 1}
    with pytest.raises(ValueError, match="2 to 8"):
        configure(checkpoint, hf_overrides={"quantization_config": record})


def test_an_allocation_of_another_checkpoint(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = checkpoint / "allocations" / "mixed.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"checkpoint": "0" * 16}))
    monkeypatch.setenv("MATGPTQ_ALLOCATION", "mixed")
    with pytest.raises(ValueError, match="was made for another checkpoint"):
        configure(checkpoint)


def test_a_slice_at_another_width(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matgptq.export(checkpoint, tmp_path / "slice", format="matgptq-slice", bits=3)
    assert {layer.bits for layer in configure(tmp_path / "slice").quant_config.layers.values()} == {3}
    monkeypatch.setenv("MATGPTQ_BITS", "4")
    with pytest.raises(ValueError, match="holds only the slice of 3 bits"):
        configure(tmp_path / "slice")


def test_an_old_vllm(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.version.__version__", "0.24.0")
    with pytest.raises(ValueError, match=r"vLLM 0\.24\.0 is too old for matgptq, which needs 0\.26 or later"):
        configure(checkpoint)


def _without(name: str) -> Damage:
    def damage(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / "model.safetensors")
        del tensors[name]
        save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})

    return damage


def _cut_short(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _other_groups(checkpoint: Path) -> None:
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["group_size"] = 32
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut_short, "model.safetensors"),
        (_without("model.layers.1.mlp.up_proj.codes"), r"model\.layers\.1\.mlp\.up_proj: the checkpoint has no"),
        (_without("model.layers.0.self_attn.q_proj.scales_4"), r"q_proj: the checkpoint has no .*scales_4"),
        # vLLM itself would serve a quantized model with what happened to lie in memory.
        (_without("model.layers.0.input_layernorm.weight"), r"has no tensor model\.layers\.0\.input_layernorm\.weight"),
        (_without("model.layers.0.self_attn.k_proj.bias"), r"has no tensor model\.layers\.0\.self_attn\.k_proj\.bias"),
        (_other_groups, "group size 32"),
    ],
)
def test_damaged_checkpoints(checkpoint: Path, damage: Damage, message: str) -> None:
    damage(checkpoint)
    with pytest.raises(ValueError, match=message):
        configure(checkpoint)


def test_a_server_stops(checkpoint: Path) -> None:
    refusal = refused(checkpoint, MATGPTQ_ALLOCATION="small")
    assert refusal.status != 0
    assert "small: no such file, and no such allocation" in refusal.text


def test_a_server_with_scales_that_are_no_numbers_stops(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.scales_8"][3, 0] = torch.nan
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    refusal = refused(checkpoint, MATGPTQ_BITS="8")
    assert refusal.status != 0
    assert "layer model.layers.1.self_attn.v_proj: scales_8 holds NaN or Inf" in refusal.text


def test_a_server_whose_ranks_would_split_a_group_stops(make_tiny: MakeTiny) -> None:
    refusal = refused(make_tiny("qwen2", 128), "--tensor-parallel-size", "2")
    assert refusal.status != 0
    assert (
        "--tensor-parallel-size 2: layer model.layers.0.self_attn.o_proj: 2 ranks would get 64 of its 128 input "
        "features each, which splits a group of 128; sizes that fit this checkpoint: 1"
    ) in refusal.text
