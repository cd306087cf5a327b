"""Models of which one block is in memory at a time compute what whole ones compute."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import GROUP_SIZE, MODELS, blocks_of, save_model, token_ids

import matgptq
from matgptq.errors import SourceError
from matgptq.models.blocks import capture_inputs, propagate
from matgptq.models.families import find_family
from matgptq.models.residency import Streamed, build_empty, can_stream, needs_conversion
from matgptq.models.source import open_source

CPU = torch.device("cpu")


def streamed(source):
    network = build_empty(source, torch.float32)
    family = find_family(network.config.model_type)
    blocks = blocks_of(network)
    return Streamed(network, source, family.blocks, CPU), blocks


@pytest.mark.parametrize("name", sorted(MODELS))
def test_blocks_are_filled_from_the_files_and_emptied(name, tmp_path):
    source = open_source(save_model(name, tmp_path / "source", torch.bfloat16, max_shard_size="40KB"))
    assert can_stream(source)
    residency, blocks = streamed(source)
    assert not needs_conversion(residency.network, source)
    whole = source.load_model(torch.float32)
    whole_blocks = blocks_of(whole)
    expected, found = (
        capture_inputs(model, each, token_ids()) for model, each in ((whole, whole_blocks), (residency.network, blocks))
    )
    for index, (block, whole_block) in enumerate(zip(blocks, whole_blocks, strict=True)):
        assert all(parameter.is_meta for parameter in block.module.parameters())
        with residency.present(block):
            propagate(block, [found], index, lambda: None)
        assert all(parameter.is_meta for parameter in block.module.parameters())
        propagate(whole_block, [expected], index, lambda: None)
    for one, other in zip(expected.hidden, found.hidden, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("quality", ["fast", "balanced", "best"])
def test_a_streamed_run_gives_the_codes_of_a_whole_one(quality, tmp_path, monkeypatch):
    source = save_model("llama-tied", tmp_path / "source", torch.bfloat16)
    options = {"dataset": token_ids(), "group_size": GROUP_SIZE, "quality": quality, "tuned_bits": ()}
    matgptq.quantize(source, tmp_path / "streamed", **options)
    monkeypatch.setattr("matgptq.quantization.preparation.can_stream", lambda _: False)
    matgptq.quantize(source, tmp_path / "whole", **options)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("streamed", "whole"))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), "hold no model.layers.1.mlp.up_proj.weight"),
        (lambda tensors: tensors["model.norm.weight"].fill_(float("nan")), "model.norm.weight holds NaN or Inf"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}),
            r"model.norm.weight is \[63\], the model wants \[64\]",
        ),
    ],
    ids=["missing", "nan", "shape"],
)
def test_files_that_do_not_fit_the_model(change, message, tmp_path):
    directory = save_model("llama", tmp_path / "source")
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=message):
        streamed(open_source(directory))


def test_a_block_with_nan_is_named_when_it_is_filled(tmp_path):
    directory = save_model("llama", tmp_path / "source")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    residency, blocks = streamed(open_source(directory))
    with residency.present(blocks[0]):
        pass
    with (
        pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"),
        residency.present(blocks[1]),
    ):
        pass


def test_no_linear_layer_is_made_only_to_be_dropped(tmp_path, monkeypatch):
    # Freed pieces as large as the model, with small objects in between, would stay in the process's address space.
    source = open_source(save_model("llama", tmp_path / "source", torch.bfloat16))
    empty, initialize = torch.empty, torch.nn.Linear.__init__
    real = []

    def watched(*sizes, **options):
        made = empty(*sizes, **options)
        if not made.is_meta and made.dim() == 2:
            real.append(made.shape)
        return made

    monkeypatch.setattr(torch, "empty", watched)
    network = build_empty(source, torch.bfloat16)
    assert real == []
    assert all(parameter.is_meta for parameter in network.parameters())
    assert torch.nn.Linear.__init__ is initialize
