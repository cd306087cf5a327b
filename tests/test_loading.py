"""Loading at any width, by matgptq.load and by transformers, and what happens without matgptq."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_model, token_ids
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import matgptq
from matgptq import native
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.errors import AllocationError, CheckpointError, ConfigurationError, SourceError
from matgptq.inference.nested_linear import NestedLinear, nested_layers, set_bits
from matgptq.slicing import WIDTHS

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(autouse=True, scope="module")
def exact_products():
    """Logits are compared bit for bit: every product is made the one way that defines it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MATGPTQ_KERNEL", "reference")
        yield


def logits(model):
    with torch.no_grad():
        return model(token_ids(2, 12, seed=9)).logits


def widths(model):
    return {layer.bits for layer in nested_layers(model).values()}


@pytest.fixture(scope="module")
def out(make_checkpoint):
    return make_checkpoint("llama")[1]


@pytest.fixture(scope="module")
def expected(out):
    """Logits at every width, each from a load of its own."""
    return {bits: logits(matgptq.load(out, bits=bits)) for bits in WIDTHS}


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True, text=True
    )


# --- the width --------------------------------------------------------------------------------------------------------


def test_the_default_width_is_the_one_in_config_json(checkpoint, expected):
    assert widths(matgptq.load(checkpoint)) == {8}
    file = checkpoint / "config.json"
    text, count = re.subn(r'^    "bits": 8,$', '    "bits": 3,', file.read_text(), flags=re.M)
    assert count == 1  # nothing else names it
    file.write_text(text)
    for load in (matgptq.load, AutoModelForCausalLM.from_pretrained):
        model = load(checkpoint)
        assert widths(model) == {3}
        assert torch.equal(logits(model), expected[3]) == (load is matgptq.load)  # the other one is bfloat16
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)), expected[3])
    assert torch.equal(logits(matgptq.load(checkpoint, bits=5)), expected[5])  # an argument wins


def test_bits_are_checked(out):
    for bits in (1, 9, True, 4.0, "4"):
        with pytest.raises(ConfigurationError, match="bits must be an integer from 2 to 8"):
            matgptq.load(out, bits=bits)


def test_a_kernel_that_there_is_not_is_refused_before_loading(out, monkeypatch):
    monkeypatch.setenv("MATGPTQ_KERNEL", "fastest")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("was loaded"))
    with pytest.raises(ConfigurationError, match="no kernel 'fastest'; there are native-fused, "):
        matgptq.load(out)


@pytest.mark.parametrize("source", ["mapping", "json", "json-layers", "lines"])
def test_allocations(source, out, expected, tmp_path):
    allocation = {Q: 2, DOWN: 6}
    file = tmp_path / "allocation"
    if source == "json":
        file.write_text(json.dumps(allocation))
    elif source == "json-layers":
        file.write_text(json.dumps({"layers": allocation}))
    else:
        file.write_text("".join(f"{layer}: {bits}\n" for layer, bits in allocation.items()))
    model = matgptq.load(out, bits=4, allocation=allocation if source == "mapping" else file)
    assert {name: layer.bits for name, layer in nested_layers(model).items() if layer.bits != 4} == allocation
    reference = matgptq.load(out, bits=4)
    reference.get_submodule(Q).set_bits(2)
    reference.get_submodule(DOWN).set_bits(6)
    assert torch.equal(logits(model), logits(reference))
    assert not torch.equal(logits(model), expected[4])


def test_layers_without_a_width_get_the_default(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["bits"] = 5
    (checkpoint / "config.json").write_text(json.dumps(config))
    model = matgptq.load(checkpoint, allocation={Q: 2})
    assert model.get_submodule(Q).bits == 2
    assert widths(model) == {2, 5}


def test_wrong_allocations_are_refused_before_loading(out, tmp_path, monkeypatch):
    file = tmp_path / "allocation.txt"
    file.write_text("model.layers.7.mlp: 4\n")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("was loaded"))
    with pytest.raises(AllocationError, match=r"unknown layer model\.layers\.7\.mlp"):
        matgptq.load(out, allocation=file)
    with pytest.raises(AllocationError, match="unknown layer lm_head"):
        matgptq.load(out, allocation={"lm_head": 4})
    with pytest.raises(AllocationError, match=f"layer {Q}: bits must be"):
        matgptq.load(out, allocation={Q: 9})
    with pytest.raises(AllocationError, match="no such file"):
        matgptq.load(out, allocation=tmp_path / "nothing")


def test_set_bits_needs_no_disk(checkpoint, expected):
    model = matgptq.load(checkpoint)
    shutil.rmtree(checkpoint)
    for bits in (2, 8, 3, 7, 4, 6, 5):
        model.set_bits(bits)
        assert torch.equal(logits(model), expected[bits])
    model.set_bits(dict.fromkeys(nested_layers(model), 3))
    assert torch.equal(logits(model), expected[3])
    model.set_bits({Q: 8})  # the others stay
    assert {name for name, layer in nested_layers(model).items() if layer.bits != 3} == {Q}
    assert not torch.equal(logits(model), expected[3])
    model.set_bits({Q: 3})
    assert torch.equal(logits(model), expected[3])


def test_set_bits_changes_all_or_nothing(out, expected):
    model = matgptq.load(out, bits=4)
    with pytest.raises(AllocationError, match="no nested layer lm_head"):
        model.set_bits({Q: 2, "lm_head": 2})
    for wrong in (1, 9, "3", None, True):
        with pytest.raises(ConfigurationError, match="bits must be an integer"):
            model.set_bits(wrong)
        with pytest.raises(ConfigurationError, match=f"layer {DOWN}: bits must be"):
            model.set_bits({Q: 2, DOWN: wrong})
    assert torch.equal(logits(model), expected[4])
    with pytest.raises(AllocationError, match="no nested layers"):
        set_bits(build_model("llama"), 4)


@pytest.mark.skipif(not native.available(), reason=f"no native library: {native.reason()}")
def test_one_layer_that_cannot_change_keeps_all_from_changing(out, expected):
    model = matgptq.load(out, bits=4)
    layer = model.get_submodule(DOWN)
    layer.unpack()
    layer.pack(resident=False)
    with pytest.raises(AllocationError, match=f"layer {DOWN}: .*resident=True"):
        model.set_bits(3)
    assert widths(model) == {4}
    with pytest.raises(ConfigurationError, match=f"layer {DOWN} cannot move"):
        model.to("meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    torch.testing.assert_close(logits(model), expected[4], rtol=1e-4, atol=1e-4)


def clones(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kernel", ["reference", ""])
@pytest.mark.parametrize("packed", [True, False])
def test_a_state_dict_is_loaded_into_what_it_came_from(packed, kernel, out, expected, monkeypatch):
    monkeypatch.setenv("MATGPTQ_KERNEL", kernel)
    model = matgptq.load(out, bits=4)
    if not packed:
        for layer in nested_layers(model).values():
            layer.unpack()
    was_packed = {name for name, layer in nested_layers(model).items() if layer.packed is not None}
    groups = [layer.shared_input for layer in nested_layers(model).values()]
    whole = clones(model)
    single = model(token_ids(1, 1)).logits
    zeros = {name: torch.zeros_like(tensor) for name, tensor in whole.items() if ".codes" in name or "bias" in name}
    assert not model.load_state_dict(zeros, strict=False).unexpected_keys
    assert not torch.allclose(logits(model), expected[4])
    assert not torch.allclose(model(token_ids(1, 1)).logits, single)
    halved = {name: tensor / 2 for name, tensor in whole.items() if ".scales_" in name}
    model.load_state_dict(whole)
    model.load_state_dict(halved, strict=False)
    for name, layer in nested_layers(model).items():
        assert torch.equal(layer.scales_8, whole[f"{name}.scales_8"] / 2)
        assert torch.equal(layer.nested_weight.codes, whole[f"{name}.codes"])
    model.load_state_dict(whole)
    torch.testing.assert_close(logits(model), expected[4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(token_ids(1, 1)).logits, single)
    assert {name for name, layer in nested_layers(model).items() if layer.packed is not None} == was_packed
    assert [layer.shared_input for layer in nested_layers(model).values()] == groups
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())


@pytest.mark.skipif(not native.available(), reason=f"no native library: {native.reason()}")
def test_state_dicts_that_a_packed_model_cannot_load(out, expected):
    whole = clones(matgptq.load(out))
    model = matgptq.load(out, bits=4, resident=False)
    scales = {name: tensor for name, tensor in whole.items() if ".scales_" in name}
    for state, strict in ((whole, True), (scales, False)):
        with pytest.raises(RuntimeError, match=f"layer {Q}: only one slice of it is in memory"):
            model.load_state_dict(state, strict=strict)
    model.load_state_dict({"lm_head.weight": whole["lm_head.weight"]}, strict=False)
    torch.testing.assert_close(logits(model), expected[4], rtol=1e-4, atol=1e-4)
    model = matgptq.load(out, bits=4)
    with pytest.raises(RuntimeError, match=f"layer {Q}: scales_8 holds zeros"):
        model.load_state_dict({f"{Q}.scales_8": torch.zeros_like(whole[f"{Q}.scales_8"])}, strict=False)
    assert torch.equal(model.state_dict()[f"{Q}.codes"], whole[f"{Q}.codes"])
    model.load_state_dict(whole)  # and good scales make it what it was
    assert all(layer.packed is not None and layer.shared_input is not None for layer in _attention_inputs(model))


def _attention_inputs(model):
    return [getattr(block.self_attn, f"{name}_proj") for block in model.model.layers for name in "qkv"]


@pytest.mark.skipif(not native.available(), reason=f"no native library: {native.reason()}")
def test_a_model_that_cannot_be_saved_leaves_what_lies_there(checkpoint):
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir() if file.is_file()}
    with pytest.raises(ConfigurationError, match="only its slice"):
        matgptq.load(checkpoint, bits=4, resident=False).save_pretrained(checkpoint)
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir() if file.is_file()} == before


# --- transformers -----------------------------------------------------------------------------------------------------


LOAD_AND_COMPARE = """
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
expected = torch.load(sys.argv[2])
ids = torch.randint(2, 288, (2, 12), generator=torch.Generator().manual_seed(9))
for bits in (8, 3, 2):
    model.set_bits(bits)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected[bits])
print("equal")
"""


def test_plain_from_pretrained_when_transformers_is_imported_first(out, expected, tmp_path):
    torch.save(expected, tmp_path / "expected.pt")
    code = "import sys\nfrom transformers import AutoModelForCausalLM\nimport matgptq\n" + LOAD_AND_COMPARE
    done = run(code, out, tmp_path / "expected.pt")
    assert done.stdout == "equal\n", done.stderr
    assert "Unknown quantization" not in done.stderr


def test_plain_from_pretrained_when_matgptq_is_imported_first(out, expected, tmp_path):
    """And importing matgptq costs nothing: transformers and PyTorch come with what uses them."""
    torch.save(expected, tmp_path / "expected.pt")
    code = """
import sys, matgptq
heavy = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "typer", "rich"} & set(sys.modules)
print(sorted(heavy), matgptq.__version__)
from transformers import AutoModelForCausalLM
"""
    after = 'print([finder for finder in sys.meta_path if type(finder).__module__.startswith("matgptq.")])'
    done = run(code + LOAD_AND_COMPARE + after, out, tmp_path / "expected.pt")
    assert done.stdout.splitlines() == [f"[] {matgptq.__version__}", "equal", "[]"], done.stderr
    assert "Unknown quantization" not in done.stderr


def test_without_matgptq_transformers_fails_instead_of_starting_at_random(out, tmp_path):
    """The guard: an empty ``<layer>.weight`` that fits no Linear."""
    unguarded = shutil.copytree(out, tmp_path / "unguarded")
    tensors = {name: tensor for name, tensor in load_file(out / "model.safetensors").items() if tensor.numel()}
    save_file(tensors, unguarded / "model.safetensors", metadata={"format": "pt"})
    code = """
        import sys
        from transformers import AutoModel, AutoModelForCausalLM
        for auto, path in ((AutoModelForCausalLM, 1), (AutoModel, 1), (AutoModelForCausalLM, 2)):
            try:
                auto.from_pretrained(sys.argv[path])
                print("loaded")
            except RuntimeError as error:
                print("mismatch" in str(error), "matgptq" in sys.modules)
    """
    done = run(code, out, unguarded)
    # The last line is the danger itself: without the guards a model of random numbers.
    assert done.stdout.splitlines() == ["True False", "True False", "loaded"], done.stderr
    assert "q_proj.weight" in done.stderr


def test_a_wish_for_bits_at_loading(out, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers says that other attributes are ignored
        model = AutoModelForCausalLM.from_pretrained(
            out, quantization_config=matgptq.MatGPTQConfig(bits=3), dtype=torch.float32
        )
        untouched = AutoModelForCausalLM.from_pretrained(
            out, quantization_config=matgptq.MatGPTQConfig(), dtype=torch.float32
        )
    assert widths(model) == {3}
    assert torch.equal(logits(model), expected[3])
    assert widths(untouched) == {8}
    with pytest.raises(ConfigurationError, match="bits must be an integer"):
        matgptq.MatGPTQConfig(bits=9)


def test_from_pretrained_does_not_quantize(make_checkpoint):
    source, _ = make_checkpoint("llama")
    with pytest.raises(ValueError, match=r"pre-quantized|does not quantize"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=matgptq.MatGPTQConfig(bits=3))


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_base_models_without_a_head(name, dtype, make_checkpoint):
    out = make_checkpoint(name)[1]
    base = AutoModel.from_pretrained(out, dtype=dtype)
    whole = matgptq.load(out, dtype=dtype)
    assert len(nested_layers(base)) == len(nested_layers(whole))
    ids = token_ids(2, 12, seed=9)
    for bits in (8, 2):
        base.set_bits(bits)
        whole.set_bits(bits)
        with torch.no_grad():
            assert torch.equal(base(ids).last_hidden_state, whole.base_model(ids).last_hidden_state)
    assert {parameter.dtype for parameter in base.parameters()} == {dtype}


def test_base_models_name_damage_as_it_is_stored(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors[f"{Q}.scales_3"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"layer {Q}: "):
        AutoModel.from_pretrained(checkpoint)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_load_dtypes(dtype, out):
    model = matgptq.load(out, bits=4, dtype=dtype)
    assert model.dtype == dtype
    for layer in nested_layers(model).values():
        assert layer.codes.dtype == torch.uint8
        assert {getattr(layer, f"scales_{bits}").dtype for bits in layer.scale_bits} == {torch.float16}
        assert layer.weight.dtype in (dtype, torch.float16)
    by_name = matgptq.load(out, bits=4, dtype=str(dtype).removeprefix("torch."))
    assert torch.equal(logits(by_name), logits(model))
    with pytest.raises(ConfigurationError, match="dtype must be"):
        matgptq.load(out, dtype="int8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_model_cast_afterwards_is_the_same(dtype, out, tmp_path):
    """``model.to(dtype)`` casts every floating buffer it finds; scales are float16 in the format."""
    model = matgptq.load(out, bits=4, dtype=torch.float32).to(torch.bfloat16).to(dtype)
    reference = matgptq.load(out, bits=4, dtype=torch.float32)
    for name, layer in nested_layers(reference).items():
        assert torch.equal(model.get_submodule(name).dequantize(), layer.dequantize())
    assert logits(model).dtype == dtype
    model.save_pretrained(tmp_path / "again")
    old, new = load_file(out / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    for key in old:
        if ".codes" in key or ".scales_" in key:
            assert new[key].dtype == old[key].dtype
            assert torch.equal(new[key], old[key])
    open_checkpoint(tmp_path / "again")


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt_neox", "opt"])
def test_save_pretrained_round_trip(name, make_checkpoint, tmp_path):
    out = make_checkpoint(name)[1]
    model = matgptq.load(out, dtype=torch.bfloat16)
    model.set_bits(3)
    model.save_pretrained(tmp_path / "again")
    before, after = open_checkpoint(out), open_checkpoint(tmp_path / "again")
    assert after.settings == before.settings
    assert after.layers == before.layers
    old, new = load_file(out / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert set(new) == set(old)
    for key in old:
        assert new[key].dtype == old[key].dtype or key.endswith("proj.weight") or not old[key].numel()
        assert torch.equal(new[key], old[key].to(new[key].dtype))
    loaded = matgptq.load(tmp_path / "again", bits=3, dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(model))


def test_save_pretrained_in_shards(out, expected, tmp_path):
    matgptq.load(out).save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(matgptq.load(tmp_path / "again", bits=3)), expected[3])


def test_a_deep_copy_is_independent(out, expected):
    model = matgptq.load(out, bits=8)
    twin = copy.deepcopy(model)
    twin.set_bits(2)
    assert torch.equal(logits(model), expected[8])
    assert torch.equal(logits(twin), expected[2])
    twin.get_submodule(Q).codes.zero_()
    assert torch.equal(logits(model), expected[8])


def test_a_copy_has_methods_of_its_own(out, expected):
    model = matgptq.load(out, bits=8)
    for twin in (copy.deepcopy(model), copy.copy(model)):
        twin.set_bits(2)
        assert type(twin) is type(model)
        assert type(twin).__name__ == "LlamaForCausalLM"
        assert torch.equal(logits(twin), expected[2])
    model = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, quantization_config=matgptq.MatGPTQConfig(packed=False)
    )
    twin = pickle.loads(pickle.dumps(model))
    twin.set_bits(2)
    assert torch.equal(logits(twin), expected[2])
    assert widths(model) == {8}


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
@pytest.mark.parametrize("load", [matgptq.load, AutoModelForCausalLM.from_pretrained], ids=["ours", "transformers"])
def test_the_memory_of_a_model_is_free_when_its_last_name_is_gone(name, load, make_checkpoint, monkeypatch):
    monkeypatch.delenv("MATGPTQ_KERNEL")
    model = load(make_checkpoint(name)[1])
    with torch.no_grad():
        model.generate(token_ids(1, 5), max_new_tokens=3, do_sample=False, pad_token_id=0)
    parts = [weakref.ref(model), *map(weakref.ref, nested_layers(model).values())]
    gc.collect()
    gc.disable()
    try:
        del model
        assert not any(part() for part in parts)
    finally:
        gc.enable()


def test_a_copy_that_shares_storage_has_its_own_width(out, expected):
    """A draft model at few bits beside the one it drafts for, without more memory."""
    model = matgptq.load(out, bits=8)
    draft = model.copy_at(2)
    assert torch.equal(logits(draft), expected[2])
    assert torch.equal(logits(model), expected[8])
    assert draft.get_submodule(Q).codes.data_ptr() == model.get_submodule(Q).codes.data_ptr()
    with pytest.raises(matgptq.errors.AllocationError, match="no nested layer"):
        model.copy_at({"no": 2})


def test_generation(out):
    model, tokenizer = matgptq.load(out, bits=4), AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("hello", return_tensors="pt")
    texts = {}
    for bits in (8, 2):
        model.set_bits(bits)
        ids = model.generate(**prompt, max_new_tokens=8, do_sample=False, min_new_tokens=8)
        greedy = prompt["input_ids"]
        with torch.no_grad():
            for _ in range(8):
                step = model(greedy).logits[:, -1:]
                step[..., tokenizer.eos_token_id] = -torch.inf
                greedy = torch.cat([greedy, step.argmax(-1)], 1)
        assert torch.equal(ids, greedy)
        texts[bits] = ids
    assert not torch.equal(texts[8], texts[2])


def test_nested_linear_computes_its_slice(out):
    layer = matgptq.load(out).get_submodule(DOWN)
    assert isinstance(layer, NestedLinear)
    assert layer.group_size == 32
    x = torch.randn(3, 5, layer.in_features)
    for bits in WIDTHS:
        layer.set_bits(bits)
        assert torch.equal(layer(x), x @ layer.nested_weight.dequantize(bits).T)
        assert f"bits={bits}" in repr(layer)


# --- paths and imports ------------------------------------------------------------------------------------------------


def test_a_path_that_is_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError, match="nowhere: transformers cannot read its config"):
        matgptq.load(tmp_path / "nowhere")


def test_importing_matgptq_without_transformers_installed_works():
    code = """
        import sys
        class Hide:
            def find_spec(self, name, path, target=None):
                if name.partition(".")[0] == "transformers":
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Hide())
        import matgptq
        print("imported")
    """
    done = run(code)
    assert done.stdout == "imported\n", done.stderr


def test_unknown_attributes_of_the_package():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        matgptq.quantise  # noqa: B018


def test_registering_twice_is_harmless():
    from transformers.quantizers import auto

    from matgptq.inference.transformers_integration import register

    before = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    register()
    assert before == auto.LOADING_ATTRIBUTES_CONFIG_TYPES


def test_the_checkpoint_does_not_depend_on_where_it_lies(out, expected, tmp_path, monkeypatch):
    moved = shutil.copytree(out, tmp_path / "a directory with spaces")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(matgptq.load(Path("a directory with spaces"), bits=4)), expected[4])
    assert moved.exists()
