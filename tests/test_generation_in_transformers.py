"""transformers' own ways of loading and generating, against a plain model with the slice's weights written out."""

from __future__ import annotations

import warnings
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, TextStreamer, pipeline

import matgptq
from matgptq import native
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.errors import ConfigurationError
from matgptq.inference.nested_linear import nested_layers

BITS = 3
NEW = {"max_new_tokens": 8, "min_new_tokens": 8}
PROMPTS = ["hello there, you", "hi", "a b c d"]


@pytest.fixture(autouse=True, scope="module")
def exact_products():
    """Sequences are compared: every product is made the one way that defines it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MATGPTQ_KERNEL", "reference")
        yield


@pytest.fixture(scope="module")
def source(make_checkpoint) -> Path:
    return make_checkpoint("llama")[0]


@pytest.fixture(scope="module")
def out(make_checkpoint) -> Path:
    return make_checkpoint("llama")[1]


@pytest.fixture(scope="module")
def model(out):
    """As users of transformers load it."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    model.set_bits(BITS)
    return model


@pytest.fixture(scope="module")
def plain(source, model):
    """The same function without any code of ours."""
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, layer in nested_layers(model).items():
        plain.get_submodule(name).weight.data = layer.dequantize()
    return plain


@pytest.fixture(scope="module")
def tokenizer(out):
    tokenizer = AutoTokenizer.from_pretrained(out, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids(2, 12, seed=9)).logits


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"num_beams": 3},
        {"num_beams": 4, "do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
    ],
    ids=lambda options: "-".join(options),
)
def test_ways_of_generating(model, plain, tokenizer, options) -> None:
    texts = PROMPTS[:1] if "prompt_lookup_num_tokens" in options else PROMPTS
    prompts = tokenizer(texts, return_tensors="pt", padding=True)
    sequences = []
    for each in (model, plain):
        torch.manual_seed(0)
        sequences.append(each.generate(**prompts, **NEW, **options))
    assert torch.equal(*sequences)
    assert len(sequences[0]) == len(texts) * options.get("num_return_sequences", 1)


def test_a_batch_with_padding_says_what_each_prompt_says_alone(model, tokenizer) -> None:
    both = model.generate(**tokenizer(PROMPTS, return_tensors="pt", padding=True), do_sample=False, **NEW)
    for prompt, row in zip(PROMPTS, both, strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, **NEW)
        assert torch.equal(row[-8:], alone[0, -8:])


def test_streaming(model, tokenizer, capsys) -> None:
    prompt = tokenizer(PROMPTS[0], return_tensors="pt")
    whole = tokenizer.decode(model.generate(**prompt, do_sample=False, **NEW)[0])
    model.generate(**prompt, do_sample=False, streamer=TextStreamer(tokenizer), **NEW)
    assert capsys.readouterr().out == whole + "\n"
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    thread = Thread(target=model.generate, kwargs={**prompt, "do_sample": False, "streamer": streamer, **NEW})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == whole
    assert len(pieces) > 1


def test_pipelines(out, model, plain, tokenizer) -> None:
    options = {"do_sample": False, **NEW}
    expected = pipeline("text-generation", model=plain, tokenizer=tokenizer, batch_size=2)(PROMPTS, **options)
    assert pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)(PROMPTS, **options) == expected
    by_path = pipeline("text-generation", model=str(out), dtype=torch.float32, device_map="auto")
    by_path.model.set_bits(BITS)
    assert by_path(PROMPTS[0], **options) == expected[0]
    chat = by_path([{"role": "user", "content": PROMPTS[0]}], **options)
    assert chat[0]["generated_text"][-1]["role"] == "assistant"


PARTS = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
         "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"device_map": PARTS},
        {"device_map": "auto", "max_memory": {"cpu": "60KB"}},
    ],
    ids=["cpu", "auto", "root", "parts", "little-memory"],
)
def test_device_maps(out, model, tmp_path, options) -> None:
    """Layers that lie on the disk are read when they are needed, and change width like the others."""
    mapped = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, offload_folder=tmp_path, **options)
    on_disk = "disk" in getattr(mapped, "hf_device_map", {}).values()
    assert on_disk == (options["device_map"] == PARTS or "max_memory" in options)
    full = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(logits(mapped), logits(full))
    mapped.set_bits(BITS)
    assert torch.equal(logits(mapped), logits(model))
    prompt = token_ids(1, 5)
    assert torch.equal(mapped.generate(prompt, do_sample=False, **NEW), model.generate(prompt, do_sample=False, **NEW))


def test_saving_with_layers_on_the_disk(out, tmp_path) -> None:
    mapped = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.bfloat16, device_map=PARTS, offload_folder=tmp_path / "offload"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that memory must hold a shard
        mapped.save_pretrained(tmp_path / "again")
    old, new = (load_file(path / "model.safetensors") for path in (out, tmp_path / "again"))
    assert set(new) == set(old)
    assert all(torch.equal(new[key], old[key].to(new[key].dtype)) for key in old)
    assert open_checkpoint(tmp_path / "again").settings == open_checkpoint(out).settings


needs_native = pytest.mark.skipif(not native.available(), reason=f"no native library: {native.reason()}")


@needs_native
@pytest.mark.parametrize("shard_size", ["50GB", "40KB"])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("options", [{}, {"head_bits": 4}, {"activations": "int8"}], ids=str)
def test_packed_models_are_saved_whole(make_checkpoint, tmp_path, monkeypatch, name, options, shard_size) -> None:
    """Neither packed codes nor a head of few bits change what is stored."""
    monkeypatch.delenv("MATGPTQ_KERNEL")
    out = make_checkpoint(name)[1]
    model = matgptq.load(out, dtype=torch.bfloat16, **options)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_size == "40KB")
    old = load_file(out / "model.safetensors")
    new = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert set(new) == set(old)
    assert all(torch.equal(new[key], old[key].to(new[key].dtype)) for key in old)
    assert open_checkpoint(tmp_path).settings == open_checkpoint(out).settings
    assert torch.equal(logits(matgptq.load(tmp_path, dtype=torch.bfloat16, **options)), logits(model))


@needs_native
def test_a_slice_alone_cannot_be_saved(out, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("MATGPTQ_KERNEL")
    model = matgptq.load(out, bits=4, resident=False)
    with pytest.raises(ConfigurationError, match="resident=True"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()
