"""Every model family end to end: quantize, write, load, and compare with the same weights put in by hand."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import GROUP_SIZE, MODELS, blocks_of, build_model, save_model, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import matgptq
from matgptq.calibration.block_hessians import collect_hessians
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.core.grid import storable_scales
from matgptq.errors import ConfigurationError, SourceError, UnsupportedModelError
from matgptq.files.stored_tensors import read_headers, read_tensor
from matgptq.files.tensor_names import match_names
from matgptq.inference.nested_linear import NestedLinear, nested_layers
from matgptq.models.blocks import capture_inputs, find_blocks, propagate
from matgptq.models.families import FAMILIES, find_family
from matgptq.slicing import WIDTHS

FORMAT_LEAVES = ("codes", *(f"scales_{bits}" for bits in range(2, 9)))
QUANTIZED_LAYERS = {
    "phi3": 8,
    "gpt_neox": 8,
    "opt": 12,
    "mixtral": 2 * (4 + 4 * 3),
    "qwen3_moe": 7 + 4 + 6 * 3,
    "qwen2_moe": 2 * (4 + 3 + 4 * 3),
    "olmoe": 2 * (4 + 4 * 3),
}


@pytest.fixture(autouse=True, scope="module")
def exact_products():
    """Logits are compared bit for bit: every product is made the one way that defines it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MATGPTQ_KERNEL", "reference")
        yield


def logits(model, ids=None):
    with torch.no_grad():
        return model(token_ids(2, 12, seed=9) if ids is None else ids).logits


def load_source(source: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()


def put_in_by_hand(model, checkpoint: Path, bits) -> None:
    """The slice's weights from the tensors on disk, by the formula of the format, into an ordinary model."""
    tensors = read_headers(checkpoint)
    settings = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    for key, info in tensors.items():
        layer, _, leaf = key.rpartition(".")
        if leaf != "codes":
            continue
        width = bits[layer] if isinstance(bits, dict) else bits
        scales = f"{layer}.scales_{settings['scale_source'][str(width)]}"
        q = read_tensor(info).to(torch.float64)
        s = read_tensor(tensors[scales]).to(torch.float64)
        step = 2 ** (8 - width)
        u = torch.clamp(torch.floor(q / step + 0.5), max=2**width - 1)
        weight = (u * step - 128) * s.repeat_interleave(q.shape[1] // s.shape[1], dim=1)
        target = model.get_submodule(layer).weight
        assert target.shape == weight.shape
        target.data = weight.to(target.dtype)


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    return {name: read_tensor(info) for name, info in read_headers(directory).items()}


@pytest.mark.parametrize("name", MODELS)
def test_loaded_slices_equal_the_source_with_dequantized_weights(name, make_checkpoint):
    source, out = make_checkpoint(name)
    original = load_source(source)
    expected_original = logits(original)
    assert expected_original.std() > 0.3  # flat logits would hide a wrong weight
    seen = []
    for bits in WIDTHS:
        loaded = matgptq.load(out, bits=bits)
        reference = copy.deepcopy(original)
        blocks_of(reference)
        put_in_by_hand(reference, out, bits)
        got = logits(loaded)
        assert torch.equal(got, logits(reference)), bits
        seen.append(got)
    assert len(nested_layers(loaded)) == QUANTIZED_LAYERS.get(name, 14)
    for i, one in enumerate(seen):
        assert all(not torch.equal(one, other) for other in seen[:i])
    errors = [(got - expected_original).norm() / expected_original.norm() for got in seen]
    assert errors[-1] < 0.35  # few calibration tokens, but it is still the same model
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_quantized_is_kept_bit_for_bit(name, make_checkpoint):
    """The source is bfloat16, the run was float32."""
    source, out = make_checkpoint(name)
    before, after = read_all(source), read_all(out)
    layers = {key.removesuffix(".codes") for key in after if key.endswith(".codes")}
    own = {f"{layer}.{leaf}" for layer in layers for leaf in (*FORMAT_LEAVES, "weight")}
    # By the model's names: some families' files, old ones and those that transformers writes, name parts differently.
    model = build_model(name)
    before = {match_names(model, before).get(key, key): tensor for key, tensor in before.items()}
    kept = {match_names(model, set(after) - own).get(key, key): after[key] for key in set(after) - own}
    assert set(kept) == set(before) - {f"{layer}.weight" for layer in layers}
    for key, tensor in kept.items():
        assert tensor.dtype == before[key].dtype == torch.bfloat16
        assert torch.equal(tensor.view(torch.int16), before[key].view(torch.int16)), key
    for layer in layers:
        rows, columns = before[f"{layer}.weight"].shape
        assert after[f"{layer}.codes"].dtype == torch.uint8
        assert after[f"{layer}.codes"].shape == (rows, columns)
        assert after[f"{layer}.weight"].numel() == 0
        group_size = GROUP_SIZE if columns % GROUP_SIZE == 0 else 32
        for leaf in FORMAT_LEAVES[1:]:
            scales = after[f"{layer}.{leaf}"]
            assert scales.dtype == torch.float16
            assert scales.shape == (rows, columns // group_size)
            assert torch.equal(scales.float(), storable_scales(scales))
            assert torch.equal(scales.to(torch.bfloat16).to(torch.float16), scales)
    assert layers == {layer for block in blocks_of(build_model(name)) for layer, _ in block.layers()}


@pytest.mark.parametrize("name", ["llama-tied", "llama", "gpt_neox"])
def test_side_files_and_config_are_carried_over(name, make_checkpoint):
    source, out = make_checkpoint(name)
    weights = {"model.safetensors", "config.json"}
    names = {file.name for file in source.iterdir()} - weights
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"} <= names
    assert {file.name for file in out.iterdir()} == names | weights | {"report.json", "log.jsonl", "checksums.json"}
    for file in names:
        assert (out / file).read_bytes() == (source / file).read_bytes()
    before = json.loads((source / "config.json").read_text())
    after = json.loads((out / "config.json").read_text())
    record = after.pop("quantization_config")
    assert after == before
    assert record["quant_method"] == "matgptq"
    assert record["ignore"] == ["lm_head"]
    down = {key for key, size in record["layer_group_sizes"].items() if size == 32}
    assert down == set(record["layer_group_sizes"])
    assert len(down) == 2  # 96 input features in each block's last layer


@pytest.mark.parametrize("name", MODELS)
def test_ties_survive(name, make_checkpoint):
    source, out = make_checkpoint(name)
    original, loaded = load_source(source), matgptq.load(out)

    def tied(model):
        return model.get_input_embeddings().weight is model.get_output_embeddings().weight

    assert tied(loaded) == tied(original)
    assert tied(original) == (
        name in ("llama-tied", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "gemma3", "opt")
    )
    heads = [key for key in read_headers(out) if key.startswith(("lm_head", "embed_out"))]
    assert len(heads) == (0 if tied(original) else 1)
    assert not isinstance(loaded.get_output_embeddings(), NestedLinear)


@pytest.mark.parametrize("name", ["qwen2", "llama-biased", "opt", "gpt_neox"])
def test_biases_are_kept(name, make_checkpoint):
    source, out = make_checkpoint(name)
    original, loaded = load_source(source), matgptq.load(out, bits=2)
    biased = 0
    for key, layer in nested_layers(loaded).items():
        bias = original.get_submodule(key).bias
        assert (layer.bias is None) == (bias is None)
        if bias is not None:
            biased += 1
            assert bias.abs().max() > 0
            assert torch.equal(layer.bias, bias)
    assert biased == {"qwen2": 6, "llama-biased": 14, "opt": 12, "gpt_neox": 8}[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["qwen2", "gpt_neox"])
def test_other_run_and_load_dtypes(name, dtype, make_checkpoint):
    source, out = make_checkpoint(name)
    loaded = matgptq.load(out, bits=4, dtype=dtype)
    reference = load_source(source, dtype)
    put_in_by_hand(reference, out, 4)
    assert logits(loaded).dtype == dtype
    assert torch.equal(logits(loaded), logits(reference))
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


@pytest.mark.parametrize("run_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.float16], ids=str)
def test_source_dtype_does_not_depend_on_the_run_dtype(source_dtype, run_dtype, tmp_path):
    source = save_model("qwen3", tmp_path / "source", source_dtype)
    matgptq.quantize(
        source, tmp_path / "out", dataset=token_ids(), group_size=32, bits=[4, 8], dtype=run_dtype, channel_scaling=0.0
    )
    before, after = read_all(source), read_all(tmp_path / "out")
    kept = [key for key in after if key in before and after[key].numel()]
    assert len(kept) == 2 + 4 * 2  # embedding, last norm, and four norms in each block
    for key in kept:
        assert after[key].dtype == source_dtype
        assert torch.equal(after[key], before[key])


@pytest.mark.parametrize("group_size", [-1, 8, 32, 128])
@pytest.mark.parametrize("method", ["matgptq", "paper", "rtn"])
def test_methods_and_group_sizes_round_trip(method, group_size, make_checkpoint, tmp_path):
    source, _ = make_checkpoint("llama")
    options = {"channel_scaling": 0.0, "group_size": group_size}
    matgptq.quantize(source, tmp_path / "out", method=method, dataset=token_ids(), **options)
    opened = open_checkpoint(tmp_path / "out")
    assert opened.settings.group_size == group_size
    for key, layer in opened.layers.items():
        allowed = {-1: layer.in_features, 8: 8, 32: 32, 128: 64 if layer.in_features == 64 else 32}
        assert layer.group_size == allowed[group_size], key
    assert opened.settings.scale_bits == ((2, 3, 4, 5, 6, 7, 8) if method == "matgptq" else (8,))
    original = load_source(source)
    for bits in (2, 5, 8):
        reference = copy.deepcopy(original)
        put_in_by_hand(reference, tmp_path / "out", bits)
        assert torch.equal(logits(matgptq.load(tmp_path / "out", bits=bits)), logits(reference))


def test_one_width_by_gptq_serves_that_width_by_default(make_checkpoint, tmp_path):
    source, _ = make_checkpoint("llama")
    matgptq.quantize(source, tmp_path / "out", method="gptq", bits=[3], group_size=32, dataset=token_ids())
    loaded = matgptq.load(tmp_path / "out")
    assert {layer.bits for layer in nested_layers(loaded).values()} == {3}
    reference = load_source(source)
    put_in_by_hand(reference, tmp_path / "out", 3)
    assert torch.equal(logits(loaded), logits(reference))


def test_ignored_layers_stay_as_they_are(make_checkpoint, tmp_path):
    source, _ = make_checkpoint("llama")
    ignore = ["*.down_proj", "model.layers.1.self_attn.q_proj"]
    matgptq.quantize(source, tmp_path / "out", group_size=32, dataset=token_ids(), ignore=ignore, channel_scaling=0.0)
    expected = {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"}
    assert set(open_checkpoint(tmp_path / "out").settings.ignore) == {*expected, "lm_head"}
    before, after = read_all(source), read_all(tmp_path / "out")
    for layer in expected:
        assert torch.equal(after[f"{layer}.weight"], before[f"{layer}.weight"])
        assert f"{layer}.codes" not in after
    loaded = matgptq.load(tmp_path / "out", bits=3)
    assert all(type(loaded.get_submodule(layer)) is nn.Linear for layer in expected)
    reference = load_source(source)
    put_in_by_hand(reference, tmp_path / "out", 3)
    assert torch.equal(logits(loaded), logits(reference))


def test_ignoring_everything_is_refused(make_checkpoint, tmp_path):
    with pytest.raises(ConfigurationError, match="leaves no layer"):
        matgptq.quantize(make_checkpoint("llama")[0], tmp_path / "out", ignore=["*"], dataset=token_ids())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", MODELS)
def test_blocks_run_one_by_one_as_in_the_model(name, float32_products):
    """Capture and propagation: hidden states after each block, and the Hessian of every layer."""
    model = build_model(name)
    blocks = blocks_of(model)
    windows = token_ids(3, 16)
    outputs: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(blocks))}
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []
    for index, block in enumerate(blocks):
        keep = outputs[index].append
        handles.append(
            block.module.register_forward_hook(lambda *a, keep=keep: keep(a[2][0] if isinstance(a[2], tuple) else a[2]))
        )
        for key, layer in block.layers():
            rows = seen.setdefault(key, [])
            handles.append(layer.register_forward_pre_hook(lambda _, x, rows=rows: rows.append(x[0].flatten(0, -2))))
    with torch.no_grad():
        for window in windows:
            model(window.unsqueeze(0))
    for handle in handles:
        handle.remove()

    inputs = capture_inputs(model, blocks, windows)
    assert "forward" not in vars(blocks[0].module)
    for index, block in enumerate(blocks):
        hessians = collect_hessians(block, [inputs], index, lambda: None).matrices
        for group, hessian in zip(block.inputs, hessians, strict=True):
            if block.experts is not None and group[0][0].startswith(block.experts):
                continue  # they see some of the tokens: tests/test_experts.py
            for path, _ in group:  # all of them, not only the first: they must share their input
                x = torch.cat(seen[f"{block.name}.{path}"]).double()
                torch.testing.assert_close(hessian.double(), 2 * x.T @ x / len(x), rtol=1e-4, atol=1e-4)
        propagate(block, [inputs], index, lambda: None)
        for hidden, expected in zip(inputs.hidden, outputs[index], strict=True):
            assert torch.equal(hidden, expected)


def test_every_family_of_the_table_is_tested():
    assert {kind for family in FAMILIES for kind in family.model_types} == {kind for kind, _ in MODELS.values()}


def test_an_unknown_family_is_refused_by_name(tmp_path):
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match="'gpt2' is not known; supported: gemma, "):
        matgptq.quantize(tmp_path / "source", tmp_path / "out", dataset=token_ids())
    assert not (tmp_path / "out").exists()


def test_an_unknown_family_is_refused_before_its_weights_are_read(tmp_path, monkeypatch):
    source = save_model("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "gpt_oss"}))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("was loaded"))
    with pytest.raises(UnsupportedModelError, match="gpt_oss"):
        matgptq.quantize(source, tmp_path / "out", dataset=token_ids())


def test_a_linear_that_the_table_does_not_know_is_refused():
    model = build_model("llama")
    model.model.layers[1].mlp.adapter = nn.Linear(64, 64)
    with pytest.raises(UnsupportedModelError, match=r"block model\.layers\.1 has a Linear mlp\.adapter"):
        find_blocks(model, find_family("llama"))


def test_a_missing_linear_is_refused():
    model = build_model("llama")
    model.model.layers[0].mlp.up_proj = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"block model\.layers\.0 has no Linear mlp\.up_proj"):
        find_blocks(model, find_family("llama"))


@pytest.mark.parametrize("strip", [True, False], ids=["without-prefix", "doubled-names"])
def test_names_without_the_base_model_prefix(strip, make_checkpoint, tmp_path):
    """Files of a base model lack ``model.``; a file with both names is ambiguous."""
    source, expected = make_checkpoint("llama-tied")
    tensors = read_all(source)
    other = tmp_path / "source"
    other.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (other / file.name).write_bytes(file.read_bytes())
    renamed = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    doubled = {**tensors, "norm.weight": tensors["model.norm.weight"].clone()}
    save_file(renamed if strip else doubled, other / "model.safetensors")
    if not strip:
        with pytest.raises(SourceError, match=r"norm\.weight has no place"):
            matgptq.quantize(other, tmp_path / "out", dataset=token_ids(), group_size=GROUP_SIZE)
        return
    matgptq.quantize(other, tmp_path / "out", dataset=token_ids(), group_size=GROUP_SIZE, channel_scaling=0.0)
    got, wanted = read_all(tmp_path / "out"), read_all(expected)
    assert set(got) == set(wanted)
    assert all(torch.equal(got[key], wanted[key]) for key in got)


def test_a_tensor_without_a_place_is_refused(make_checkpoint, tmp_path):
    source = shutil.copytree(make_checkpoint("llama")[0], tmp_path / "source")
    tensors = {**read_all(source), "model.mtp.weight": torch.zeros(2)}
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(SourceError, match=r"model\.mtp\.weight has no place in LlamaForCausalLM"):
        matgptq.quantize(source, tmp_path / "out", dataset=token_ids())


def test_the_head_of_gpt_neox_keeps_its_stored_name(make_checkpoint):
    _, out = make_checkpoint("gpt_neox")
    with safe_open(out / "model.safetensors", "pt") as file:
        assert "embed_out.weight" in file.keys()  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
