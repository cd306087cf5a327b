"""What a run needs is said, and refused, before it starts."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import GROUP_SIZE, save_model, token_ids

import matgptq
from matgptq.checkpoint import open_checkpoint
from matgptq.errors import ConfigurationError, MatGPTQError
from matgptq.plan import CalibrationRequest, output_hessian_bytes
from matgptq.preparation import prepare
from matgptq.recipe import make_recipe
from matgptq.requirements import available_memory, check_requirements
from matgptq.source import open_source
from matgptq.text import self_text


def needs_of(source, dataset=None, activations="auto", **options):
    request = CalibrationRequest(token_ids() if dataset is None else dataset, None, None)
    recipe = make_recipe(group_size=GROUP_SIZE, **options)
    return prepare(
        open_source(source), recipe, request, ignore=("lm_head",), device=torch.device("cpu"), dtype=torch.float32,
        activations=activations,
    ).needs  # fmt: skip


def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path):
    few, many = (
        needs_of(save_model("llama", tmp_path / str(count), num_hidden_layers=count), activations="disk")
        for count in (2, 6)
    )
    assert few.memory == many.memory
    assert many.disk["finished blocks"] > 1.5 * few.disk["finished blocks"]


def test_text_of_its_own_takes_the_whole_model(tmp_path):
    source = save_model("llama", tmp_path / "source")
    assert "model" in needs_of(source, dataset="self").memory
    assert "model" not in needs_of(source).memory
    assert "model" not in needs_of(source, dataset="self", method="rtn").memory  # which reads no text


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_text_in_bfloat16_takes_a_copy_of_what_is_stored_in_more(stored, tmp_path, monkeypatch):
    """It counts as far as it is larger than what is needed afterwards."""
    monkeypatch.setattr("matgptq.requirements._SWEEP_BYTES", 0)
    for vocabulary in (272, 1 << 16):
        source = save_model("llama", tmp_path / str(vocabulary), shape={"vocab_size": vocabulary})
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "dtype": stored}))
        for fast in (True, False):
            monkeypatch.setattr(self_text, "multiplies_bfloat16", lambda device, fast=fast: fast)
            needs = needs_of(source, dataset="self", activations="disk")
            assert needs.writes_text
            more = needs.memory.get("more while it writes the text", 0)
            if fast and stored == "float32" and vocabulary > 272:
                assert 0 < more < needs.memory["model"] // 2
            else:
                assert more == 0


def test_where_activations_go(tmp_path, monkeypatch):
    source = save_model("llama", tmp_path / "source")
    assert needs_of(source).activations == "memory"
    monkeypatch.setattr("matgptq.requirements.available_memory", lambda: 1000)
    assert needs_of(source).activations == "disk"
    assert needs_of(source, activations="memory").activations == "memory"
    with pytest.raises(ConfigurationError, match="memory, on disk or auto, not 'tape'"):
        needs_of(source, activations="tape")


def test_where_output_hessians_go(tmp_path, monkeypatch):
    source = save_model("llama", tmp_path / "source")
    needs = needs_of(source)
    assert needs.output_hessians == "memory"
    size = needs.memory["output Hessians"]
    assert size == needs.disk["output Hessians"] > 0
    assert needs_of(source, activations="disk").output_hessians == "disk"
    monkeypatch.setattr("matgptq.requirements.available_memory", lambda: 4 * size)
    elsewhere = needs_of(source, activations="memory")
    assert elsewhere.output_hessians == "disk"
    assert "output Hessians" not in elsewhere.memory
    assert elsewhere.disk["output Hessians"] == 2 * size  # those that are summed, and those that are kept
    assert "output Hessians" not in needs_of(source, rows_together=0).memory


def test_fewer_rows_are_solved_together_where_their_matrices_would_be_large(tmp_path, monkeypatch):
    source = save_model("llama", tmp_path / "source")
    request = CalibrationRequest(token_ids(), None, None)

    def plan_of(**options):
        recipe = make_recipe(group_size=GROUP_SIZE, **options)
        return prepare(
            open_source(source), recipe, request, ignore=("lm_head",), device=torch.device("cpu"), dtype=torch.float32
        ).plan

    whole = plan_of()
    assert whole.rows_together == 4096
    assert not any("together" in note for note in whole.notes)
    monkeypatch.setattr("matgptq.plan._OUTPUT_HESSIAN_BYTES", output_hessian_bytes(whole.blocks, 4096) - 1)
    fewer = plan_of()
    assert 1 < fewer.rows_together < 256
    assert output_hessian_bytes(fewer.blocks, fewer.rows_together) < output_hessian_bytes(whole.blocks, 4096)
    assert f"at most {fewer.rows_together} rows are solved together" in " ".join(fewer.notes)
    monkeypatch.setattr("matgptq.plan._OUTPUT_HESSIAN_BYTES", 0)
    assert plan_of(rows_together=0).rows_together == 0
    matgptq.quantize(source, tmp_path / "out", dataset=token_ids(), group_size=GROUP_SIZE)
    assert torch.isfinite(matgptq.load(tmp_path / "out", bits=4)(token_ids()).logits).all()


def test_too_little_memory_is_refused_before_the_first_token(tmp_path, monkeypatch):
    source = save_model("llama", tmp_path / "source")
    monkeypatch.setattr("matgptq.requirements.available_memory", lambda: 500_000_000)
    monkeypatch.setattr("matgptq.quantization_run.calibration_windows", lambda *_, **__: pytest.fail("text was read"))
    with pytest.raises(ConfigurationError, match=r"about 0\.\d GB of memory, 0\.5 GB are free: --activations disk, or"):
        matgptq.quantize(source, tmp_path / "out", dataset=token_ids(), group_size=GROUP_SIZE, activations="memory")
    with pytest.raises(ConfigurationError, match=r"a text of your own \(--dataset\)"):
        matgptq.quantize(source, tmp_path / "out", dataset="self", group_size=GROUP_SIZE)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_too_little_disk(tmp_path, monkeypatch):
    needs = needs_of(save_model("llama", tmp_path / "source"))
    check_requirements(needs, tmp_path / "not" / "there" / "out")

    class Usage:
        free = 10_000

    monkeypatch.setattr("matgptq.requirements.shutil.disk_usage", lambda _: Usage)
    with pytest.raises(ConfigurationError, match=r"of disk while it runs, 0\.0 GB are free at"):
        check_requirements(needs, tmp_path / "out")
    check_requirements(needs, tmp_path / "out", sum(needs.disk.values()) - 10_000)  # the rest lies there already


def test_what_this_machine_has():
    free = available_memory()
    assert free is None or free > 0


def test_no_time_is_said_where_tuning_takes_most_of_it(tmp_path):
    source = save_model("llama", tmp_path / "source")
    assert needs_of(source, quality="balanced").seconds > 0
    assert needs_of(source, token_ids(8), quality="best", rotate=False).seconds is None


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_whole_block_may_be_left_alone(index, tmp_path):
    source = save_model("llama", tmp_path / "source", num_hidden_layers=3)
    ignore = ("lm_head", f"model.layers.{index}.*")
    matgptq.quantize(source, tmp_path / "out", dataset=token_ids(), group_size=GROUP_SIZE, ignore=ignore)
    assert torch.isfinite(matgptq.load(tmp_path / "out", bits=4)(token_ids()).logits).all()


def test_names_of_layers_to_leave_alone(tmp_path):
    source = save_model("llama", tmp_path / "source")
    with pytest.raises(ConfigurationError, match=r"--ignore down_prj: no Linear layer has this name"):
        matgptq.quantize(source, tmp_path / "out", method="rtn", ignore=("lm_head", "down_prj"))
    matgptq.quantize(source, tmp_path / "out", method="rtn", ignore=("down_proj",))
    layers = open_checkpoint(tmp_path / "out").layers
    assert len(layers) == 12
    assert not any("down_proj" in layer for layer in layers)


def test_token_ids_are_checked_like_text(tmp_path):
    source = save_model("opt", tmp_path / "source")
    for windows, options, message in (
        (token_ids(4, 128), {}, "context of 64"),
        (token_ids(4, 1), {}, "1 window of 2 tokens"),
        (token_ids(), {"nsamples": 0}, "not 0 of"),
        (token_ids(4), {"tuned_bits": (2,)}, "too few to tune"),
    ):
        with pytest.raises(MatGPTQError, match=message):
            matgptq.quantize(source, tmp_path / "out", dataset=windows, group_size=GROUP_SIZE, **options)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]
