"""Models that transformers loads are served packed, like those of ``matgptq.load``, wherever kernels take them."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import token_ids
from transformers import AutoModel, AutoModelForCausalLM

import matgptq
from matgptq import native
from matgptq.errors import ConfigurationError
from matgptq.inference.decoding import DecodesRows
from matgptq.inference.nested_linear import NestedLinear, nested_layers
from matgptq.inference.packing import can_pack, pack_model
from matgptq.kernels import packed_weight

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native library: {native.reason()}")
NAMES = ["llama", "opt", "gpt_neox", "mixtral"]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids(2, 12, seed=9)).logits


def decode(model) -> list[int]:
    with torch.inference_mode():
        return model.generate(token_ids(1, 5), max_new_tokens=6, do_sample=False, pad_token_id=0).tolist()


def packed(model) -> set[bool]:
    return {layer.packed is not None for layer in nested_layers(model).values()}


def together(model) -> list[int]:
    """How many layers each group that runs as one call has."""
    inputs = {id(layer.shared_input): layer.shared_input for layer in nested_layers(model).values()}
    counts = dict.fromkeys(inputs, 0)
    for layer in nested_layers(model).values():
        counts[id(layer.shared_input)] += 1
    return sorted(counts.values())


def short_ways(model) -> int:
    return sum(isinstance(module, DecodesRows) for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"device_map": "auto"}], ids=str)
def test_from_pretrained_serves_what_load_serves(name, dtype, options, make_checkpoint) -> None:
    out = make_checkpoint(name)[1]
    ours, theirs = matgptq.load(out, dtype=dtype), AutoModelForCausalLM.from_pretrained(out, dtype=dtype, **options)
    assert packed(theirs) == packed(ours) == {True}
    assert together(theirs) == together(ours)
    assert short_ways(theirs) == short_ways(ours) == (2 if name == "llama" else 0)
    for bits in (8, 3):
        ours.set_bits(bits)
        theirs.set_bits(bits)
        assert torch.equal(logits(theirs), logits(ours))
        assert decode(theirs) == decode(ours)


def test_without_kernels_for_its_dtype_a_model_stays_as_it_is_stored(make_checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint("llama")[1], dtype=torch.float16)
    assert packed(model) == {False}
    assert bool(logits(model).isfinite().all())


def test_packing_can_be_declined(make_checkpoint, tmp_path) -> None:
    out = make_checkpoint("llama")[1]
    wish = matgptq.MatGPTQConfig(bits=4, packed=False)
    model = AutoModelForCausalLM.from_pretrained(out, quantization_config=wish)
    assert packed(model) == {False}
    assert short_ways(model) == 0
    assert all(layer.codes.numel() for layer in nested_layers(model).values())
    model.save_pretrained(tmp_path)
    assert "packed" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert packed(AutoModelForCausalLM.from_pretrained(tmp_path)) == {True}


@pytest.mark.parametrize("name", NAMES[:3])
def test_base_models_without_a_head(name, make_checkpoint) -> None:
    out = make_checkpoint(name)[1]
    base, whole = AutoModel.from_pretrained(out, dtype=torch.float32), matgptq.load(out)
    assert packed(base) == {True}
    assert together(base) == together(whole)
    assert short_ways(base) == short_ways(whole)


def test_layers_on_the_disk_stay_as_their_files_have_them(make_checkpoint, tmp_path) -> None:
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
             "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        make_checkpoint("llama")[1], dtype=torch.float32, device_map=parts, offload_folder=tmp_path
    )
    assert not can_pack(model)
    assert packed(model) == {False}


def test_an_exported_slice(make_checkpoint, tmp_path) -> None:
    matgptq.export(make_checkpoint("llama")[1], tmp_path / "slice", format="matgptq-slice", bits=3)
    ours, theirs = (
        load(tmp_path / "slice", dtype=torch.float32) for load in (matgptq.load, AutoModelForCausalLM.from_pretrained)
    )
    assert packed(theirs) == {True}
    assert torch.equal(logits(theirs), logits(ours))
    theirs.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(ours))


def test_a_model_that_moves_is_packed_for_where_it_arrives(make_checkpoint, monkeypatch) -> None:
    """Only one device is sure to be here: it is taken for another, as far as the layers can see."""
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint("llama")[1], dtype=torch.float32)
    model.set_bits({"model.layers.0.mlp.down_proj": 3})
    expected, words, groups = logits(model), decode(model), together(model)
    before = {name: layer.packed for name, layer in nested_layers(model).items()}
    with monkeypatch.context() as patch:
        patch.setattr(NestedLinear, "leaves", lambda layer, fn: layer.packed is not None)
        model.to("cpu")
    after = {name: layer.packed for name, layer in nested_layers(model).items()}
    assert packed(model) == {True}
    assert not any(after[name] is weight for name, weight in before.items())
    assert together(model) == groups
    assert type(model.model.layers[0]).__mro__.count(DecodesRows) == 1
    assert torch.equal(logits(model), expected)
    assert decode(model) == words


def test_a_model_that_leaves_all_kernels_behind(make_checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint("llama")[1])
    model.to("meta")
    assert packed(model) == {False}
    assert {layer.codes.shape for layer in nested_layers(model).values()} != {torch.Size([0])}


def test_nothing_is_asked_of_kernels_where_there_are_none(make_checkpoint, monkeypatch) -> None:
    """An allocation with scales of its own is packed as slices; without kernels it is served all the same."""
    monkeypatch.setattr(packed_weight, "obstacle", lambda device, dtype: "none here")
    model = matgptq.load(make_checkpoint("llama")[1], bits=4)
    for layer in nested_layers(model).values():
        layer.adopt_scales(layer.scales_8)
    assert not pack_model(model)
    with pytest.raises(ConfigurationError, match="resident=False needs the native kernels: none here"):
        pack_model(model, resident=False)
