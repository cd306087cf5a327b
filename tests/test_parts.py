"""Models of several parts: the language model is quantized, everything else is kept bit for bit, or all is refused."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import build_model, save_model, token_ids
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import matgptq
from matgptq.errors import ConfigurationError, UnsupportedModelError
from matgptq.evaluation.speed import measure_speed
from matgptq.files.stored_tensors import read_headers, read_tensor
from matgptq.files.tensor_names import match_names
from matgptq.inference.nested_linear import NestedLinear


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """``(source, checkpoint)`` of a model that reads images."""
    root = tmp_path_factory.mktemp("parts")
    source = save_model("gemma3", root / "source", torch.bfloat16)
    options = {"group_size": 32, "quality": "fast", "channel_scaling": 0.5}
    matgptq.quantize(source, root / "out", dataset=token_ids(), **options)
    return source, root / "out"


def image_and_text():
    tokens = torch.tensor([[284, 286, 286, 286, 286, 285, 7, 8, 9]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "pixel_values": pixels, "token_type_ids": (tokens == 286).long()}


def test_everything_but_the_language_model_is_kept_bit_for_bit(gemma3):
    source, out = gemma3
    model = build_model("gemma3")
    before, after = read_headers(source), read_headers(out)
    known = {name: key for key, name in match_names(model, before).items()}
    kept = {name: key for key, name in match_names(model, after).items() if after[key].shape}
    quantized = {name.removesuffix(".codes") for name in after if name.endswith(".codes")}
    assert len(quantized) == 14
    assert all(name.startswith("model.language_model.layers.") for name in quantized)
    rest = set(known) - {f"{layer}.weight" for layer in quantized}
    assert any("vision_tower" in name for name in rest)
    assert any("multi_modal_projector" in name for name in rest)
    scaled = {name for name in rest if name.endswith(("input_layernorm.weight", "pre_feedforward_layernorm.weight"))}
    assert len(scaled) == 4
    for name in rest - scaled:
        one, other = read_tensor(before[known[name]]), read_tensor(after[kept[name]])
        assert one.dtype == other.dtype
        assert torch.equal(one.view(torch.int16), other.view(torch.int16)), name


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_it_reads_images_as_before(gemma3, loader):
    source, out = gemma3
    original, loaded = (loader.from_pretrained(each, dtype=torch.float32) for each in (source, out))
    assert isinstance(loaded.model.language_model.layers[0].mlp.up_proj, NestedLinear)
    assert not any(isinstance(module, NestedLinear) for module in loaded.model.vision_tower.modules())
    with torch.no_grad():
        expected, found = (model(**image_and_text()).logits for model in (original, loaded))
        blind = original(image_and_text()["input_ids"]).logits
    assert (found - expected).norm() < 0.1 * expected.norm()
    assert (blind - expected).norm() > 0.1 * expected.norm()


def test_saved_again_it_is_the_same_model(gemma3, tmp_path):
    _, out = gemma3
    AutoModelForImageTextToText.from_pretrained(out).save_pretrained(tmp_path / "again")
    with torch.no_grad():
        one, other = (matgptq.load(each, bits=3)(token_ids()).logits for each in (out, tmp_path / "again"))
    assert torch.equal(one, other)


def test_one_width_as_a_plain_model(gemma3, tmp_path):
    _, out = gemma3
    matgptq.export(out, tmp_path / "dense", format="dense", bits=4, dtype="float32")
    with torch.no_grad():
        stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense", dtype=torch.float32)
        expected = matgptq.load(out, bits=4)(**image_and_text()).logits
        torch.testing.assert_close(stock(**image_and_text()).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "measure",
    [
        lambda out: matgptq.evaluate(out, (8,), seqlen=65),
        lambda out: matgptq.refine(out, (2,), seqlen=65),
        lambda out: matgptq.search(out, 3.5, seqlen=65),
        lambda out: measure_speed(out, (8,), prompt=60, new_tokens=5),
    ],
    ids=["evaluate", "refine", "search", "bench"],
)
def test_windows_longer_than_the_context_are_refused(gemma3, measure):
    """Its length is in the section of the language model."""
    with pytest.raises(ConfigurationError, match="context of 64"):
        measure(gemma3[1])


@pytest.mark.parametrize(
    ("language", "advice"), [("llama", "save its language model alone"), ("gpt_oss", "is not known either")]
)
def test_other_models_of_several_parts_are_refused_with_what_to_do(language, advice, tmp_path, monkeypatch):
    source = save_model("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    parts = {"model_type": "llava", "text_config": {**config, "model_type": language}, "vision_config": {"a": 1}}
    (source / "config.json").write_text(json.dumps(parts))
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda *_, **__: pytest.fail("was built"))
    with pytest.raises(UnsupportedModelError, match=rf"'llava' has several parts \(text_config, vision.*{advice}"):
        matgptq.quantize(source, tmp_path / "out", dataset=token_ids())
    assert not (tmp_path / "out").exists()


def test_rotation_of_gemma3_is_refused(gemma3, tmp_path):
    with pytest.raises(UnsupportedModelError, match="'gemma3' cannot be rotated"):
        matgptq.quantize(gemma3[0], tmp_path / "out", dataset=token_ids(), rotate=True)
