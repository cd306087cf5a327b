"""Where models come from: directories, GGUF files, hub ids, and what is wrong with them."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, build_model, make_tokenizer, save_model, token_ids
from transformers import AutoTokenizer

import matgptq
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.errors import SourceError, UnsupportedModelError
from matgptq.files.json_files import read_json
from matgptq.files.stored_tensors import DTYPE_BITS, read_header, read_headers, read_tensor
from matgptq.inference.nested_linear import nested_layers
from matgptq.models.kept_tensors import find_kept, read_kept
from matgptq.models.model_config import attention_options
from matgptq.models.source import open_source

INDEX = "model.safetensors.index.json"


def quantize(source: Path, out: Path, **options):
    return matgptq.quantize(source, out, dataset=token_ids(), group_size=32, **options)


def logits(model):
    with torch.no_grad():
        return model(token_ids(2, 12, seed=9)).logits


@pytest.fixture
def source(make_checkpoint, tmp_path) -> Path:
    """A private copy, to be damaged at will."""
    return shutil.copytree(make_checkpoint("llama")[0], tmp_path / "source")


def refused(source: Path, out: Path, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize(source, out)
    assert not out.exists()
    assert not list(out.parent.glob(".*"))


# --- damaged directories ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_that_are_not_finite_are_named(name, value, source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, tmp_path / "out", SourceError, f"tensor {name} holds NaN or Inf")


def test_a_missing_tensor_is_named(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, tmp_path / "out", SourceError, r"hold no model\.layers\.0\.mlp\.up_proj\.weight \(1 ")


def test_a_tensor_of_another_shape_is_refused(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(63)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(source, tmp_path / "out", SourceError, r"model\.norm\.weight is \[63\], the model wants \[64\]")


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(share, source, tmp_path):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    refused(source, tmp_path / "out", SourceError, r"source/model\.safetensors: truncated or not a safetensors file")


def test_missing_and_truncated_shards_are_named(tmp_path):
    source = save_model("llama", tmp_path / "source", max_shard_size="60KB")
    shards = sorted(source.glob("model-*.safetensors"))
    last = shards[-1].read_bytes()
    shards[-1].write_bytes(last[:-10])
    refused(source, tmp_path / "out", SourceError, f"{shards[-1].name}: truncated")
    shards[-1].unlink()
    refused(source, tmp_path / "out", SourceError, f"{shards[-1].name}: file is missing")
    shutil.copyfile(shards[0], shards[-1])
    refused(source, tmp_path / "out", SourceError, rf"{shards[-1].name}: tensor .* of {INDEX} is not in it")


def test_directories_that_are_no_models(source, tmp_path):
    (source / "model.safetensors").unlink()
    refused(source, tmp_path / "out", SourceError, "neither model.safetensors nor model.safetensors.index.json")
    (source / "config.json").write_text("[]")
    refused(source, tmp_path / "out", SourceError, "config.json: not a JSON object")
    (source / "config.json").unlink()
    refused(source, tmp_path / "out", SourceError, "source: no config.json")
    refused(source / "LICENSE", tmp_path / "out", SourceError, "LICENSE: give a model directory, a .gguf file or a hub")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_a_pickled_model_is_refused(name, source, tmp_path):
    (source / "model.safetensors").unlink()
    torch.save({}, source / name)
    refused(source, tmp_path / "out", SourceError, f"{name} is a pickle, which can run code; convert")


def test_a_pickle_beside_safetensors_is_not_touched(source, tmp_path):
    (source / "pytorch_model.bin").write_bytes(b"not even a pickle")
    quantize(source, tmp_path / "out", method="rtn")
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


@pytest.mark.parametrize("method", ["gptq", "matgptq", None])
def test_a_quantized_model_is_refused(method, source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"bits": 4, **({"quant_method": method} if method else {})}
    (source / "config.json").write_text(json.dumps(config))
    refused(source, tmp_path / "out", UnsupportedModelError, f"already quantized with {method or 'an unnamed method'}")


@pytest.mark.parametrize("record", ["x", [1], 3])
def test_quantized_in_a_way_that_no_one_knows(record, source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": record}))
    refused(source, tmp_path / "out", UnsupportedModelError, "already quantized with an unnamed method")


def test_a_layer_that_no_group_size_fits_is_refused_by_name(tmp_path):
    build_model("llama", intermediate_size=100).save_pretrained(tmp_path / "source")
    refused(
        tmp_path / "source",
        tmp_path / "out",
        UnsupportedModelError,
        r"model\.layers\.0\.mlp\.down_proj: 100 input features .*--ignore model\.layers\.0\.mlp\.down_proj",
    )


def test_a_stored_head_of_a_tied_model_is_carried_along(make_checkpoint, tmp_path):
    """Some files hold the head although it is tied; it is a tensor like any other."""
    source = shutil.copytree(make_checkpoint("llama-tied")[0], tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantize(source, tmp_path / "out", method="rtn")
    model = matgptq.load(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" in read_headers(tmp_path / "out")


def test_buffers_of_old_files_are_dropped(make_checkpoint, tmp_path):
    source = shutil.copytree(make_checkpoint("gpt_neox")[0], tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for leaf in ("rotary_emb.inv_freq", "masked_bias", "bias"):
        tensors[f"gpt_neox.layers.0.attention.{leaf}"] = torch.ones(4)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    quantize(source, tmp_path / "out", method="rtn")
    assert not [name for name in read_headers(tmp_path / "out") if name.endswith(("inv_freq", "attention.bias"))]


def test_no_tokenizer(source, tmp_path):
    for file in source.glob("token*"):
        file.unlink()
    with pytest.raises(SourceError, match="source: no tokenizer can be loaded from it"):
        open_source(source).load_tokenizer()
    quantize(source, tmp_path / "out")  # token ids need none


# --- headers ----------------------------------------------------------------------------------------------------------


def test_headers_tell_what_the_tensors_are(tmp_path):
    tensors = {
        str(dtype): torch.zeros(3, 5, dtype=dtype)
        for dtype in (torch.uint8, torch.int8, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.int64)
    }
    save_file({**tensors, "empty": torch.empty(0), "scalar": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    headers = read_header(tmp_path / "a.safetensors")
    assert set(headers) == {*tensors, "empty", "scalar"}
    for name, tensor in tensors.items():
        assert headers[name].shape == (3, 5)
        assert headers[name].bytes == tensor.numel() * tensor.element_size()
        assert headers[name].dtype in DTYPE_BITS
        assert torch.equal(read_tensor(headers[name]), tensor)
    assert headers["empty"].bytes == 0
    assert headers["scalar"].bytes == 4
    with pytest.raises(SourceError, match=r"nothing\.json: cannot be read as JSON"):
        read_json(tmp_path / "nothing.json")


def test_the_index_decides_which_shard_is_read(tmp_path):
    """A tensor that stands in two shards is the one that the index names; a stray file is not read."""
    for name, value in (("a", 1.0), ("b", 2.0), ("stray", 3.0)):
        save_file({"x": torch.tensor([value]), name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"x": "b.safetensors", "a": "a.safetensors", "b": "b.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    headers = read_headers(tmp_path)
    assert set(headers) == {"a", "b", "x"}
    assert read_tensor(headers["x"]).item() == 2.0


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_a_hub_id_is_downloaded(make_checkpoint, tmp_path, monkeypatch):
    import huggingface_hub

    source, _ = make_checkpoint("llama")
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    opened = open_source("someone/some-model")
    assert opened.name == "someone/some-model"
    assert opened.directory == source
    (name, patterns), *_ = asked
    assert name == "someone/some-model"
    assert not {"*", "*.bin", "*.pth", "*.gguf"} & set(patterns)
    quantize("someone/some-model", tmp_path / "out", method="rtn")
    assert open_checkpoint(tmp_path / "out").settings.source == "someone/some-model"


def test_hub_errors_are_source_errors(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    with pytest.raises(SourceError, match=r"not/a/hub/id: no such directory or file, and not a hub id"):
        open_source("not/a/hub/id")
    for error in (LocalEntryNotFoundError("offline"), ConnectionError("no route"), OSError("no space")):

        def download(name, allow_patterns, error=error):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(
            SourceError, match=f"a/b: no such directory or file, and the hub did not give it: .*{error}"
        ):
            open_source("a/b")


# --- GGUF -------------------------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def write_gguf(file: Path, name: str, spoil: str | None = None):
    """A llama in float16 as llama.cpp's converter writes it; returns the model."""
    gguf = pytest.importorskip("gguf")
    model = build_model(name)
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    tokens = [f"<t{i}>" for i in range(VOCAB)]
    for token, i in make_tokenizer().get_vocab().items():
        tokens[i] = token
    tokens[260:262] = ["he", "el"]  # a tokenizer with fewer than two merges cannot be read back
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["h e", "e l"])
    writer.add_token_types([1] * len(tokens))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.clone()
        if key == spoil:
            array.view(-1)[3] = torch.nan
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        if heads:  # llama.cpp's rotary embedding pairs neighbouring rows
            array = array.view(heads, 2, -1, array.shape[1]).transpose(1, 2).reshape(array.shape)
        module = key.removesuffix(".weight")
        if module.startswith("model.layers."):
            _, _, block, module = module.split(".", 3)
            target = f"blk.{block}.{GGUF_NAMES[module]}.weight"
        else:
            target = f"{GGUF_NAMES[module]}.weight"
        writer.add_tensor(target, (array if array.dim() == 1 else array.half()).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_gguf_end_to_end(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MATGPTQ_KERNEL", "reference")  # logits are compared bit for bit
    model = write_gguf(tmp_path / "model.gguf", name)
    network = open_source(tmp_path / "model.gguf").load_model(torch.float32)
    torch.testing.assert_close(logits(network), logits(model), atol=0.05, rtol=0)  # float16 weights
    quantize(tmp_path / "model.gguf", tmp_path / "out")
    loaded = matgptq.load(tmp_path / "out", bits=3)
    for key, layer in nested_layers(loaded).items():
        network.get_submodule(key).weight.data = layer.dequantize()
    for key, parameter in loaded.named_parameters():
        if key.endswith("layernorm.weight"):  # scaled
            network.get_parameter(key).data = parameter.data
    assert torch.equal(logits(loaded), logits(network))
    headers = read_headers(tmp_path / "out")
    assert headers["model.embed_tokens.weight"].dtype == "F16"
    assert headers["model.norm.weight"].dtype == "F32"
    heads = [key for key in headers if key.startswith("lm_head")]
    assert heads == ([] if name == "llama-tied" else ["lm_head.weight"])
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (name == "llama-tied")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["quant_method"] == "matgptq"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("hello there")["input_ids"]) == "hello there"
    assert {"tokenizer.json", "generation_config.json"} <= {file.name for file in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.0, 0.5, 2.0**127], torch.bfloat16),  # nothing is rounded where nothing need be
        ([1.0009765625, 0.5, 60000.0], torch.float16),
        ([1 / 3, 1e-3, 60000.0], torch.float16),
        ([1 / 3, 1e-3, 70000.0], torch.float32),
    ],
)
def test_matrices_of_a_gguf_file_take_16_bits_where_these_hold_them(values, dtype, tmp_path):
    write_gguf(tmp_path / "model.gguf", "llama")
    source = open_source(tmp_path / "model.gguf")
    network = source.load_model(torch.float32)
    expected = torch.tensor(values)
    network.model.embed_tokens.weight.data = expected.view(1, 3)
    kept = find_kept(source, network, [], frozenset(), frozenset())
    stored = dict(read_kept(source, network, kept.ends))
    assert stored["model.embed_tokens.weight"].dtype == dtype
    assert torch.allclose(stored["model.embed_tokens.weight"].float(), expected, rtol=2**-11)
    assert stored["model.norm.weight"].dtype == torch.float32


def test_gguf_is_unpacked_also_where_transformers_has_kernels_for_it(tmp_path, monkeypatch):
    """Packed layers are no Linear, and could not be quantized."""
    real, seen = transformers.AutoModelForCausalLM.from_pretrained, []

    def load(*arguments, **options):
        seen.append(options)
        return real(*arguments, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    write_gguf(tmp_path / "model.gguf", "llama")
    network = open_source(tmp_path / "model.gguf").load_model(torch.float32)
    assert not hasattr(transformers, "GgufConfig") or seen[0]["quantization_config"].dequantize
    assert type(network.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_bounded_attention_is_computed_by_what_bounds_it():
    """Some versions of transformers choose an attention for Gemma 2 that leaves the bound out."""
    for name, wanted in (("gemma2", {"attn_implementation": "eager"}), ("gemma3_text", {}), ("llama", {})):
        assert attention_options(build_model(name).config.to_dict()) == wanted


def test_a_directory_with_one_gguf_file_is_that_file(tmp_path):
    write_gguf(tmp_path / "model.gguf", "llama")
    opened = open_source(tmp_path)
    assert opened.gguf_file == "model.gguf"
    assert opened.side_files() == {}
    shutil.copyfile(tmp_path / "model.gguf", tmp_path / "other.gguf")
    with pytest.raises(SourceError, match=r"several .gguf files, name one of them: model.gguf, other.gguf"):
        open_source(tmp_path)
    assert open_source(tmp_path / "other.gguf").gguf_file == "other.gguf"


def test_gguf_with_nan_is_named(tmp_path):
    write_gguf(tmp_path / "model.gguf", "llama", spoil="model.layers.1.mlp.gate_proj.weight")
    refused(
        tmp_path / "model.gguf", tmp_path / "out", SourceError, r"model\.layers\.1\.mlp\.gate_proj\.weight holds NaN"
    )


@pytest.mark.parametrize("share", [0.2, 0.95])
def test_a_truncated_gguf_is_refused(share, tmp_path):
    write_gguf(tmp_path / "model.gguf", "llama")
    file = tmp_path / "model.gguf"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    refused(file, tmp_path / "out", SourceError, r"model\.gguf: transformers cannot load it")


def test_what_is_not_gguf_is_refused(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGML....")
    with pytest.raises(SourceError, match=r"model.gguf: not a GGUF file"):
        open_source(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF....")
    real = builtins.__import__

    def without_gguf(name, *arguments, **options):
        if name == "gguf":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    with pytest.raises(SourceError, match=r'needs the gguf package: pip install "matgptq\[gguf\]"'):
        open_source(tmp_path / "model.gguf")


def test_chat_templates_beyond_the_first_go_along(tmp_path, make_checkpoint):
    source = shutil.copytree(make_checkpoint("llama")[0], tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}")
    matgptq.quantize(source, tmp_path / "out", method="rtn", group_size=32)
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "out" / "original").exists()


def test_gguf_is_loaded_quickly_as_transformers_loads_it(tmp_path):
    gguf = pytest.importorskip("gguf")
    write_gguf(tmp_path / "model.gguf", "llama")
    originals = gguf.GGUFReader, gguf.get_tensor_name_map
    source = open_source(tmp_path / "model.gguf")
    ours = source.load_model(torch.float32).state_dict()
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == originals
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert ours.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert source.load_tokenizer().get_vocab() == tokenizer.get_vocab()
