"""Every family rotated: the same function, in the same architecture, and quantized from there."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import GROUP_SIZE, MODELS, blocks_of, build_model, save_model, token_ids

import matgptq
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.errors import UnsupportedModelError
from matgptq.files.stored_tensors import read_headers, read_tensor
from matgptq.inference.nested_linear import nested_layers
from matgptq.models.blocks import find_blocks
from matgptq.models.families import find_family
from matgptq.models.residency import Whole
from matgptq.models.rotated_model import make_rotation, rotate_block, rotate_model, rotated_tensors
from matgptq.progress import Silent

ROTATABLE = [name for name, (kind, _) in MODELS.items() if not isinstance(find_family(kind).rotation, str)]
REFUSED = {
    "gemma2": "RMSNorms after attention",
    "gemma3_text": "RMSNorms after",
    "gemma3": "RMSNorms after",
    "opt": "mean",
    "gpt_neox": "mean",
}


def rotated(name, dtype, seed=0, **overrides):
    """A model, its logits, and the same model rotated."""
    model = build_model(name, dtype, **overrides)
    family = find_family(model.config.model_type)
    with torch.no_grad():
        before = model(token_ids(2, 12)).logits
    change = rotate_model(Whole(model), family, blocks_of(model), seed)
    return model, before, change


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ROTATABLE)
def test_a_rotated_model_is_the_same_function(name, dtype):
    model, before, change = rotated(name, dtype)
    original = build_model(name, dtype)
    with torch.no_grad():
        after = model(token_ids(2, 12)).logits
    assert before.std() > 0.3
    # The norms of transformers compute in float32 whatever the model's dtype.
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5)
    assert change < 1e-5
    assert type(model) is type(original)
    assert not torch.allclose(model.get_input_embeddings().weight, original.get_input_embeddings().weight, atol=0.01)
    unit = find_family(model.config.model_type).rotation.norm_unit
    residual_norms = [
        parameter
        for key, parameter in model.named_parameters()
        if "norm" in key and not key.endswith(("q_norm.weight", "k_norm.weight"))
    ]
    assert len(residual_norms) == 5
    assert all((parameter == unit).all() for parameter in residual_norms)


@pytest.mark.parametrize("name", ROTATABLE)
def test_only_the_named_tensors_change(name):
    model, _, _ = rotated(name, torch.float32)
    family = find_family(model.config.model_type)
    original = build_model(name)
    blocks_of(original)
    before = original.state_dict()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == rotated_tensors(family.rotation, find_blocks(model, family)) & before.keys()


def test_sizes_without_a_hadamard_matrix_and_many_shared_heads():
    sizes = {"hidden_size": 66, "head_dim": 22, "num_attention_heads": 6, "num_key_value_heads": 2}
    _, _, change = rotated("llama-biased", torch.float32, **sizes)
    assert change < 1e-5


def test_the_seed_decides():
    weights = [rotated("llama", torch.float32, seed)[0].state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    moved = [key for key in weights[0] if not torch.allclose(weights[0][key], weights[2][key], atol=1e-3)]
    assert len(moved) == 2 + 2 * 7
    rotation = make_rotation(build_model("llama").config, 0)
    assert not torch.equal(rotation.heads[0].signs, rotation.heads[1].signs)
    assert not torch.equal(rotation.heads[0].signs[0], rotation.heads[0].signs[1])


def test_a_block_is_rotated_alone():
    """From the config and the seed, without the rest of the model."""
    whole, _, _ = rotated("qwen2", torch.float32, seed=5)
    model = build_model("qwen2")
    rotation = make_rotation(model.config, 5)
    with torch.no_grad():
        rotate_block(model.model.layers[1], find_family("qwen2").rotation, rotation.residual, rotation.heads[1])
    for key, tensor in model.model.layers[1].state_dict().items():
        assert torch.equal(tensor, whole.model.layers[1].state_dict()[key]), key


def test_a_model_that_became_another_is_refused():
    model = build_model("llama")
    family = find_family("llama")
    # Reads the residual stream, and the family says nothing of it.
    model.model.layers[1].mlp.register_forward_pre_hook(lambda _, x: x[0] + x[0].flip(-1))
    with pytest.raises(UnsupportedModelError, match=r"logits change by \S+ where rounding to float32 explains 1e-04"):
        rotate_model(Whole(model), family, find_blocks(model, family), 0)


def test_shared_tensors_are_refused_by_name():
    model = build_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    family = find_family("llama")
    message = r"model\.layers\.0\.mlp\.up_proj\.weight and model\.layers\.1\.mlp\.up_proj\.weight are one tensor"
    with pytest.raises(UnsupportedModelError, match=message):
        rotate_model(Whole(model), family, find_blocks(model, family), 0)


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_cannot_be_rotated(name, tmp_path, make_checkpoint, monkeypatch):
    source, _ = make_checkpoint(name)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)  # refused before weights are read
    with pytest.raises(UnsupportedModelError, match=f"'{name}' cannot be rotated: .*{REFUSED[name]}"):
        matgptq.quantize(source, tmp_path / "out", dataset=token_ids(), rotate=True)


@pytest.mark.parametrize("name", REFUSED)
def test_the_best_quality_goes_without_where_a_family_cannot_be_rotated(name, tmp_path, make_checkpoint):
    source, _ = make_checkpoint(name)
    options = {"dataset": token_ids(), "group_size": GROUP_SIZE, "quality": "best", "tuned_bits": ()}
    plan = matgptq.forecast(source, tmp_path / "out", **options).to_dict()
    notes: list[str] = []
    progress = Silent()
    progress.note = notes.append
    report = matgptq.quantize(source, tmp_path / "out", progress=progress, **options)
    assert report.recipe == plan["recipe"]
    assert report.recipe["rotate"] is False
    assert report.recipe["saliency"] == 1.5
    assert any(note.startswith("not rotated: ") and REFUSED[name] in note for note in notes), notes


@pytest.mark.parametrize("name", ROTATABLE)
def test_quantize_and_load(name, tmp_path, make_checkpoint):
    source, plain = make_checkpoint(name)
    matgptq.quantize(source, tmp_path / "out", dataset=token_ids(), group_size=64, rotate=True)
    model = matgptq.load(tmp_path / "out", bits=8)
    full = build_model(name, torch.bfloat16).float()
    ids = token_ids(2, 12, seed=9)
    with torch.no_grad():
        expected = full(ids).logits
        error = (model(ids).logits - expected).norm() / expected.norm()
        plain_error = (matgptq.load(plain, bits=8)(ids).logits - expected).norm() / expected.norm()
    assert error < 1.5 * plain_error + 0.01
    assert len(nested_layers(model)) == len(open_checkpoint(plain).layers)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["recipe"]["rotate"] is True
    stored, tensors = read_headers(source), read_headers(tmp_path / "out")
    assert tensors["lm_head.weight"].dtype == tensors["model.embed_tokens.weight"].dtype == "F16"
    for key in tensors.keys() & stored.keys():
        if key.endswith(("q_proj.bias", "gate_proj.bias", "q_norm.weight")):  # nothing turns these
            assert torch.equal(read_tensor(tensors[key]), read_tensor(stored[key]))


def test_the_cost_of_an_untied_head_is_said_and_counted(tmp_path, make_checkpoint):
    source, plain = make_checkpoint("llama-tied")
    notes: list[str] = []

    class Listener:
        def start(self, stage: str, total: int) -> None: ...
        def advance(self, steps: int = 1) -> None: ...
        def note(self, message: str) -> None:
            notes.append(message)

    matgptq.quantize(source, tmp_path / "out", dataset=token_ids(), rotate=True, group_size=64, progress=Listener())
    assert any("grows by 0.0 MB" in note for note in notes)  # 288 x 64 in 16 bits
    grown = open_checkpoint(tmp_path / "out").served_bytes(4) - open_checkpoint(plain).served_bytes(4)
    assert grown == 288 * 64 * 2


def test_layers_left_alone_are_rotated_too(tmp_path):
    source = save_model("llama-biased", tmp_path / "source")
    matgptq.quantize(
        source, tmp_path / "out", method="rtn", bits=[8], group_size=32, rotate=True, ignore=["*.o_proj", "*.down_proj"]
    )
    model = matgptq.load(tmp_path / "out")
    ids = token_ids(2, 12, seed=9)
    with torch.no_grad():
        expected = build_model("llama-biased")(ids).logits
        error = (model(ids).logits - expected).norm() / expected.norm()
    assert error < 0.02


def test_evaluation_compares_with_the_original(tmp_path, make_checkpoint):
    source, _ = make_checkpoint("llama-tied")
    matgptq.quantize(source, tmp_path / "out", dataset=token_ids(), rotate=True, group_size=32)
    (result,) = matgptq.evaluate(tmp_path / "out", (8,), text=token_ids(2, 24, seed=9)).results
    assert 0 < result.kl < 0.05
    assert result.bytes == open_checkpoint(tmp_path / "out").served_bytes(8)
