"""A forecast says what the run then does, and refuses what it would refuse."""

from __future__ import annotations

import inspect

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import GROUP_SIZE, save_model, token_ids

import matgptq
from matgptq.errors import MatGPTQError


@pytest.fixture
def source(make_checkpoint):
    return make_checkpoint("llama")[0]


def test_a_forecast_is_what_happens_then(source, tmp_path):
    out = tmp_path / "out"
    options = {"dataset": token_ids(), "group_size": GROUP_SIZE, "bits": (2, 4, 8), "coordinate_passes": 1}
    found = matgptq.forecast(source, out, **options)
    found.check()
    assert [file.name for file in tmp_path.iterdir()] == []
    report = matgptq.quantize(source, out, **options)
    record = found.to_dict()
    assert record["recipe"] == report.recipe
    assert [layer["name"] for layer in record["layers"]] == [layer.name for layer in report.layers]
    assert (record["nsamples"], record["seqlen"]) == (len(token_ids()), token_ids().shape[1])
    stored = load_file(out / "model.safetensors")
    assert sum(tensor.nbytes for name, tensor in stored.items() if "codes" in name or "scales" in name) == (
        found.stored_bytes
    )


def test_it_takes_what_a_run_takes():
    run, forecast = (inspect.signature(each).parameters for each in (matgptq.quantize, matgptq.forecast))
    assert [*forecast.values()] == [*run.values()]


@pytest.mark.parametrize(
    "options",
    [
        {"damping": -1.0},
        {"default_bits": 9},
        {"group_size": 24},
        {"quality": "perfect"},
        {"no_such_ingredient": 1},
        {"activations": "cloud"},
        {"dataset": "missing.txt"},
        {"dataset": token_ids().new_full((2, 8), 10**6)},
        {"ignore": "no.such.layer"},
        {"seqlen": 10**6},
        {"device": "abacus"},
        {"wandb_project": "project"},
    ],
)
def test_refusals_are_those_of_a_run(options, source, tmp_path):
    options = {"dataset": token_ids(), "group_size": GROUP_SIZE, **options}
    said = []
    for verb in (matgptq.forecast, matgptq.quantize):
        with pytest.raises(MatGPTQError) as caught:
            verb(source, tmp_path / "out", **options)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_stands_there_is_not_replaced_unasked(make_checkpoint):
    source, out = make_checkpoint("llama")
    options = {"dataset": token_ids(), "group_size": GROUP_SIZE}
    with pytest.raises(MatGPTQError, match="--force"):
        matgptq.forecast(source, out, **options)
    assert matgptq.forecast(source, out, force=True, **options).plan.layers


def test_room_is_asked_for_when_the_forecast_is_known(tmp_path, monkeypatch):
    source = save_model("llama", tmp_path / "source", torch.bfloat16)
    monkeypatch.setattr("matgptq.quantization.preparation.available_memory", lambda: 500_000_000)
    found = matgptq.forecast(
        source, tmp_path / "out", dataset=token_ids(), group_size=GROUP_SIZE, activations="memory", quality="fast"
    )
    with pytest.raises(MatGPTQError, match="are free"):
        found.check()
