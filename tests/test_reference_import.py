"""Import of the published code's packed models and folders: exact weights, refusals by name, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import matgptq
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.core.solver import solve
from matgptq.errors import CheckpointError, ConfigurationError, MatGPTQError, SourceError
from matgptq.inference.nested_linear import nested_layers
from matgptq.recipe import make_recipe
from matgptq.reference_formats.opened import ReferenceLayer
from matgptq.reference_formats.reference_import import import_reference, restore_order

WIDTHS = range(2, 9)
GROUP = 32
LAYER = "model.layers.1.mlp.down_proj"
TOKENS = torch.arange(12).view(1, -1)
CONFIG = {
    "group_size": GROUP,
    "modules_to_not_convert": ["lm_head", "norm"],
    "master_bitwidth": 8,
    "inference_bitwidth": 4,
    "quant_method": "matgptq_quant",
    "quant_dtype": "float16",
}


@pytest.fixture(autouse=True, scope="module")
def exact_products():
    """Logits are compared bit for bit: every product is made the one way that defines it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MATGPTQ_KERNEL", "reference")
        yield


def make_model(directory: Path, *, tied: bool = False, attention_bias: bool = True) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        tie_word_embeddings=tied,
        attention_bias=attention_bias,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text('{"a": 1}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def linear_weights(directory: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(directory / "model.safetensors")
    return {name.removesuffix(".weight"): t for name, t in tensors.items() if name.endswith("_proj.weight")}


def quantize(weight: torch.Tensor, group: int, *, symmetric: bool = True, dtype=torch.bfloat16) -> dict:
    """Round to nearest on the reference's grids: ``w = scale * (q - zero)``."""
    groups = weight.float().view(len(weight), -1, group)
    low, high = groups.amin(-1), groups.amax(-1)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / 255).to(dtype)
    zero = torch.full_like(scale, 128) if symmetric else torch.round(-low / scale.float()).to(dtype)
    codes = (groups / scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)).round().clamp(0, 255)
    return {"qweight": codes.to(torch.uint8).view_as(weight), "scale": scale, "zero": zero, "perm": None}


def quantize_permuted(weight: torch.Tensor, group: int, perm: torch.Tensor) -> dict:
    return {**quantize(weight[:, perm], group), "perm": perm}


def write_folders(root: Path, model: Path, change=lambda name, data: data, group: int = GROUP, **options) -> dict:
    """``<layer>/data.pt`` of all layers; ``change`` may alter one or return None to leave it out."""
    written = {}
    for name, weight in linear_weights(model).items():
        data = change(name, quantize(weight, group, **options))
        if data is not None:
            (root / name).mkdir(parents=True)
            torch.save(data, root / name / "data.pt")
            written[name] = data
    return written


def write_packed(directory: Path, model: Path, change=lambda tensors: None, group: int = GROUP, **config) -> dict:
    """A packed model; ``change`` edits its tensors in place, ``config`` its quantization_config."""
    directory.mkdir(parents=True)
    tensors = load_file(model / "model.safetensors")
    written = {}
    for name, weight in linear_weights(model).items():
        data = written[name] = quantize(weight, group)
        del tensors[f"{name}.weight"]
        tensors[f"{name}.qweight"], tensors[f"{name}.scales"] = data["qweight"], data["scale"]
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((model / "config.json").read_text())
    record["quantization_config"] = {k: v for k, v in {**CONFIG, "group_size": group, **config}.items() if v != "drop"}
    (directory / "config.json").write_text(json.dumps(record))
    (directory / "tokenizer.json").write_text('{"packed": 1}')
    return written


def sliced_weight(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """``scale * (slice - 128)`` from plain integers, independent of the package."""
    levels = torch.tensor([min((q + (1 << 7 - bits if bits < 8 else 0)) >> 8 - bits, 2**bits - 1) << 8 - bits
                           for q in range(256)])  # fmt: skip
    values = (levels[codes.long()] - 128).float().view(*scale.shape, -1)
    return (values * scale.float().unsqueeze(-1)).view(codes.shape)


def expected_logits(model: Path, written: dict, bits: int) -> torch.Tensor:
    full = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for name, data in written.items():
        weight = sliced_weight(data["qweight"], data["scale"], bits)
        if data["perm"] is not None:
            weight = weight[:, data["perm"].argsort()]
        full.get_submodule(name).weight.data = weight
    with torch.no_grad():
        return full(TOKENS).logits


def check_all_widths(out: Path, model: Path, written: dict) -> None:
    loaded = matgptq.load(out, device="cpu")
    assert set(nested_layers(loaded)) == set(written)
    for bits in WIDTHS:
        loaded.set_bits(bits)
        with torch.no_grad():
            assert torch.equal(loaded(TOKENS).logits, expected_logits(model, written, bits)), bits


def refused(error: type[MatGPTQError], match: str, directory: Path, out: Path, **options) -> None:
    with pytest.raises(error, match=match):
        import_reference(directory, out, **options)
    assert not out.exists()
    assert not [file for file in out.parent.iterdir() if file.name.startswith(f".{out.name}")]


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "full")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# What is read


@pytest.mark.parametrize("with_model", [False, True])
def test_packed_model_is_imported_exactly(tmp_path, model, out, with_model):
    written = write_packed(tmp_path / "packed", model)
    report = import_reference(tmp_path / "packed", out, model=model if with_model else None, exact=True)
    check_all_widths(out, model, written)
    checkpoint = open_checkpoint(out)
    assert checkpoint.settings.bits == 4
    assert checkpoint.settings.group_size == GROUP
    assert checkpoint.settings.ignore == ("lm_head",)
    assert checkpoint.settings.recipe["method"] == "reference"
    assert checkpoint.settings.source == (str(model.resolve()) if with_model else None)
    assert [layer.name for layer in report.layers] == list(checkpoint.layers)
    assert any("are not compared" in note for note in report.notes) != with_model
    assert all((layer.weight_error is not None) == with_model for layer in report.layers)
    assert json.loads((out / "report.json").read_text())["notes"] == report.notes


def test_default_width_can_be_chosen(tmp_path, model, out):
    written = write_packed(tmp_path / "packed", model)
    import_reference(tmp_path / "packed", out, bits=3)
    loaded = matgptq.load(out, device="cpu")
    assert torch.equal(loaded(TOKENS).logits, expected_logits(model, written, 3))
    refused(ConfigurationError, "bits must be", tmp_path / "packed", tmp_path / "other", bits=9)


def test_other_tensors_and_side_files_are_kept(tmp_path, model, out):
    write_packed(tmp_path / "packed", model)
    import_reference(tmp_path / "packed", out, model=model)
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    kept = [name for name in before if not name.endswith("_proj.weight")]
    assert "model.layers.0.self_attn.q_proj.bias" in kept
    for name in kept:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])
    assert (out / "tokenizer.json").read_text() == '{"packed": 1}'
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"  # packing lost it, --model has it
    config, own = json.loads((model / "config.json").read_text()), json.loads((out / "config.json").read_text())
    assert own.pop("quantization_config")["quant_method"] == "matgptq"
    assert own == config


def test_sharded_and_tied_packed_model(tmp_path, out):
    model = make_model(tmp_path / "full", tied=True, attention_bias=False)
    packed = tmp_path / "packed"
    written = write_packed(packed, model)
    tensors = load_file(packed / "model.safetensors")
    (packed / "model.safetensors").unlink()
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, packed / f"{number}.safetensors")
        index.update(dict.fromkeys(part, f"{number}.safetensors"))
    (packed / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    import_reference(packed, out, shard_bytes=30_000)
    assert (out / "model.safetensors.index.json").exists()
    check_all_widths(out, model, written)


@pytest.mark.parametrize("nested", [False, True])
def test_folders_are_imported_exactly(tmp_path, model, out, nested):
    root = tmp_path / "save"
    written = write_folders(root / "full" if nested else root, model)
    report = import_reference(root, out, model=model, exact=True)
    check_all_widths(out, model, written)
    assert report.notes == []
    assert max(layer.weight_error for layer in report.layers) < 0.02
    assert open_checkpoint(out).settings.bits == 8
    assert (out / "chat_template.jinja").exists()


def test_whole_rows_that_are_right_are_imported(tmp_path, model, out):
    weights = linear_weights(model)
    folders = write_folders(tmp_path / "save", model, lambda name, _: quantize(weights[name], weights[name].shape[1]))
    import_reference(tmp_path / "save", out, model=model)
    assert open_checkpoint(out).settings.group_size == -1
    check_all_widths(out, model, folders)


def test_layer_kinds_left_out_of_folders_stay_at_full_precision(tmp_path, model, out):
    written = write_folders(tmp_path / "save", model, lambda name, data: None if "down_proj" in name else data)
    report = import_reference(tmp_path / "save", out, model=model)
    assert "model.layers.0.mlp.down_proj" in report.notes[0]
    assert LAYER in open_checkpoint(out).settings.ignore
    check_all_widths(out, model, written)


def test_packed_layer_without_codes_stays_at_full_precision(tmp_path, model, out):
    def change(tensors):
        del tensors[f"{LAYER}.qweight"], tensors[f"{LAYER}.scales"]
        tensors[f"{LAYER}.weight"] = linear_weights(model)[LAYER]

    written = write_packed(tmp_path / "packed", model, change)
    del written[LAYER]
    report = import_reference(tmp_path / "packed", out, model=model)
    assert any(LAYER in note and "modules_to_not_convert" in note for note in report.notes)
    check_all_widths(out, model, written)
    write_packed(tmp_path / "listed", model, change, modules_to_not_convert=["lm_head", "norm", "1.mlp.down_proj"])
    assert import_reference(tmp_path / "listed", tmp_path / "again", model=model).notes == []


# Column orders


def test_column_order_is_undone_when_groups_stay_whole(tmp_path, model, out):
    torch.manual_seed(1)
    weights = linear_weights(model)

    def change(name, data):
        size = weights[name].shape[1]
        if "down_proj" in name:  # whole groups moved, and columns inside them
            blocks = torch.randperm(size // GROUP)
            inside = [block * GROUP + torch.randperm(GROUP) for block in blocks]
            return quantize_permuted(weights[name], GROUP, torch.cat(inside))
        if "o_proj" in name:  # one group per row: any order
            return quantize_permuted(weights[name], size, torch.randperm(size))
        if "up_proj" in name:  # any order, but all groups of a row share a scale
            permuted = quantize_permuted(weights[name], size, torch.randperm(size))
            return {**permuted, **{key: permuted[key].repeat(1, size // GROUP) for key in ("scale", "zero")}}
        return data

    written = write_folders(tmp_path / "save", model, change)
    import_reference(tmp_path / "save", out, model=model, exact=True)
    check_all_widths(out, model, written)
    assert open_checkpoint(out).settings.layer_group_sizes == {
        f"model.layers.{index}.self_attn.o_proj": 64 for index in range(2)
    }


def test_column_order_that_breaks_groups_is_refused(tmp_path, model, out):
    perm = torch.randperm(128, generator=torch.Generator().manual_seed(2))
    weight = linear_weights(model)[LAYER]
    write_folders(
        tmp_path / "save", model, lambda name, data: quantize_permuted(weight, GROUP, perm) if name == LAYER else data
    )
    refused(SourceError, f"layer {LAYER}: .*--act_order", tmp_path / "save", out, model=model)


def test_restored_order_follows_the_stored_one():
    order = torch.tensor([3, 2, 0, 1])
    layer = ReferenceLayer(torch.tensor([[10, 11, 12, 13]], dtype=torch.uint8), torch.tensor([[1.0, 2.0]]), None, order)
    codes, scales = restore_order("x", layer)
    assert codes.tolist() == [[12, 13, 11, 10]]  # column c of the model is stored where order says c
    assert scales.tolist() == [[2.0, 1.0]]


# Scales


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rounded_scales_are_noted_or_refused(tmp_path, model, out, dtype):
    written = write_folders(tmp_path / "save", model, dtype=dtype)
    refused(SourceError, "significant bits", tmp_path / "save", out, model=model, exact=True)
    report = import_reference(tmp_path / "save", out, model=model)
    assert 0 < max(layer.scale_change for layer in report.layers) <= 2**-8
    assert "rounded to 8 significant bits" in report.notes[-1]
    for data in written.values():
        data["scale"] = data["scale"].float().to(torch.bfloat16)
    check_all_widths(out, model, written)


def test_scales_outside_the_range_are_refused(tmp_path, model, out):
    def change(tensors):
        tensors[f"{LAYER}.scales"] = torch.full_like(tensors[f"{LAYER}.scales"], 1e30)

    write_packed(tmp_path / "packed", model, change)
    refused(SourceError, f"layer {LAYER}: .*range", tmp_path / "packed", out)


def test_tiny_scales_of_empty_groups_are_noted(tmp_path, model, out):
    def change(tensors):
        tensors[f"{LAYER}.scales"][0, 0] = 1e-9

    write_packed(tmp_path / "packed", model, change)
    report = import_reference(tmp_path / "packed", out)
    assert "below float16's normal range" in report.notes[-1]


@pytest.mark.parametrize(
    ("value", "problem"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (0.0, "zero"), (-1, "neg")]
)
@pytest.mark.parametrize("packed", [False, True])
def test_impossible_scales_are_refused(tmp_path, model, out, value, problem, packed):
    def change(name, data):
        if name == LAYER:
            data["scale"][3, 1] = value
        return data

    if packed:
        write_packed(tmp_path / "ref", model, lambda tensors: change(LAYER, {"scale": tensors[f"{LAYER}.scales"]}))
    else:
        write_folders(tmp_path / "ref", model, change)
    refused(SourceError, f"layer {LAYER}: .*{problem}", tmp_path / "ref", out, model=None if packed else model)


@pytest.mark.parametrize("garbage", [0.273, 1e-12, 3e38])
def test_garbage_row_scales_are_refused(tmp_path, model, out, garbage):
    weights = linear_weights(model)

    def change(name, _):
        data = quantize(weights[name], weights[name].shape[1])
        data["scale"].fill_(garbage)
        return data

    write_folders(tmp_path / "save", model, change)
    refused(SourceError, "layer model.layers.0.*uninitialized memory", tmp_path / "save", out, model=model)


def test_stale_row_scales_of_the_right_size_are_refused(tmp_path, model, out):
    weights = linear_weights(model)

    def change(name, _):
        data = quantize(weights[name], weights[name].shape[1])
        if name == LAYER:
            data["scale"] *= 1 + torch.arange(64).view(-1, 1) % 2  # memory of another layer: every other row is right
        return data

    write_folders(tmp_path / "save", model, change)
    refused(SourceError, f"layer {LAYER}: .*32 of 64 rows.*uninitialized", tmp_path / "save", out, model=model)


@pytest.mark.parametrize("packed", [False, True])
def test_compensated_weights_are_not_taken_for_damaged_ones(tmp_path, model, out, packed):
    """Low targets move the parent far from the weights: that is the method, not damage."""
    torch.manual_seed(3)

    def change(name, data):
        size = data["qweight"].shape[1]
        basis = torch.linalg.qr(torch.randn(size, size)).Q * torch.randn(size, 1).exp()
        hessian = (basis / torch.arange(1, size + 1)) @ basis.T
        recipe = make_recipe("paper", (2, 8), group_size=GROUP)
        weight = solve(linear_weights(model)[name].float(), hessian, recipe, GROUP).weight
        return {**data, "qweight": weight.codes, "scale": weight.scales[8].to(torch.bfloat16)}

    written = write_folders(tmp_path / "ref", model, change)
    if packed:

        def pack(tensors):
            for name, data in written.items():
                tensors[f"{name}.qweight"], tensors[f"{name}.scales"] = data["qweight"], data["scale"]

        write_packed(tmp_path / "packed", model, pack)
    report = import_reference(tmp_path / ("packed" if packed else "ref"), out, model=model)
    assert max(layer.weight_error for layer in report.layers) > 0.1
    check_all_widths(out, model, written)


@pytest.mark.parametrize("group_size", [-1, None])
def test_packed_rows_need_the_model(tmp_path, model, out, group_size):
    def change(tensors):
        for name, weight in linear_weights(model).items():
            tensors[f"{name}.scales"] = quantize(weight, weight.shape[1])["scale"]
            tensors[f"{name}.qweight"] = quantize(weight, weight.shape[1])["qweight"]

    write_packed(tmp_path / "packed", model, change, **{"group_size": group_size})
    refused(ConfigurationError, "uninitialized memory.*--model", tmp_path / "packed", out)
    import_reference(tmp_path / "packed", out, model=model)
    assert open_checkpoint(out).settings.group_size == -1


def test_another_model_is_refused(tmp_path, model, out):
    write_packed(tmp_path / "packed", model)
    other = make_model(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({k: torch.randn_like(v) for k, v in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    refused(SourceError, r"layer model.layers.0.\S+: .*another --model", tmp_path / "packed", out, model=other)


# Zero points and master widths


def test_asymmetric_folders_are_refused(tmp_path, model, out):
    write_folders(tmp_path / "save", model, symmetric=False)
    refused(SourceError, r"layer model.layers.0.\S+: has zero points", tmp_path / "save", out, model=model)


def test_one_zero_point_is_enough_to_refuse(tmp_path, model, out):
    def change(name, data):
        if name == LAYER:
            data["zero"][5, 2] = 127
        return data

    write_folders(tmp_path / "save", model, change)
    refused(SourceError, f"layer {LAYER}: has zero points", tmp_path / "save", out, model=model)


def test_zero_points_that_packing_left_out_are_found(tmp_path, model, out):
    def change(tensors):
        data = quantize(linear_weights(model)[LAYER], GROUP, symmetric=False)
        tensors[f"{LAYER}.qweight"], tensors[f"{LAYER}.scales"] = data["qweight"], data["scale"]

    write_packed(tmp_path / "packed", model, change)
    refused(SourceError, f"layer {LAYER}: .*zero points were left out", tmp_path / "packed", out, model=model)


def test_column_order_that_packing_left_out_is_found(tmp_path, model, out):
    def change(tensors):
        tensors[f"{LAYER}.qweight"] = tensors[f"{LAYER}.qweight"].flip(1).contiguous()

    write_packed(tmp_path / "packed", model, change)
    refused(SourceError, f"layer {LAYER}: .*column order", tmp_path / "packed", out, model=model)


def test_master_width_is_refused(tmp_path, model, out):
    def change(name, data):
        return {**data, "qweight": data["qweight"] >> 2, "zero": torch.full_like(data["zero"], 32)}

    write_folders(tmp_path / "save", model, change)
    refused(SourceError, r"layer model.layers.0.\S+: .*master bit width 6", tmp_path / "save", out, model=model)
    write_packed(tmp_path / "packed", model, master_bitwidth=6)
    refused(SourceError, "master_bitwidth is 6", tmp_path / "packed", out)


# Broken input


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"quant_method": "matgptq"}, "matgptq checkpoint already"),
        ({"inference_bitwidth": 1}, "inference_bitwidth"),
        ({"group_size": 0}, "group_size must be"),
        ({"group_size": 64}, "scales are BF16 .* for group_size 64"),
        ({"group_size": 48}, "group_size 48 does not divide"),
        ({"modules_to_not_convert": "lm_head"}, "must be a list"),
        ({"modules_to_not_convert": ["down_proj"]}, "layer model.layers.0.mlp.down_proj: .*modules_to_not_convert"),
        ({"zero_point": True}, "zero_point, whose meaning is not known"),
    ],
)
def test_bad_packed_config_is_refused(tmp_path, model, out, config, match):
    write_packed(tmp_path / "packed", model)
    file = tmp_path / "packed" / "config.json"
    record = json.loads(file.read_text())
    record["quantization_config"].update(config)
    file.write_text(json.dumps(record))
    refused(SourceError, match, tmp_path / "packed", out)


@pytest.mark.parametrize("record", ["x", [1], 3, None])
def test_a_packed_config_that_is_no_object_is_refused(tmp_path, model, out, record):
    write_packed(tmp_path / "packed", model)
    file = tmp_path / "packed" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": record}))
    refused(SourceError, r"config\.json: quantization_config is no object", tmp_path / "packed", out)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop(f"{LAYER}.scales"), f"layer {LAYER}: has a qweight, but no scales"),
        (drop(f"{LAYER}.qweight"), f"tensor {LAYER}.scales has no place"),
        (drop("model.norm.weight"), "no model.norm.weight"),
        (put(f"{LAYER}.zeros", torch.zeros(2)), f"tensor {LAYER}.zeros has no place"),
        (put(f"{LAYER}.weight", torch.zeros(64, 128)), f"layer {LAYER}: has a qweight and a weight"),
        (put(f"{LAYER}.qweight", torch.zeros(64, 64, dtype=torch.uint8)), f"layer {LAYER}: qweight is U8"),
        (put(f"{LAYER}.qweight", torch.zeros(64, 128)), f"layer {LAYER}: qweight is F32"),
        (put("model.layers.7.mlp.down_proj.qweight", torch.zeros(2, 2, dtype=torch.uint8)), "layers.7.*no such Linear"),
        (put("model.norm.weight", torch.full((64,), torch.nan)), "model.norm.weight holds NaN"),
        (put("model.norm.weight", torch.ones(63)), "model.norm.weight is .63."),
    ],
)
def test_bad_packed_tensors_are_refused(tmp_path, model, out, change, match):
    write_packed(tmp_path / "packed", model, change)
    refused(SourceError, match, tmp_path / "packed", out)


def test_truncated_packed_model_is_refused(tmp_path, model, out):
    write_packed(tmp_path / "packed", model)
    file = tmp_path / "packed" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(SourceError, "truncated", tmp_path / "packed", out)


def test_quantized_tied_head_is_refused(tmp_path, out):
    model = make_model(tmp_path / "full", tied=True)

    def change(tensors):
        data = quantize(tensors["model.embed_tokens.weight"], GROUP)
        tensors["lm_head.qweight"], tensors["lm_head.scales"] = data["qweight"], data["scale"]

    write_packed(tmp_path / "packed", model, change, modules_to_not_convert=[])
    refused(SourceError, "layer lm_head: .*ties", tmp_path / "packed", out)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: [data["qweight"]], "holds a list"),
        (lambda data: {k: v for k, v in data.items() if k != "zero"}, "lacks zero"),
        (lambda data: {**data, "codebook": data["scale"]}, "holds codebook"),
        (lambda data: {**data, "zero": None}, "zero in .* is not a plain tensor"),
        (lambda data: {**data, "qweight": data["qweight"].int()}, "qweight is torch.int32"),
        (lambda data: {**data, "qweight": data["qweight"][:, :64]}, "qweight is torch.uint8 .64, 64."),
        (lambda data: {**data, "scale": data["scale"][:, :3]}, "do not split into 3 groups"),
        (lambda data: {**data, "scale": data["scale"].flatten()}, "scale is"),
        (lambda data: {**data, "zero": data["zero"][:, :2]}, "zero is torch.bfloat16 .64, 2., must be numbers .64, 4."),
        (lambda data: {**data, "zero": data["zero"] * torch.nan}, "zero points hold NaN"),
        (lambda data: {**data, "zero": data["zero"].to(torch.complex64)}, "zero is torch.complex64"),
        (lambda data: {**data, "zero": data["zero"].bool()}, "zero is torch.bool"),
        (lambda data: {**data, "perm": torch.zeros(128, dtype=torch.int64)}, "not a permutation"),
        (lambda data: {**data, "perm": torch.arange(64)}, "not a permutation"),
        (lambda data: None, "missing.*interrupted"),
    ],
)
def test_bad_folder_data_is_refused(tmp_path, model, out, change, match):
    write_folders(tmp_path / "save", model, lambda name, data: change(data) if name == LAYER else data)
    refused(SourceError, rf"(?s)layer {LAYER}: .*{match}|{match}.*{LAYER}", tmp_path / "save", out, model=model)


def test_foreign_and_empty_layer_folders_are_refused(tmp_path, model, out):
    root = tmp_path / "save"
    write_folders(root, model)
    (root / LAYER / "data.pt").unlink()
    refused(SourceError, f"layer {LAYER}: .*holds no data.pt", root, out, model=model)
    (root / "model.layers.9.mlp.down_proj").mkdir()
    torch.save({}, root / "model.layers.9.mlp.down_proj" / "data.pt")
    refused(SourceError, "layer model.layers.9.mlp.down_proj: .*no such Linear", root, out, model=model)


def test_folders_need_one_model(tmp_path, model, out):
    write_folders(tmp_path / "save" / "one", model)
    refused(ConfigurationError, "give --model", tmp_path / "save", out)
    write_folders(tmp_path / "save" / "two", model)
    refused(SourceError, "several models.*one, two", tmp_path / "save", out, model=model)


def test_what_is_neither_format_is_refused(tmp_path, model, out):
    refused(SourceError, "no such directory", tmp_path / "nowhere", out)
    refused(SourceError, "neither a packed model", model, out)
    (tmp_path / "gptq" / LAYER).mkdir(parents=True)
    torch.save(torch.zeros(2, 2), tmp_path / "gptq" / LAYER / "4.pt")
    refused(SourceError, "plain GPTQ output", tmp_path / "gptq", out, model=model)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    write_folders(tmp_path / "save", model)
    refused(SourceError, "GGUF", tmp_path / "save", out, model=tmp_path / "x.gguf")


def test_damaged_data_is_refused(tmp_path, model, out):
    write_folders(tmp_path / "save", model)
    file = tmp_path / "save" / LAYER / "data.pt"
    file.write_bytes(file.read_bytes()[:200])
    refused(SourceError, f"layer {LAYER}: .*damaged", tmp_path / "save", out, model=model)


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_hostile_pickle_is_not_executed(tmp_path, model, out, save):
    write_folders(tmp_path / "save", model)
    file, target = tmp_path / "save" / LAYER / "data.pt", tmp_path / "executed"
    content = {**torch.load(file), "perm": Hostile(target)}
    torch.save(content, file) if save == "torch" else file.write_bytes(pickle.dumps(content))
    refused(SourceError, f"layer {LAYER}: .*not unpickled", tmp_path / "save", out, model=model)
    assert not target.exists()


def test_existing_output_needs_force(tmp_path, model, out):
    write_packed(tmp_path / "packed", model)
    import_reference(tmp_path / "packed", out)
    with pytest.raises(CheckpointError, match="exists already"):
        import_reference(tmp_path / "packed", out)
    import_reference(tmp_path / "packed", out, bits=2, force=True)
    assert open_checkpoint(out).settings.bits == 2


def test_interrupted_import_leaves_nothing(tmp_path, model, out, monkeypatch):
    write_packed(tmp_path / "packed", model)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("matgptq.reference_formats.reference_import._scale_notes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        import_reference(tmp_path / "packed", out, shard_bytes=30_000)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["full", "packed"]
