"""Mixtures of experts, end to end; the reference of each expert's codes is a solve done by hand."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from summed_hessian import accumulate_hessian
from tiny_models import VOCAB, blocks_of, build_model, make_tokenizer, save_model, token_ids
from torch import nn
from transformers import AutoModelForCausalLM

import matgptq
from matgptq.calibration.block_hessians import collect_hessians
from matgptq.calibration.expert_hessians import ExpertCalibration
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.core.solver import solve
from matgptq.errors import ExportError, UnsupportedModelError
from matgptq.exports.verification import verify
from matgptq.files.stored_tensors import read_headers, read_tensor
from matgptq.inference.nested_linear import nested_layers
from matgptq.models.blocks import capture_inputs, find_blocks
from matgptq.models.experts import Experts, unfuse_experts
from matgptq.models.families import find_family
from matgptq.nested_weight import NestedWeight
from matgptq.recipe import make_recipe
from matgptq.width_search.layer_groups import group_layers

FAMILIES = ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe"]
ONE_BLOCK: dict[str, dict[str, Any]] = {
    "mixtral": {"num_hidden_layers": 1, "num_local_experts": 5},
    "qwen3_moe": {"num_hidden_layers": 1, "num_experts": 5, "mlp_only_layers": []},
}
NAMES = {
    "mixtral": ("model.layers.0.block_sparse_moe.experts", "w1", "w3", "w2"),
    "qwen3_moe": ("model.layers.0.mlp.experts", "gate_proj", "up_proj", "down_proj"),
}
NEVER, THRICE, MARK = 1, 2, 100
PLAIN = {"quality": "fast", "sink_weight": 1, "group_size": 32, "bits": (3, 8), "channel_scaling": 0.0}


def unfused(model: Any) -> Any:
    result = copy.deepcopy(model)
    assert unfuse_experts(result, find_family(model.config.model_type))
    return result


def rigged_windows() -> torch.Tensor:
    """Calibration tokens with three marks in them."""
    windows = token_ids(8, 16)
    windows[windows == MARK] = MARK + 1
    for window, position in ((0, 3), (2, 0), (7, 15)):
        windows[window, position] = MARK
    return windows


def rig(model: Any) -> Any:
    """No token reaches the expert NEVER; only MARK tokens reach THRICE."""
    layer = model.model.layers[0]
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding *= 8
        embedding[:, 0], embedding[:, 1] = 20.0, 0.0
        embedding[MARK, 1] = 20.0
        layer.self_attn.o_proj.weight *= 0.1
        layer.post_attention_layernorm.weight[:2] = 1.0
        router = layer.mlp.gate.weight
        router[NEVER], router[THRICE] = 0.0, 0.0
        router[:, :2] = 0.0
        router[NEVER, 0] = -30.0
        router[THRICE, 0], router[THRICE, 1] = -30.0, 60.0
    return model


def save_rigged(name: str, directory: Path, change: Any = None) -> Path:
    model = rig(build_model(name, **ONE_BLOCK[name]))
    if change is not None:
        change(model)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def seen_by_router(model: Any, windows: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each window: what enters the fused experts of the first block, their numbers, the router's weights."""
    seen: list[Any] = []
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _, given: seen.append(tuple(each.detach() for each in given)))
    with torch.no_grad():
        for window in windows:
            model(window.unsqueeze(0))
    handle.remove()
    return seen


def by_hand(fused: Any, number: int, seen: Any, *, every_token: bool) -> dict[str, torch.Tensor]:
    """Hessians of one expert, ``inner`` and ``down``, straight from the fused tensors."""
    gate_up, down = fused.gate_up_proj[number].detach(), fused.down_proj[number].detach()
    hidden_size, inner = down.shape
    totals = {"inner": torch.zeros(hidden_size, hidden_size), "down": torch.zeros(inner, inner)}
    count = 0
    for hidden, index, _ in seen:
        rows = hidden if every_token else hidden[(index == number).any(1)]
        if not len(rows):
            continue
        gate, up = rows @ gate_up[:inner].T, rows @ gate_up[inner:].T
        accumulate_hessian(totals["inner"], rows)
        accumulate_hessian(totals["down"], nn.functional.silu(gate) * up)
        count += len(rows)
    return {name: total * (2 / count) for name, total in totals.items()}


def check_layer(found: Mapping[str, torch.Tensor], expected: NestedWeight, number: int, ties: float) -> None:
    """Codes are equal but for a share of neighbours; scales of rows whose codes are, to 2 % if that is allowed."""
    apart = (found["codes"].int() - expected.codes.int()).abs()
    assert int(apart.max()) <= 1, number
    assert float(apart.float().mean()) <= ties, number
    same = ~apart.any(1)
    for bits in (3, 8):
        scales, wanted = found[f"scales_{bits}"][same], expected.scales[bits].to(torch.float16)[same]
        torch.testing.assert_close(scales, wanted, rtol=2e-2 if ties else 0, atol=0)


def check_codes(
    out: Path, name: str, model: Any, windows: torch.Tensor, every_token: Mapping[int, bool], ties: float = 0.0
) -> None:
    path, gate, up, down = NAMES[name]
    fused = model.model.layers[0].mlp.experts
    seen = seen_by_router(model, windows)
    tensors = load_file(out / "model.safetensors")
    recipe = make_recipe("matgptq", PLAIN["bits"], quality="fast", sink_weight=1, group_size=32)
    for number, every in every_token.items():
        hessians = by_hand(fused, number, seen, every_token=every)
        parts = {"codes", "scales_3", "scales_8"}
        expected = solve(fused.gate_up_proj[number].detach(), hessians["inner"], recipe, 32).weight
        found = {part: torch.cat([tensors[f"{path}.{number}.{leaf}.{part}"] for leaf in (gate, up)]) for part in parts}
        check_layer(found, expected, number, ties)
        expected = solve(fused.down_proj[number].detach(), hessians["down"], recipe, 32).weight
        check_layer({part: tensors[f"{path}.{number}.{down}.{part}"] for part in parts}, expected, number, ties)


# --- the form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_unfused_experts_compute_the_same_and_have_the_names_of_the_files(name, tmp_path):
    model = build_model(name)
    other = unfused(model)
    with torch.no_grad():
        expected, found = (each(token_ids()).logits for each in (model, other))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    files = read_headers(save_model(name, tmp_path / "source"))
    names = {key for key in other.state_dict() if key != "lm_head.weight" or not model.config.tie_word_embeddings}
    assert names == set(files)
    assert all(tuple(tensor.shape) == files[key].shape for key, tensor in other.state_dict().items() if key in files)


def test_unfusing_copies_nothing_and_may_be_repeated():
    model = build_model("mixtral")
    fused = model.model.layers[0].mlp.experts.gate_up_proj
    family = find_family("mixtral")
    assert unfuse_experts(model, family)
    experts = model.model.layers[0].block_sparse_moe.experts
    assert experts[1].up.weight.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
    assert unfuse_experts(model, family)
    assert model.model.layers[0].block_sparse_moe.experts is experts
    assert not any(".mlp." in key for key in model.state_dict())
    assert not unfuse_experts(build_model("llama"), find_family("llama"))


def test_a_copy_of_an_unfused_model_is_independent():
    model = unfused(build_model("mixtral"))
    other = copy.deepcopy(model)
    before = model(token_ids()).logits
    with torch.no_grad():
        other.model.layers[0].block_sparse_moe.experts[0].down.weight.zero_()
    assert torch.equal(model(token_ids()).logits, before)
    assert not torch.equal(other(token_ids()).logits, before)


def test_layouts_that_are_not_understood_are_refused_by_tensor_and_shape():
    family = find_family("qwen3_moe")
    model = build_model("qwen3_moe")
    model.model.layers[1].mlp.experts.is_transposed = True
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.experts: .*gate_up_proj \[6, 64, 64\]"):
        unfuse_experts(model, family)
    model = build_model("qwen3_moe")
    model.model.layers[1].mlp.experts.down_proj_bias = nn.Parameter(torch.zeros(6, 64))
    with pytest.raises(UnsupportedModelError, match=r"down_proj_bias \[6, 64\]"):
        unfuse_experts(model, family)
    model = build_model("qwen3_moe")
    model.model.layers[1].mlp.experts.down_proj = nn.Parameter(torch.zeros(6, 32, 64))
    with pytest.raises(UnsupportedModelError, match=r"down_proj \[6, 32, 64\]"):
        unfuse_experts(model, family)


def test_files_with_fused_experts_are_refused_before_anything_else(tmp_path):
    source = save_model("qwen3_moe", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    gates = [tensors.pop(f"model.layers.1.mlp.experts.{number}.gate_proj.weight") for number in range(6)]
    tensors["model.layers.1.mlp.experts.gate_proj.weight"] = torch.stack(gates)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"experts\.gate_proj\.weight \[6, 32, 64\].*save_pretrained"):
        matgptq.quantize(source, tmp_path / "out", dataset=token_ids())
    assert not (tmp_path / "out").exists()


# --- Hessians ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_each_expert_is_solved_for_its_tokens_and_starved_ones_for_all(name, tmp_path, float32_products):
    source, windows = save_rigged(name, tmp_path / "source"), rigged_windows()
    model = AutoModelForCausalLM.from_pretrained(source)
    counts = torch.bincount(torch.cat([index.flatten() for _, index, _ in seen_by_router(model, windows)]), minlength=5)
    assert counts[NEVER] == 0
    assert counts[THRICE] == 3
    assert min(counts[number] for number in (0, 3, 4)) >= 10
    report = matgptq.quantize(source, tmp_path / "out", dataset=windows, min_expert_tokens=10, **PLAIN)
    check_codes(tmp_path / "out", name, model, windows, {number: number in (NEVER, THRICE) for number in range(5)})
    path, *leaves = NAMES[name]
    of_layer = {layer.name: layer for layer in report.layers}
    for number in range(5):
        for leaf in leaves:
            layer = of_layer[f"{path}.{number}.{leaf}"]
            assert layer.expert_tokens == counts[number]
            assert layer.shared_hessian == (number in (NEVER, THRICE))
            assert not layer.rounded_to_nearest
    assert of_layer["model.layers.0.self_attn.q_proj"].expert_tokens is None
    assert report.fallbacks["expert on all tokens"] == 6
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["fallbacks"]["expert on all tokens"] == 6
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [each["expert_tokens"] for each in log if each.get("name") == f"{path}.{THRICE}.{leaves[0]}"] == [3]


def test_three_tokens_are_enough_if_asked_for(tmp_path, float32_products):
    source, windows = save_rigged("mixtral", tmp_path / "source"), rigged_windows()
    report = matgptq.quantize(source, tmp_path / "out", dataset=windows, min_expert_tokens=3, **PLAIN)
    model = AutoModelForCausalLM.from_pretrained(source)
    # Processors add up a Hessian in different orders, and that of three tokens has little to hold codes by.
    check_codes(tmp_path / "out", "mixtral", model, windows, {THRICE: False, NEVER: True}, ties=0.005)
    assert report.fallbacks["expert on all tokens"] == 3


def test_all_experts_can_be_calibrated_on_all_tokens(tmp_path, float32_products):
    source, windows = save_rigged("mixtral", tmp_path / "source"), rigged_windows()
    report = matgptq.quantize(source, tmp_path / "out", dataset=windows, all_experts=True, **PLAIN)
    model = AutoModelForCausalLM.from_pretrained(source)
    check_codes(tmp_path / "out", "mixtral", model, windows, dict.fromkeys(range(5), True))
    assert report.fallbacks["expert on all tokens"] == 0
    tokens = {layer.name: layer.expert_tokens for layer in report.layers}
    assert tokens[f"{NAMES['mixtral'][0]}.{THRICE}.w1"] == 3


def test_an_expert_that_overflows_on_all_tokens_is_rounded_to_nearest(tmp_path, float32_products):
    def enlarge(model):
        with torch.no_grad():
            model.model.layers[0].mlp.experts.gate_up_proj[NEVER] *= 500

    source = save_rigged("mixtral", tmp_path / "source", enlarge)
    notes: list[str] = []

    class Notes(matgptq.progress.Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    report = matgptq.quantize(
        source, tmp_path / "out", dataset=rigged_windows(), dtype="float16", min_expert_tokens=4,
        progress=Notes(), **PLAIN,
    )  # fmt: skip
    rounded = [layer.name for layer in report.layers if layer.rounded_to_nearest]
    assert rounded == [f"{NAMES['mixtral'][0]}.{NEVER}.w2"]
    assert report.fallbacks["rounded to nearest"] == 1
    assert any("2 of 5 experts" in note and "1 (0), 2 (3)" in note for note in notes)
    assert any(rounded[0] in note for note in notes)
    model = matgptq.load(tmp_path / "out", bits=2)
    assert torch.isfinite(model(rigged_windows()).logits).all()


def test_experts_in_one_tensor_are_refused_where_layers_are_looked_for():
    with pytest.raises(UnsupportedModelError, match="still fused"):
        find_blocks(AutoModelForCausalLM.from_config(build_model("qwen3_moe").config), find_family("qwen3_moe"))


@pytest.mark.parametrize("saliency", [0.0, 1.5])
def test_tokens_of_experts_are_weighted_by_saliency_and_router(saliency, float32_products):
    model, windows = rig(build_model("mixtral", **ONE_BLOCK["mixtral"])), rigged_windows()
    seen = seen_by_router(model, windows)
    other = unfused(model)
    blocks = blocks_of(other)
    weights = torch.rand(windows.shape, generator=torch.Generator().manual_seed(1))
    inputs = capture_inputs(other, blocks, windows, token_weights={NAMES["mixtral"][0]: weights})
    how = ExpertCalibration(min_tokens=1, saliency=saliency)
    found = collect_hessians(blocks[0], [inputs], 0, lambda: None, experts=how)
    by_name = {group[0][0]: matrix for group, matrix in zip(blocks[0].inputs, found.matrices, strict=True)}
    for number in (0, THRICE, 3, 4):
        total, count = torch.zeros(64, 64, dtype=torch.float64), 0
        for (hidden, index, router), of_window in zip(seen, weights, strict=True):
            tokens, choice = torch.where(index == number)
            rows = hidden[tokens].double()
            factors = of_window[tokens].double() * router[tokens, choice].double() ** saliency
            total += rows.T @ (rows * factors[:, None])
            count += len(rows)
        matrix = by_name[f"block_sparse_moe.experts.{number}.w1"].double()
        torch.testing.assert_close(matrix, 2 * total / count, rtol=1e-4, atol=1e-4)
    assert found.coverage[f"{NAMES['mixtral'][0]}.{THRICE}.w2"].tokens == 3


@pytest.mark.parametrize("quality", ["balanced", "best"])
def test_saliency_rotation_and_tuning_take_experts(quality, tmp_path):
    source = save_model("qwen3_moe", tmp_path / "source")
    matgptq.quantize(
        source, tmp_path / "out", dataset=token_ids(8), quality=quality, group_size=32, min_expert_tokens=8,
        tuning_steps=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(source)
    loaded = matgptq.load(tmp_path / "out", bits=8)
    with torch.no_grad():
        expected, found = (each(token_ids()).logits for each in (model, loaded))
    assert (found - expected).norm() / expected.norm() < 0.2


# --- loading, search, exports -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """``{name: (source, checkpoint)}``."""
    root = tmp_path_factory.mktemp("experts")
    made = {}
    for name in ("mixtral", "qwen3_moe"):
        source = save_model(name, root / name / "source")
        options = {"dataset": token_ids(8), "quality": "fast", "group_size": 32, "min_expert_tokens": 8}
        options["channel_scaling"] = 0.5
        matgptq.quantize(source, root / name / "out", **options)
        made[name] = source, root / name / "out"
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_slice_equals_fused_tensors_filled_by_hand(name, quantized, monkeypatch):
    monkeypatch.setenv("MATGPTQ_KERNEL", "reference")
    source, out = quantized[name]
    loaded = matgptq.load(out, bits=3)
    reference = AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager")
    fused = reference.model.layers[1].mlp.experts
    path, gate, up, down = (part.replace("layers.0", "layers.1") for part in NAMES[name])
    for key, layer in nested_layers(loaded).items():
        if ".experts." not in key:
            reference.get_submodule(key).weight.data = layer.dequantize()
    for key, parameter in loaded.named_parameters():
        if "norm" in key:
            reference.get_parameter(key).data = parameter.data
    checked = 0
    for block, of_block in enumerate(reference.model.layers):
        fused = getattr(of_block.mlp, "experts", None)
        if fused is not None:
            router = f"{path.replace('layers.1', f'layers.{block}').removesuffix('.experts')}.gate"
            of_block.mlp.gate.weight.data = loaded.get_parameter(f"{router}.weight").data
        for number in range(len(fused.down_proj) if fused is not None else 0):
            expert = f"{path.replace('layers.1', f'layers.{block}')}.{number}"
            parts = [loaded.get_submodule(f"{expert}.{leaf}").dequantize() for leaf in (gate, up, down)]
            fused.gate_up_proj.data[number] = torch.cat(parts[:2])
            fused.down_proj.data[number] = parts[2]
            checked += 1
    assert checked == {"mixtral": 8, "qwen3_moe": 6}[name]
    with torch.no_grad():
        torch.testing.assert_close(loaded(token_ids()).logits, reference(token_ids()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_save_pretrained_writes_the_same_checkpoint(name, quantized, tmp_path):
    _, out = quantized[name]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    loaded.save_pretrained(tmp_path / "again")
    before, after = load_file(out / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    with torch.no_grad():
        again, expected = (matgptq.load(each, bits=4)(token_ids()).logits for each in (tmp_path / "again", out))
    assert torch.equal(again, expected)


def test_experts_can_be_ignored_by_pattern(quantized, tmp_path):
    source, _ = quantized["mixtral"]
    matgptq.quantize(
        source, tmp_path / "out", dataset=token_ids(), quality="fast", group_size=32,
        ignore=["lm_head", "*.experts.0.w1", "*.experts.2.*"],
    )  # fmt: skip
    loaded = matgptq.load(tmp_path / "out", bits=8)
    kept = loaded.model.layers[1].block_sparse_moe.experts
    assert isinstance(kept[0].gate, nn.Linear)
    assert isinstance(kept[2].down, nn.Linear)
    assert len(nested_layers(loaded)) == 32 - 2 * 4
    original = AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(kept[2].down.weight, original.model.layers[1].mlp.experts.down_proj[2])
    with pytest.raises(ExportError, match=r"experts\.0\.w1 is not quantized"):
        matgptq.export(tmp_path / "out", tmp_path / "export", format="compressed-tensors", bits=4)


def test_all_experts_of_a_block_share_a_width_in_a_search(quantized, tmp_path):
    _, out = quantized["qwen3_moe"]
    checkpoint = open_checkpoint(out)
    groups = group_layers(checkpoint.layers, find_family("qwen3_moe"))
    of_experts = [group for group in groups if "experts" in group.kind]
    assert [(group.block, len(group.layers)) for group in of_experts] == [(1, 18)]
    assert len(groups) == 4 + 3


@pytest.mark.parametrize("name", NAMES)
def test_dense_and_slice_exports_round_trip(name, quantized, tmp_path):
    _, out = quantized[name]
    with torch.no_grad():
        expected = matgptq.load(out, bits=3)(token_ids()).logits
        matgptq.export(out, tmp_path / "dense", format="dense", bits=3, dtype="float32")
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        assert not any(isinstance(module, Experts) for module in stock.modules())
        torch.testing.assert_close(stock(token_ids()).logits, expected, rtol=1e-4, atol=1e-4)
        matgptq.export(out, tmp_path / "slice", format="matgptq-slice", bits=3)
        torch.testing.assert_close(matgptq.load(tmp_path / "slice")(token_ids()).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_compressed_tensors_and_gptq_exports_name_experts_and_leave_routers_alone(name, quantized, tmp_path):
    _, out = quantized[name]
    path, gate, _, _ = (part.replace("layers.0", "layers.1") for part in NAMES[name])
    router = path.replace("experts", "gate")
    matgptq.export(out, tmp_path / "ct", format="compressed-tensors", bits=4)
    files = read_headers(tmp_path / "ct")
    assert f"{path}.3.{gate}.weight_packed" in files
    assert read_tensor(files[f"{router}.weight"]).shape[1] == 64
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert router in config["ignore"]
    matgptq.export(out, tmp_path / "gptq", format="gptq", bits=4)
    assert f"{path}.3.{gate}.qweight" in read_headers(tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert f"-:^{router}$".replace(".", r"\.") in config["dynamic"]


@pytest.mark.parametrize("format", ["dense", "compressed-tensors", "gptq", "matgptq-slice"])
@pytest.mark.parametrize("name", FAMILIES)
def test_exports_of_experts_are_compared_with_the_slice(name, format, tmp_path):
    if format == "compressed-tensors":
        pytest.importorskip("compressed_tensors", reason="the engine of this format")
    source = save_model(name, tmp_path / "source", torch.bfloat16)
    ignore = ("lm_head", *(("*.experts.1.*",) if format == "dense" else ()))
    matgptq.quantize(source, tmp_path / "out", method="rtn", group_size=32, ignore=ignore)
    export = tmp_path / "export"
    matgptq.export(tmp_path / "out", export, format=format, bits=4)
    found = verify(export, tmp_path / "out")
    assert found.passed
    assert found.largest_difference == 0
    checkpoint = open_checkpoint(tmp_path / "out")
    experts = [layer for layer in checkpoint.layers if ".experts." in layer]
    assert [*found.rounded] == (experts if format == "compressed-tensors" else [])
    # One scale of one expert is another.
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors[f"{experts[-1]}.scales_8"][3, 0] *= 2
    save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    found = verify(export, tmp_path / "other")
    assert not found.passed
    assert found.different == (experts[-1],)
    assert found.largest_difference > 0


def test_experts_of_different_widths_are_refused_where_one_kernel_runs_them(quantized, tmp_path):
    _, out = quantized["qwen3_moe"]
    layer = "model.layers.1.mlp.experts.2.down_proj"
    with pytest.raises(ExportError, match=r"one width: .* has 4 bits, .*2\.down_proj has 8 bits"):
        matgptq.export(out, tmp_path / "ct", format="compressed-tensors", bits=4, allocation={layer: 8})
    with pytest.raises(ExportError, match="gguf exports know"):
        matgptq.export(out, tmp_path / "gguf", format="gguf", bits=4)


def test_experts_get_one_group_size_in_compressed_tensors(tmp_path):
    """Groups of 32 are whole rows of the down projections alone; vLLM's kernel for experts knows one group size."""
    source = save_model("qwen3_moe", tmp_path / "source")
    matgptq.quantize(source, tmp_path / "out", dataset=token_ids(), quality="fast", group_size=32)
    matgptq.export(tmp_path / "out", tmp_path / "ct", format="compressed-tensors", bits=4)
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    sizes = {
        group["weights"]["group_size"]
        for group in config["config_groups"].values()
        for target in group["targets"]
        if ".experts." in target
    }
    assert sizes == {32}


def test_vocabulary_has_room_for_the_mark():
    assert MARK + 1 < VOCAB
