"""Exports: every format holds a slice exactly, says what it cannot hold, and appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import GROUP_SIZE, MODELS, build_model, make_tokenizer, save_model, token_ids
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from typer.testing import CliRunner

import matgptq
from matgptq.bit_stream import pack_rows, row_bytes, unpack_rows
from matgptq.checkpoints.checkpoint import LayerInfo, open_checkpoint
from matgptq.checkpoints.format import EXPORT_NAME
from matgptq.cli import app
from matgptq.errors import (
    AllocationError,
    CheckpointError,
    ConfigurationError,
    ExportError,
    MatGPTQError,
)
from matgptq.exports import exporting, gguf_file
from matgptq.exports.compressed_tensors import CompressedTensors
from matgptq.exports.gguf_tokenizer import _PRE_TOKENIZERS, add_tokenizer
from matgptq.exports.gptq import GPTQ
from matgptq.exports.target import Target, kernel_group_size
from matgptq.exports.verification import unpack_gptq, verify
from matgptq.inference.nested_linear import NestedLinear, SlicedLinear, nested_layers
from matgptq.nested_weight import NestedWeight
from matgptq.sliced_weight import cut, parent_of
from matgptq.slicing import WIDTHS, dequantize, slice_codes

FORMATS = ("compressed-tensors", "gptq", "gguf", "matgptq-slice", "dense")
# Layers that engines fuse are alike; nothing else is.
MIXED = {"q_proj": 3, "k_proj": 3, "v_proj": 3, "o_proj": 5, "gate_proj": 6, "up_proj": 6, "down_proj": 2}


def mixed(checkpoint: Path) -> dict[str, int]:
    return {layer: MIXED[layer.rpartition(".")[2]] for layer in open_checkpoint(checkpoint).layers}


def random_weight(rows: int, columns: int, group_size: int, seed: int = 0) -> NestedWeight:
    """Codes of every value, and scales of either sign and every magnitude that the format allows."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (rows, columns), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(-24, 3, (rows, columns // group_size), generator=generator)
    mantissas = torch.randint(128, 256, exponents.shape, generator=generator).float()
    scales = (mantissas * 2.0**exponents).to(torch.float16).float() * torch.where(
        torch.rand(exponents.shape) < 0.5, -1, 1
    )
    return NestedWeight(codes, {8: scales})


def export_and_verify(checkpoint: Path, output: Path, format: str, **what: Any) -> None:
    matgptq.export(checkpoint, output, format=format, **what)
    if format == "compressed-tensors":
        pytest.importorskip("compressed_tensors", reason="the engine of this format")
    found = verify(output, checkpoint)
    assert found.passed, found
    assert (found.largest_difference, found.different) == (0, ())
    if format != "matgptq-slice":  # its products are made by other kernels
        assert found.logit_difference == 0


# --- packing ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_packed_rows_are_streams_of_bits(bits, rows, columns, seed):
    codes = torch.randint(1 << bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_rows(codes, bits)
    assert packed.shape == (rows, row_bytes(columns, bits))
    for row, stored in zip(codes.tolist(), packed.numpy(), strict=True):
        assert sum(code << (bits * i) for i, code in enumerate(row)) == int.from_bytes(stored.tobytes(), "little")
    assert torch.equal(unpack_rows(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_slice_is_a_symmetric_integer_weight(bits):
    weight = random_weight(6, 256, 64)
    weight = NestedWeight(torch.arange(256, dtype=torch.uint8).repeat(6, 1), weight.scales)
    sliced = cut(weight, bits)
    expected = dequantize(weight.codes, weight.scales[8], bits)
    assert torch.equal(sliced.dequantize(), expected)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(sliced.scales.to(dtype).float(), sliced.scales)
    for group_size in (32, 16, 1):
        assert torch.equal(sliced.regroup(group_size).dequantize(), expected)
    with pytest.raises(ConfigurationError, match="groups of 64 cannot be cut into groups of 48"):
        sliced.regroup(48)
    every = torch.arange(1 << bits, dtype=torch.uint8)
    assert torch.equal(slice_codes(parent_of(every, bits), bits), every)


def test_what_float16_and_bfloat16_hold_exactly():
    weight = random_weight(16, 512, 64)
    weight = NestedWeight(weight.codes, {8: weight.scales[8].clamp(-2, 2)})  # float16 ends at 65504
    exact = {
        dtype: [
            bits
            for bits in WIDTHS
            if torch.equal(cut(weight, bits).dequantize(dtype).float(), cut(weight, bits).dequantize())
        ]
        for dtype in (torch.float16, torch.bfloat16)
    }
    assert exact == {torch.float16: [2, 3, 4], torch.bfloat16: [2]}


# --- each format, layer by layer, at every width and group size -------------------------------------------------------


def target_of(weight: NestedWeight, bits: int) -> Target:
    """As much of a target as the tensors of one layer need."""
    rows, columns = weight.codes.shape
    checkpoint = SimpleNamespace(
        config={"model_type": "llama", "num_hidden_layers": 0},
        settings=SimpleNamespace(ignore=()),
        layers={"layer": LayerInfo(rows, columns, weight.group_size)},
    )
    return Target(checkpoint, {"layer": bits}, torch.bfloat16)  # type: ignore[arg-type]


@pytest.mark.parametrize("group_size", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("bits", WIDTHS)
def test_compressed_tensors_is_exact(bits, group_size):
    weight = random_weight(32, 512, group_size, seed=bits)
    tensors = CompressedTensors(target_of(weight, bits)).layer_tensors("layer", cut(weight, bits))
    packed, scales = tensors["weight_packed"], tensors["weight_scale"]
    assert packed.dtype == torch.int32
    assert packed.shape == (32, 512 * bits // 32)
    assert scales.shape == (32, {32: 16, 64: 8, 128: 4, 256: 4, 512: 1}[group_size])  # 256 is cut; 512 is the whole row
    codes = unpack_rows(packed.view(torch.uint8), bits, 512).float() - (1 << (bits - 1))
    assert torch.equal(codes * scales.float().repeat_interleave(512 // scales.shape[1], 1), weight.dequantize(bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_compressed_tensors_is_packed_as_its_package_packs(bits):
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="the package that defines the format"
    )
    codes = torch.randint(1 << bits, (8, 96), dtype=torch.uint8)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    packed = pack_rows(codes, bits).view(torch.int32)
    assert torch.equal(packed, helpers.pack_to_int32(signed, bits))
    assert torch.equal(helpers.unpack_from_int32(packed, bits, codes.shape), signed)


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_exact(bits, group_size):
    weight = random_weight(32, 256, group_size, seed=bits)
    tensors = GPTQ(target_of(weight, bits)).layer_tensors("layer", cut(weight, bits))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "qweight": (torch.int32, (256 * bits // 32, 32)),
        "qzeros": (torch.int32, (256 // group_size, bits)),
        "scales": (torch.float16, (256 // group_size, 32)),
        "g_idx": (torch.int32, (256,)),
    }
    assert torch.equal(unpack_gptq(bits, **tensors), weight.dequantize(bits))
    # One less than the middle, as readers of version 1 expect.
    stored = unpack_rows(tensors["qzeros"].contiguous().view(torch.uint8), bits, 32)
    assert torch.equal(stored, torch.full_like(stored, (1 << (bits - 1)) - 1))
    assert bits != 4 or set(tensors["qzeros"].flatten().tolist()) == {0x77777777}


def test_gptq_at_3_bits_splits_values_10_and_21():
    """The layout of GPTQ's own code, written out: ten values, a split one, ten, a split one, ten."""
    codes = torch.randint(8, (1, 32), dtype=torch.uint8).tolist()[0]
    words = [0, 0, 0]
    for j in range(10):
        words[0] |= codes[j] << (3 * j)
    words[0] |= (codes[10] << 30) & 0xFFFFFFFF
    words[1] |= (codes[10] >> 2) & 1
    for j in range(10):
        words[1] |= codes[11 + j] << (3 * j + 1)
    words[1] |= (codes[21] << 31) & 0xFFFFFFFF
    words[2] |= (codes[21] >> 1) & 3
    for j in range(10):
        words[2] |= codes[22 + j] << (3 * j + 2)
    packed = pack_rows(torch.tensor([codes], dtype=torch.uint8), 3).numpy().view("<u4")
    assert packed.tolist() == [words]


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("bits", WIDTHS)
def test_gguf_blocks_are_exact(bits, group_size):
    gguf = pytest.importorskip("gguf", reason="the package that defines the format")
    weight = random_weight(8, 256, group_size, seed=bits)
    kind = gguf.GGMLQuantizationType[gguf_file.TYPES[bits]]
    blocks = gguf_file.blocks(cut(weight, bits)).numpy()
    read = gguf.dequantize(blocks, kind)
    assert np.array_equal(read, weight.dequantize(bits).numpy())


# --- whole models, through every exporter and back --------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_a_model_comes_back_as_the_slice(make_checkpoint, tmp_path, name, format):
    _, checkpoint = make_checkpoint(name)
    export_and_verify(checkpoint, tmp_path / "4", format, bits=4)
    for file in ("tokenizer.json", "tokenizer_config.json", "LICENSE", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "4" / file).read_bytes() == (checkpoint / file).read_bytes()
    assert not (tmp_path / "4" / "report.json").exists()
    config = json.loads((tmp_path / "4" / "config.json").read_text())
    parent = json.loads((checkpoint / "config.json").read_text())
    assert {key: value for key, value in config.items() if key != "quantization_config"} == {
        key: value for key, value in parent.items() if key != "quantization_config"
    }
    if format != "gptq":
        export_and_verify(checkpoint, tmp_path / "mixed", format, allocation=mixed(checkpoint))


@pytest.mark.parametrize("name", ["llama-biased", "mistral", "qwen3", "gemma3_text", "llama-tied"])
def test_gguf_of_other_families(tmp_path, name):
    source = save_model(name, tmp_path / "source", torch.bfloat16)
    matgptq.quantize(source, tmp_path / "out", method="rtn", group_size=32)
    export_and_verify(tmp_path / "out", tmp_path / "gguf", "gguf", bits=5)


@pytest.mark.parametrize("format", FORMATS)
def test_whole_rows(tmp_path, format):
    """One scale for a row: in_features differ, so that what a group is differs from layer to layer."""
    source = save_model("llama", tmp_path / "source", torch.float16)
    matgptq.quantize(source, tmp_path / "out", method="rtn", group_size=-1)
    export_and_verify(tmp_path / "out", tmp_path / "export", format, bits=3)
    settings = json.loads((tmp_path / "export" / "config.json").read_text()).get("quantization_config", {})
    if format == "gptq":
        assert settings["group_size"] == -1
    if format == "compressed-tensors":
        (group,) = settings["config_groups"].values()
        assert group["weights"]["strategy"] == "channel"


def test_dense_dtypes(make_checkpoint, tmp_path):
    _, checkpoint = make_checkpoint("llama")
    model = matgptq.load(checkpoint, 3, dtype="float32")
    for dtype in ("float32", "float16", "bfloat16"):
        export_and_verify(checkpoint, tmp_path / dtype, "dense", bits=3, dtype=dtype)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / dtype)
        assert str(loaded.dtype) == f"torch.{dtype}"
        for name, layer in nested_layers(model).items():
            assert torch.equal(loaded.get_submodule(name).weight, layer.dequantize(getattr(torch, dtype)))


def test_kept_layers_stay_dense_and_engines_are_told(make_checkpoint, tmp_path):
    source, _ = make_checkpoint("llama")
    ignore = ("lm_head", "*.mlp.gate_proj", "*.mlp.up_proj", "model.layers.0.self_attn.o_proj")
    matgptq.quantize(source, tmp_path / "out", method="rtn", group_size=32, ignore=ignore)
    for format in FORMATS:
        export_and_verify(tmp_path / "out", tmp_path / format, format, bits=4)
    settings = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert r"-:^model\.layers\.0\.mlp\.(gate_proj|gate_up_proj)$" in settings["dynamic"]
    assert r"-:^model\.layers\.0\.self_attn\.o_proj$" in settings["dynamic"]
    assert not settings["lm_head"]
    settings = json.loads((tmp_path / "compressed-tensors" / "config.json").read_text())["quantization_config"]
    assert {"lm_head", "model.layers.0.mlp.up_proj"} < set(settings["ignore"])


def test_shards(make_checkpoint, tmp_path):
    _, checkpoint = make_checkpoint("llama")
    matgptq.export(checkpoint, tmp_path / "out", format="dense", bits=4, shard_bytes=50_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert verify(tmp_path / "out", checkpoint).passed


# --- what a format cannot hold ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "what", "problem"),
    [
        (
            "gptq",
            {"bits": 5},
            r"gptq holds 2, 3, 4 or 8 bits, the same for all layers, not 5 bits; .*compressed-tensors",
        ),
        ("gptq", {"allocation": {"model.layers.0.mlp.down_proj": 2}, "bits": 4}, "not several widths"),
        (
            "compressed-tensors",
            {"allocation": {"model.layers.0.self_attn.v_proj": 8}, "bits": 4},
            r"need them alike: .*q_proj has 4 bits in groups of 64, .*v_proj has 8 bits.*export gguf, matgptq-slice",
        ),
        ("gguf", {"bits": 9}, "bits must be an integer from 2 to 8"),
        ("gguf", {}, "say what to export: --bits, or --allocation"),
        ("mlx", {"bits": 4}, "format must be one of compressed-tensors, gptq, gguf, matgptq-slice, dense"),
        ("gguf", {"bits": 4, "dtype": "float16"}, "--dtype is for dense exports"),
        ("dense", {"bits": 4, "dtype": "int8"}, "dtype must be"),
        ("dense", {"allocation": {"model.layers.7.mlp.down_proj": 2}}, "unknown layer model.layers.7.mlp.down_proj"),
    ],
)
def test_refusals_before_any_work(make_checkpoint, tmp_path, monkeypatch, format, what, problem):
    _, checkpoint = make_checkpoint("llama")
    monkeypatch.setattr(exporting, "CheckpointWriter", lambda *_, **__: pytest.fail("writes"))
    with pytest.raises(MatGPTQError, match=problem):
        matgptq.export(checkpoint, tmp_path / "out", format=format, **what)
    assert list(tmp_path.iterdir()) == []


def test_partly_quantized_fused_layers_are_refused(make_checkpoint, tmp_path):
    source, _ = make_checkpoint("llama")
    matgptq.quantize(source, tmp_path / "out", method="rtn", group_size=32, ignore=("lm_head", "*.k_proj"))
    for format in ("compressed-tensors", "gptq"):
        with pytest.raises(ExportError, match="k_proj is not quantized"):
            matgptq.export(tmp_path / "out", tmp_path / format, format=format, bits=4)
    export_and_verify(tmp_path / "out", tmp_path / "gguf", "gguf", bits=4)


def test_group_sizes_without_kernels(make_checkpoint, tmp_path):
    assert kernel_group_size("all", [64, 96, 128]) == 32
    assert kernel_group_size("all", [256]) == 128
    source, _ = make_checkpoint("llama")
    matgptq.quantize(source, tmp_path / "out", method="rtn", group_size=16)
    for format in ("compressed-tensors", "gptq"):
        with pytest.raises(ExportError, match="groups of 16 columns; engines have kernels for 32, 64, 128"):
            matgptq.export(tmp_path / "out", tmp_path / format, format=format, bits=4)
    with pytest.raises(ExportError, match="groups of 16 columns are not made of whole blocks of 32"):
        matgptq.export(tmp_path / "out", tmp_path / "gguf", format="gguf", bits=4)
    export_and_verify(tmp_path / "out", tmp_path / "slice", "matgptq-slice", bits=4)


def test_layers_that_do_not_fill_words(tmp_path):
    build_model("llama", torch.bfloat16, intermediate_size=72).save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    matgptq.quantize(tmp_path / "source", tmp_path / "out", method="rtn", group_size=-1)
    for format, problem in [("compressed-tensors", "72 input features"), ("gptq", "72 .*put features")]:
        with pytest.raises(ExportError, match=f"{problem} are not a multiple of 32"):
            matgptq.export(tmp_path / "out", tmp_path / format, format=format, bits=4)
    for bits in (3, 5):  # rows end within a byte
        export_and_verify(tmp_path / "out", tmp_path / f"slice-{bits}", "matgptq-slice", bits=bits)


def test_a_weight_beyond_float16(checkpoint, tmp_path):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.scales_8"].fill_(1016)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"down_proj: a weight is too large for torch.float16; use --dtype bfloat16"):
        matgptq.export(checkpoint, tmp_path / "out", format="dense", bits=8, dtype="float16")
    assert not (tmp_path / "out").exists()
    export_and_verify(checkpoint, tmp_path / "out", "dense", bits=8)


def test_a_quantized_head_that_is_tied(checkpoint, tmp_path):
    tensors = load_file(checkpoint / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    tensors["lm_head.codes"] = torch.zeros(head.shape, dtype=torch.uint8)
    tensors["lm_head.weight"] = torch.empty(0)
    config = json.loads((checkpoint / "config.json").read_text())
    for bits in config["quantization_config"]["scale_bits"]:
        tensors[f"lm_head.scales_{bits}"] = torch.ones(len(head), 1, dtype=torch.float16)
    config["quantization_config"]["ignore"] = []
    config["tie_word_embeddings"] = True
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    (checkpoint / "config.json").write_text(json.dumps(config))
    for format in ("compressed-tensors", "gptq", "gguf", "dense"):
        with pytest.raises(ExportError, match=r"lm_head is quantized, but config\.json ties it to the embedding"):
            matgptq.export(checkpoint, tmp_path / format, format=format, bits=4)
    config["tie_word_embeddings"] = False
    (checkpoint / "config.json").write_text(json.dumps(config))
    for format in FORMATS:
        export_and_verify(checkpoint, tmp_path / format, format, bits=4)


# --- whole or not at all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_that_fails_leaves_nothing(make_checkpoint, tmp_path, monkeypatch, format):
    _, checkpoint = make_checkpoint("llama")
    read, seen = Target.read, []

    def fail_later(self, layer):
        seen.append(layer)
        if len(seen) > 5:
            raise KeyboardInterrupt
        return read(self, layer)

    monkeypatch.setattr(Target, "read", fail_later)
    with pytest.raises(KeyboardInterrupt):
        matgptq.export(checkpoint, tmp_path / "out", format=format, bits=4)
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_exports_and_nothing_else(make_checkpoint, checkpoint, tmp_path):
    matgptq.export(checkpoint, tmp_path / "out", format="dense", bits=4)
    with pytest.raises(CheckpointError, match="exists already"):
        matgptq.export(checkpoint, tmp_path / "out", format="gguf", bits=4)
    matgptq.export(checkpoint, tmp_path / "out", format="gguf", bits=4, force=True)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(ConfigurationError, match="cannot take the place of its checkpoint"):
        matgptq.export(checkpoint, checkpoint, format="dense", bits=4, force=True)
    source = shutil.copytree(make_checkpoint("llama")[0], tmp_path / "source")
    with pytest.raises(CheckpointError, match="not a matgptq checkpoint or export"):
        matgptq.export(checkpoint, source, format="dense", bits=4, force=True)
    open_checkpoint(checkpoint)


def test_a_damaged_checkpoint_is_not_exported(checkpoint, tmp_path):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.scales_4"][0, 0] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"layer model.layers.1.mlp.up_proj: a scale is zero, NaN or Inf"):
        matgptq.export(checkpoint, tmp_path / "out", format="gguf", bits=4)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        matgptq.export(tmp_path, tmp_path / "out", format="gguf", bits=4)


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_sees_a_flipped_bit(make_checkpoint, tmp_path):
    _, checkpoint = make_checkpoint("llama")
    for format, name in [
        ("dense", "model.layers.1.mlp.up_proj.weight"),
        ("dense", "model.norm.weight"),
        ("gptq", "model.layers.1.mlp.up_proj.qzeros"),
        ("matgptq-slice", "model.layers.1.mlp.up_proj.sliced_codes"),
    ]:
        matgptq.export(checkpoint, tmp_path / "out", format=format, bits=4, force=True)
        tensors = load_file(tmp_path / "out" / "model.safetensors")
        tensors[name].view(torch.uint8).view(-1)[1] ^= 1
        save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
        found = verify(tmp_path / "out", checkpoint)
        assert found.different == (name if "norm" in name else name.rpartition(".")[0],)
        assert not found.passed
        assert found.kl > 0


def test_verify_names_what_is_wrong(make_checkpoint, tmp_path):
    source, checkpoint = make_checkpoint("llama")
    with pytest.raises(ExportError, match="not an export"):
        verify(source, checkpoint)
    matgptq.export(checkpoint, tmp_path / "out", format="dense", bits=4)
    (tmp_path / "out" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ExportError, match="cannot be loaded"):
        verify(tmp_path / "out", checkpoint)
    record = json.loads((tmp_path / "out" / EXPORT_NAME).read_text())
    record["layer_bits"]["another"] = 4
    (tmp_path / "out" / EXPORT_NAME).write_text(json.dumps(record))
    with pytest.raises(ExportError, match=r"not made from .*unknown layer another"):
        verify(tmp_path / "out", checkpoint)


def test_on_the_command_line(make_checkpoint, tmp_path):
    _, checkpoint = make_checkpoint("llama")
    runner = CliRunner()

    def run(*arguments: object) -> Any:
        return runner.invoke(app, [str(argument) for argument in arguments])

    (tmp_path / "mixed.json").write_text(json.dumps(mixed(checkpoint)))
    for format, what in [("gguf", ("--bits", 4)), ("matgptq-slice", ("--allocation", tmp_path / "mixed.json"))]:
        output, table = tmp_path / format, tmp_path / "table.json"
        shown = run("export", checkpoint, *what, "--format", format, "-o", output, "--json", table)
        assert shown.exit_code == 0, shown.output
        assert f"saved to {output}" in shown.output.replace("\n", "")
        files = [file for file in output.iterdir() if file.suffix in (".gguf", ".safetensors")]
        assert json.loads(table.read_text())["bytes"] == sum(file.stat().st_size for file in files)
        shown = run("verify", output, "--against", checkpoint, "--json", table)
        assert shown.exit_code == 0, shown.output
        assert json.loads(table.read_text())["passed"] is True
    assert "allocation" in run("info", tmp_path / "matgptq-slice").output
    file = tmp_path / "gguf" / "model.gguf"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    shown = run("verify", tmp_path / "gguf", "--against", checkpoint)
    assert shown.exit_code == 1
    assert "NOT EQUAL" in shown.output
    refused = run("export", checkpoint, "--bits", 5, "--format", "gptq", "-o", tmp_path / "no")
    assert isinstance(refused.exception, ExportError)


# --- our own slices ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sliced(make_checkpoint, tmp_path_factory) -> tuple[Path, Path]:
    _, checkpoint = make_checkpoint("llama")
    output = tmp_path_factory.mktemp("slice") / "out"
    matgptq.export(checkpoint, output, format="matgptq-slice", bits=3)
    return checkpoint, output


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids(2, 12, seed=9)).logits


def test_a_slice_serves_its_width(sliced, monkeypatch):
    checkpoint, output = sliced
    for kernel in ("reference", None):
        monkeypatch.setenv("MATGPTQ_KERNEL", kernel) if kernel else monkeypatch.delenv("MATGPTQ_KERNEL")
        for load in (
            lambda: matgptq.load(output),
            lambda: matgptq.load(output, 3),
            lambda: matgptq.load(output, resident=False),
        ):
            model = load()
            assert all(isinstance(layer, SlicedLinear) and layer.bits == 3 for layer in nested_layers(model).values())
            assert torch.equal(logits(model), logits(matgptq.load(checkpoint, 3)))
    model.set_bits(3)
    weights = {name: layer.dequantize() for name, layer in nested_layers(model).items()}
    assert torch.equal(
        weights["model.layers.0.mlp.down_proj"], matgptq.load(checkpoint, 3).model.layers[0].mlp.down_proj.dequantize()
    )


def test_a_state_dict_of_a_slice_is_loaded_again(sliced, monkeypatch):
    _, output = sliced
    for kernel in ("reference", None):
        monkeypatch.setenv("MATGPTQ_KERNEL", kernel) if kernel else monkeypatch.delenv("MATGPTQ_KERNEL")
        model = matgptq.load(output)
        expected = logits(model)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items() if ".sliced_codes" in name}
        model.load_state_dict(zeros, strict=False)
        assert not torch.allclose(logits(model), expected)
        model.load_state_dict(state)
        assert torch.equal(logits(model), expected)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_slice_holds_nothing_else(sliced):
    checkpoint, output = sliced
    parent, own = open_checkpoint(checkpoint), open_checkpoint(output, slices=True)
    assert own.widths_held == (3,)
    assert own.served_bytes(3) == parent.served_bytes(3)
    assert sum(info.bytes for info in own.tensors.values()) == parent.served_bytes(3)
    assert set(own.layers) == set(parent.layers)
    assert own.layers == parent.layers


def test_another_width_is_refused(sliced):
    _, output = sliced
    down = "model.layers.0.mlp.down_proj"
    with pytest.raises(AllocationError, match=r"bits 4: .*holds only the slice of 3 bits; load the checkpoint"):
        matgptq.load(output, 4)
    with pytest.raises(AllocationError, match=rf"layer {down} at 4 bits: .*holds only the slice of 3 bits"):
        matgptq.load(output, allocation={down: 4})
    matgptq.load(output, allocation={down: 3})
    model = matgptq.load(output)
    with pytest.raises(AllocationError, match="hold only the slice of 3 bits, not that of 8"):
        model.set_bits(8)
    assert {layer.bits for layer in nested_layers(model).values()} == {3}
    with pytest.raises(CheckpointError, match="for a slice of 4 bits; a slice serves the width"):
        AutoModelForCausalLM.from_pretrained(output, quantization_config=matgptq.MatGPTQConfig(bits=4))
    with pytest.raises(CheckpointError, match="holds one slice only"):
        open_checkpoint(output)
    with pytest.raises(CheckpointError, match="holds one slice only"):
        matgptq.export(output, output.parent / "again", format="dense", bits=3)


def test_a_slice_survives_save_pretrained(sliced, tmp_path):
    _, output = sliced
    for load in (AutoModelForCausalLM.from_pretrained, matgptq.load):
        model = load(output)
        model.save_pretrained(tmp_path / "saved")
        first, second = load_file(output / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
        assert set(first) == set(second)
        codes = "model.layers.0.mlp.down_proj.sliced_codes"
        assert torch.equal(first[codes], second[codes])
        assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_an_allocation_as_a_slice(make_checkpoint, tmp_path):
    _, checkpoint = make_checkpoint("llama")
    widths = mixed(checkpoint)
    matgptq.export(checkpoint, tmp_path / "out", format="matgptq-slice", allocation=widths)
    opened = open_checkpoint(tmp_path / "out", slices=True)
    assert opened.widths_held == (widths,)
    model = matgptq.load(tmp_path / "out")
    assert {name: layer.bits for name, layer in nested_layers(model).items()} == widths
    assert torch.equal(logits(model), logits(matgptq.load(checkpoint, allocation=widths)))
    with pytest.raises(AllocationError, match="holds only the slice of one allocation"):
        matgptq.load(tmp_path / "out", 8)
    (result,) = matgptq.evaluate(tmp_path / "out", text=token_ids(2, 12)).results
    assert result.bits_per_weight == open_checkpoint(checkpoint).bits_per_weight(widths)


def test_damaged_slices(sliced, tmp_path):
    _, output = sliced
    down = "model.layers.0.mlp.down_proj"

    def change(problem: str, tensors: dict[str, torch.Tensor] | None = None, **settings: Any) -> None:
        directory = tmp_path / "damaged"
        shutil.copytree(output, directory, dirs_exist_ok=True)
        stored = {**load_file(output / "model.safetensors"), **(tensors or {})}
        save_file({name: t for name, t in stored.items() if t is not None}, directory / "model.safetensors")
        config = json.loads((output / "config.json").read_text())
        config["quantization_config"].update(settings)
        (directory / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=problem):
            matgptq.load(directory)

    change("for a slice of 4 bits", bits=4)
    change("for a slice of 2 bits", layer_bits={down: 2})
    change("names layer other", layer_bits={"other": 3})
    change("bits must be an integer", bits=None)
    change("group_size must be a number of columns", group_size=-1)
    change("has no .*sliced_scales", {f"{down}.sliced_scales": None})
    change("has no .*down_proj.weight", {f"{down}.weight": None})
    change("sliced_scales is F32", {f"{down}.sliced_scales": torch.ones(64, 3)})
    change("a slice has no codes", {f"{down}.codes": torch.zeros(64, 96, dtype=torch.uint8)})
    change("holds NaN", {f"{down}.sliced_scales": torch.full((64, 3), float("nan"), dtype=torch.float16)})


def test_a_slice_is_a_parent_for_linear_layers_only(sliced):
    _, output = sliced
    plain = matgptq.MatGPTQConfig(packed=False)
    model = AutoModelForCausalLM.from_pretrained(output, quantization_config=plain)
    layer = nested_layers(model)["model.layers.0.mlp.down_proj"]
    assert isinstance(layer, NestedLinear)
    assert int((layer.codes & 31).sum()) == 0
    assert layer.codes.shape == (layer.out_features, layer.in_features)


# --- GGUF: metadata and tokenizer -------------------------------------------------------------------------------------


def test_transformers_reads_a_llama_from_gguf_alone(make_checkpoint, tmp_path):
    pytest.importorskip("gguf", reason="transformers reads GGUF with it")
    _, checkpoint = make_checkpoint("llama")
    matgptq.export(checkpoint, tmp_path / "out", format="gguf", bits=4)
    (tmp_path / "out" / "config.json").unlink()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MATGPTQ_KERNEL", "reference")
        assert torch.equal(logits(model), logits(matgptq.load(checkpoint, 4)))
    wanted = AutoConfig.from_pretrained(checkpoint)
    for key in ("hidden_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size", "bos_token_id"):
        assert getattr(model.config, key) == pytest.approx(getattr(wanted, key)), key


def sentencepiece_like(prefix: bool) -> PreTrainedTokenizerFast:
    """BPE over characters with bytes to fall back on, as Llama 2 and Gemma have; merges complete."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdehlorw"]
    merges = [("l", "l"), ("h", "e"), ("o", "r"), ("▁", "w"), ("he", "ll"), ("▁w", "or"), ("l", "d"), ("hell", "o")]
    vocab = {piece: number for number, piece in enumerate([*pieces, *map("".join, merges)])}
    # SentencePiece merges whatever makes a token, so that every way to cut a token has a merge.
    complete = []
    for pair in merges:
        token = "".join(pair)
        complete += [(token[:i], token[i:]) for i in range(1, len(token)) if {token[:i], token[i:]} <= set(vocab)]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=complete, byte_fallback=True, unk_token="<unk>"))
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["bytes", "prefix", "no-prefix"])
def test_tokenizers_come_back(make_checkpoint, tmp_path, kind):
    gguf = pytest.importorskip("gguf", reason="transformers reads GGUF with it")
    _, made = make_checkpoint("llama")
    checkpoint = shutil.copytree(made, tmp_path / "checkpoint")
    if kind != "bytes":
        (checkpoint / "tokenizer.json").unlink()
        sentencepiece_like(kind == "prefix").save_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    matgptq.export(checkpoint, tmp_path / "out", format="gguf", bits=4)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer")}
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == 288
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    if kind == "bytes":
        assert fields["tokenizer.ggml.pre"] == "gpt-2"
        assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    else:
        assert fields["tokenizer.ggml.model"] == "llama"
        assert fields["tokenizer.ggml.add_space_prefix"] is (kind == "prefix")
        types = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
        assert [types[token] for token in ("<unk>", "<s>", "<0x0A>", "hello", "[PAD287]")] == [2, 3, 6, 1, 5]
    if kind != "no-prefix":  # transformers takes every such file for a Llama's
        loaded = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
        for text in ("hello world", "world hell\n", "held é 日"):
            assert loaded(text, add_special_tokens=False)["input_ids"] == tokenizer(text)["input_ids"]


def test_tokenizers_that_llama_cpp_does_not_have(make_checkpoint, tmp_path):
    _, made = make_checkpoint("llama")

    def refuse(tokenizer: PreTrainedTokenizerFast, problem: str) -> None:
        checkpoint = shutil.copytree(made, tmp_path / "checkpoint", dirs_exist_ok=True)
        tokenizer.save_pretrained(checkpoint)
        with pytest.raises(ExportError, match=problem):
            matgptq.export(checkpoint, tmp_path / "out", format="gguf", bits=4)

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    refuse(tokenizer, r"do not split text as this one does: .*Punctuation")
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    refuse(tokenizer, "do not split text as this one does")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<extra {n}>" for n in range(64)])
    refuse(tokenizer, "lies outside the embedding of 288 rows")
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    refuse(PreTrainedTokenizerFast(tokenizer_object=backend), "hold BPE tokenizers, not Unigram")
    tokenizer = sentencepiece_like(False)
    record = json.loads(tokenizer.backend_tokenizer.to_str())
    record["model"]["merges"].remove(["h", "e"])
    refuse(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(record))), "would merge")
    record = json.loads(make_tokenizer().backend_tokenizer.to_str())
    record["model"]["end_of_word_suffix"] = "</w>"
    refuse(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(record))), "no end_of_word_suffix")
    spaces, prefix = normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")
    for normalizer, pre_tokenizer, problem in (
        ([normalizers.Lowercase(), prefix, spaces], None, "Lowercase"),
        ([normalizers.Strip(), prefix, spaces], None, "Strip"),
        ([normalizers.NFKC(), prefix, spaces], None, "NFKC"),
        ([prefix, spaces], pre_tokenizers.Digits(individual_digits=True), "Digits"),
        ([prefix, spaces], pre_tokenizers.Split("l", "isolated"), "Split"),
        ([spaces], pre_tokenizers.Metaspace(split=False), "replace; metaspace"),
        ([], pre_tokenizers.Metaspace(split=True), "Metaspace"),
        ([], pre_tokenizers.Split(" ", "merged_with_previous"), "split at spaces"),
        ([], None, "nothing"),
    ):
        tokenizer = sentencepiece_like(True)
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(normalizer)
        if pre_tokenizer is not None:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
        refuse(tokenizer, f"not what this tokenizer does: .*{problem}")


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "prefix"),
    [
        (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), True),
        (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False), True),
        (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False), False),
        (normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), False),
    ],
    ids=["llama", "llama-legacy", "no-prefix", "gemma"],
)
def test_spaces_of_sentencepiece(normalizer, pre_tokenizer, prefix):
    gguf = pytest.importorskip("gguf", reason="the package that writes the format")
    tokenizer = sentencepiece_like(prefix)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
    record = json.loads(tokenizer.backend_tokenizer.to_str())
    record["normalizer"] = normalizer and json.loads(normalizer.__getstate__())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(record)))
    writer = gguf.GGUFWriter(None, "llama")
    add_tokenizer(writer, tokenizer, 288, "here")
    assert writer.kv_data[0]["tokenizer.ggml.add_space_prefix"].value is prefix


def test_a_tokenizer_that_knows_no_letter():
    gguf = pytest.importorskip("gguf", reason="the package that writes the format")
    tokenizer = make_tokenizer()
    record = json.loads(tokenizer.backend_tokenizer.to_str())
    del record["model"]["vocab"]["a"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(record)), bos_token="<s>")
    assert tokenizer("a")["input_ids"] == []
    writer = gguf.GGUFWriter(None, "llama")
    add_tokenizer(writer, tokenizer, 288, "here")
    assert writer.kv_data[0]["tokenizer.ggml.add_bos_token"].value is False


def test_every_known_pre_tokenizer_is_recognized(make_checkpoint, tmp_path):
    """As the tokenizer.json of Llama 3, Qwen 2, SmolLM and Mistral Nemo have them."""
    from tokenizers import Regex

    gguf = pytest.importorskip("gguf", reason="the package that writes the format")
    _, made = make_checkpoint("llama")
    for (steps, whole), name in _PRE_TOKENIZERS.items():
        tokenizer = make_tokenizer()
        record = json.loads(tokenizer.backend_tokenizer.to_str())
        record["model"]["ignore_merges"] = whole
        backend = Tokenizer.from_str(json.dumps(record))
        parts = []
        for step in steps:
            if step == "digits":
                parts.append(pre_tokenizers.Digits(individual_digits=True))
            elif step != "gpt-2":
                parts.append(pre_tokenizers.Split(Regex(step), "isolated"))
        parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="gpt-2" in steps))
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
        backend.normalizer = normalizers.NFC()
        checkpoint = shutil.copytree(made, tmp_path / name)
        PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(checkpoint)
        matgptq.export(checkpoint, tmp_path / "out", format="gguf", bits=4, force=True)
        reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
        assert reader.fields["tokenizer.ggml.pre"].contents() == name


def test_llama_3_frequency_factors():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = build_model("llama", head_dim=128, rope_parameters=rope).config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    factors = gguf_file.frequency_factors(config)
    assert factors.min() == 1
    assert factors.max() == 8
    assert 5 < int(((factors > 1) & (factors < 8)).sum()) < 20
    torch.testing.assert_close(plain / factors.double(), scaled.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("llama", {"hidden_act": "gelu"}, "does not compute the activation gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "of type dynamic"),
        ("qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, None),
        ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar 24"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping None"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping None"),
        ("qwen3", {"attention_bias": True}, r"k_proj.bias: llama.cpp's qwen3 adds no such bias"),
        ("gemma2", {"attention_bias": True}, r"k_proj.bias: llama.cpp's gemma2 adds no such bias"),
        ("gemma3_text", {"attention_bias": True}, r"k_proj.bias: llama.cpp's gemma3 adds no such bias"),
        ("phi3", {}, "gguf exports know llama, mistral, qwen2, qwen3, gemma2, gemma3_text, not phi3"),
    ],
)
def test_what_llama_cpp_would_compute_in_another_way(tmp_path, name, changes, problem):
    build_model(name, torch.bfloat16, **changes).save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    matgptq.quantize(tmp_path / "source", tmp_path / "out", method="rtn", group_size=32)
    if problem is None:
        export_and_verify(tmp_path / "out", tmp_path / "gguf", "gguf", bits=4)
        return
    with pytest.raises(ExportError, match=problem):
        matgptq.export(tmp_path / "out", tmp_path / "gguf", format="gguf", bits=4)


def test_families_without_gguf_have_the_other_formats(tmp_path):
    assert set(gguf_file.ARCHITECTURES) < {model_type for model_type, _ in MODELS.values()}
    source = save_model("opt", tmp_path / "source", torch.bfloat16)
    matgptq.quantize(source, tmp_path / "out", method="rtn", group_size=GROUP_SIZE)
    for format in ("compressed-tensors", "gptq", "matgptq-slice", "dense"):
        export_and_verify(tmp_path / "out", tmp_path / format, format, bits=4)
