"""What a run needs is said, and refused, before it starts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import GROUP_SIZE, save_model, token_ids

import matgptq
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.errors import ConfigurationError, MatGPTQError
from matgptq.machine.memory import available_memory, gpu_memory, has_own_memory
from matgptq.models.residency import build_empty
from matgptq.models.source import ModelSource, open_source
from matgptq.quantization.plan import CalibrationRequest, output_hessian_bytes
from matgptq.quantization.preparation import prepare
from matgptq.quantization.requirements import check_requirements, estimate_requirements
from matgptq.quantization.run_time import _OfLogits, _seconds_of_logits, _seconds_per_gradient, estimate_seconds
from matgptq.quantization.stage_memory import BLOCKS, GRADIENTS, TEXT, TUNING, StageMemory, entering_bytes, states_bytes
from matgptq.recipe import make_recipe
from matgptq.text import self_text


def prepared(source, dataset=None, activations="auto", **options):
    request = CalibrationRequest(token_ids() if dataset is None else dataset, None, None)
    recipe = make_recipe(**{"group_size": GROUP_SIZE, **options})
    return prepare(
        open_source(source), recipe, request, ignore=("lm_head",), device=torch.device("cpu"), dtype=torch.float32,
        activations=activations,
    )  # fmt: skip


def needs_of(source, dataset=None, activations="auto", **options):
    return prepared(source, dataset, activations, **options).needs


def plan_of(source, dataset=None, **options):
    return prepared(source, dataset, **options).plan


def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path):
    few, many = (
        needs_of(save_model("llama", tmp_path / str(count), num_hidden_layers=count), activations="disk")
        for count in (2, 6)
    )
    assert few.stages[BLOCKS] == many.stages[BLOCKS]
    # but for what windows leave between the blocks, of which there is so much as there is room for
    states = "states between blocks"
    assert few.stages[GRADIENTS][states] < many.stages[GRADIENTS][states]
    assert {**few.stages[GRADIENTS], states: 0} == {**many.stages[GRADIENTS], states: 0}
    assert many.disk["finished blocks"] > 1.5 * few.disk["finished blocks"]


def test_stages_are_those_that_the_recipe_has(tmp_path):
    source = save_model("llama", tmp_path / "source")
    assert [*needs_of(source, quality="fast").stages] == [BLOCKS]
    assert [*needs_of(source, quality="balanced").stages] == [GRADIENTS, BLOCKS]
    tuned = needs_of(source, token_ids(8), quality="best", rotate=False)
    assert [*tuned.stages] == [GRADIENTS, BLOCKS, TUNING]
    assert [*needs_of(source, dataset="self").stages] == [TEXT, GRADIENTS, BLOCKS]
    assert [*needs_of(source, dataset="self", method="rtn").stages] == [BLOCKS]  # which reads no text
    for stage, parts in tuned.stages.items():
        assert sum(parts.values()) <= sum(tuned.memory.values())
        assert all(count >= 0 for count in parts.values()), stage


def test_text_of_its_own_takes_the_whole_model(tmp_path):
    needs = needs_of(save_model("llama", tmp_path / "source"), dataset="self")
    assert "model" in needs.stages[TEXT]
    assert "model" not in needs.stages[BLOCKS]


def memory_of(source, windows, *, streamed=True, threads=2, **options):
    """The stages' memory of a run with 40 windows, before it is known what is free."""
    network, plan = build_empty(open_source(source), torch.float32), plan_of(source, windows, **options)
    return StageMemory(
        network, plan, make_recipe(group_size=GROUP_SIZE, **options), streamed=streamed, activations="memory",
        output_hessians="memory", threads=threads, writes_text=False, writes_in_a_copy=False,
    )  # fmt: skip


@pytest.fixture
def many(tmp_path):
    return save_model("llama", tmp_path / "source"), token_ids(40)


def of_one_window(memory):
    """What one more window takes in the gradients' stage, beyond what each thread works with."""
    one, two = (
        sum(replace(memory, threads=1, windows_together=count).stages()[GRADIENTS].values()) for count in (1, 2)
    )
    return two - one


def needs_on_gpu(memory, free=None, gpu_free=None, **options):
    return estimate_requirements(
        memory.network, memory.plan, memory.recipe, 0, free=free, gpu_free=gpu_free,
        **{"streamed": True, "activations": "auto", "device": torch.device("cuda"), "stored_dtype": None,
           "whole_for_text": False, **options},
    )  # fmt: skip


def test_states_on_a_gpu_follow_its_memory_and_not_that_of_the_system(many, monkeypatch):
    source, windows = many
    memory = memory_of(source, windows)
    free = sum(memory.stages()[GRADIENTS].values())  # of one window
    monkeypatch.setattr("matgptq.quantization.preparation.available_memory", lambda: free)
    assert needs_of(source, windows).windows_together == 1
    assert needs_on_gpu(memory, free=free).windows_together == 40
    for count in (1, 7, 39):
        on_gpu = replace(memory, on_gpu=True, threads=1, windows_together=count)
        of_stage = sum(on_gpu.gpu_stages()[GRADIENTS].values())
        assert needs_on_gpu(memory, gpu_free=of_stage).windows_together == count


def test_a_run_on_a_gpu_holds_there_what_one_on_a_cpu_holds_in_memory(many):
    memory = memory_of(*many)
    on_gpu = replace(memory, on_gpu=True)
    assert not memory.gpu_stages()
    here, there = on_gpu.stages(), on_gpu.gpu_stages()
    for stage, parts in memory.stages().items():
        beside = {name for name in parts if name in here[stage]}
        assert beside == ({"program", "output Hessians"} if stage == GRADIENTS else {"program"})
        assert {**{name: here[stage][name] for name in beside}, **there[stage]}.items() >= parts.items()
    largest = max(each.numel() for each in memory.network.parameters()) * 4
    assert all(parts["tensors between files and GPU"] >= largest for parts in here.values())


def test_what_has_a_choice_of_its_place_stays_where_there_is_room(many):
    memory = memory_of(*many)
    states = memory.plan.nsamples * entering_bytes(memory.network, memory.plan)
    sums = output_hessian_bytes(memory.plan.blocks, memory.plan.rows_together)
    assert needs_on_gpu(memory).activations == "memory"
    assert needs_on_gpu(memory, free=1 << 40, gpu_free=4 * states).activations == "disk"
    small = needs_on_gpu(memory, free=4 * sums + 4, gpu_free=4 * states + 4)
    assert (small.activations, small.output_hessians) == ("memory", "memory")
    smaller = needs_on_gpu(memory, free=4 * sums, gpu_free=4 * states + 4)
    assert (smaller.activations, smaller.output_hessians) == ("memory", "disk")


def test_too_little_memory_of_a_gpu(many, tmp_path):
    memory = memory_of(*many)
    needs = needs_on_gpu(memory, free=1 << 40, gpu_free=1 << 40)
    check_requirements(needs, tmp_path / "out")
    wanted = sum(needs.gpu_memory.values())
    assert wanted == max(sum(parts.values()) for parts in needs.gpu_stages.values())
    check_requirements(replace(needs, gpu_free=wanted), tmp_path / "out")
    message = f"of GPU memory while {needs.gpu_fullest}, .* are free: --activations disk, or .*, or --device cpu$"
    with pytest.raises(ConfigurationError, match=message):
        check_requirements(replace(needs, gpu_free=wanted - 1), tmp_path / "out")
    # all of it in the system's memory would not fit; it is not there
    check_requirements(replace(needs, free=sum(needs.memory.values())), tmp_path / "out")
    with pytest.raises(ConfigurationError, match="of memory while"):
        check_requirements(replace(needs, free=sum(needs.memory.values()) - 1), tmp_path / "out")


def test_what_a_gpu_has_free(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 30)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 20)
    assert gpu_memory(torch.device("cuda")) == 110
    assert gpu_memory(torch.device("cpu")) is None
    assert [has_own_memory(torch.device(name)) for name in ("cuda", "cpu", "mps")] == [True, False, False]


def test_a_model_in_memory_is_not_counted_twice(tmp_path, monkeypatch):
    """What was free is asked before the model is read."""
    source = save_model("llama", tmp_path / "source")
    monkeypatch.setattr("matgptq.quantization.preparation.can_stream", lambda _: False)
    free = [1 << 40]
    monkeypatch.setattr("matgptq.quantization.preparation.available_memory", lambda: free[0])
    load = ModelSource.load_model

    def load_and_fill(*arguments):
        free[0] = 0
        return load(*arguments)

    monkeypatch.setattr(ModelSource, "load_model", load_and_fill)
    needs = needs_of(source)
    assert not needs.streamed
    assert free == [0]
    check_requirements(needs, tmp_path / "out")


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("rows_together", [0, 4096])
def test_windows_whose_gradients_are_found_at_a_time(streamed, rows_together, many):
    memory = memory_of(*many, streamed=streamed, rows_together=rows_together)
    assert memory.with_windows(None).windows_together == 40
    assert memory.with_windows(0).windows_together == 1
    assert memory.with_windows(1 << 40).windows_together == 40
    # no more than what the rest of the stage leaves: what is said to be enough is enough
    for count in (2, 7, 39):
        fitting = replace(memory, windows_together=count)
        free = sum(fitting.stages()[GRADIENTS].values())
        assert memory.with_windows(free).windows_together == count
        assert memory.with_windows(free - 1).windows_together == count - 1


def test_no_more_than_a_quarter_of_memory_goes_to_windows(many, monkeypatch):
    monkeypatch.setattr("matgptq.quantization.stage_memory._PROGRAM_BYTES", 0)
    memory = memory_of(*many)
    monkeypatch.setattr(StageMemory, "_weights", lambda _: {})
    monkeypatch.setattr(StageMemory, "_graph", lambda *_: 0)
    monkeypatch.setattr(StageMemory, "_logits", lambda *_: 0)
    memory = replace(memory, output_hessians="disk")
    of_one = of_one_window(memory)
    assert of_one > states_bytes(memory.network, memory.plan)  # and the gradients that are kept of a block
    assert memory.with_windows(4 * 7 * of_one).windows_together == 7


def test_blocks_that_stay_in_memory_are_not_run_over_more_windows_than_bring_something(many, monkeypatch):
    memory = memory_of(*many, streamed=False)
    states = states_bytes(memory.network, memory.plan)
    monkeypatch.setattr("matgptq.quantization.stage_memory._STATES_BYTES", 5 * states)
    assert memory.with_windows(None).windows_together == 5
    assert memory.with_windows(1 << 40).windows_together == 5
    assert replace(memory, threads=8).with_windows(1 << 40).windows_together == 8
    assert replace(memory, streamed=True).with_windows(1 << 40).windows_together == 40


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
@pytest.mark.parametrize("fast", [True, False])
def test_text_in_bfloat16_takes_a_copy_of_what_is_stored_in_more(fast, stored, tmp_path, monkeypatch):
    source = save_model("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": stored}))
    monkeypatch.setattr(self_text, "multiplies_bfloat16", lambda device: fast)
    needs = needs_of(source, dataset="self")
    assert needs.writes_text
    rounded = needs.stages[TEXT].get("the same in 16 bits", 0)
    assert rounded == (needs.stages[TEXT]["model"] // 2 if fast and stored == "float32" else 0)


def test_where_activations_go(tmp_path, monkeypatch):
    source = save_model("llama", tmp_path / "source")
    assert needs_of(source).activations == "memory"
    monkeypatch.setattr("matgptq.quantization.preparation.available_memory", lambda: 1000)
    assert needs_of(source).activations == "disk"
    assert needs_of(source, activations="memory").activations == "memory"
    with pytest.raises(ConfigurationError, match="memory, on disk or auto, not 'tape'"):
        needs_of(source, activations="tape")


def test_where_output_hessians_go(tmp_path, monkeypatch):
    source = save_model("llama", tmp_path / "source")
    needs = needs_of(source)
    assert needs.output_hessians == "memory"
    size = needs.stages[GRADIENTS]["output Hessians"]
    assert size == needs.disk["output Hessians"] > 0
    assert needs_of(source, activations="disk").output_hessians == "disk"
    monkeypatch.setattr("matgptq.quantization.preparation.available_memory", lambda: 4 * size)
    elsewhere = needs_of(source, activations="memory")
    assert elsewhere.output_hessians == "disk"
    assert "output Hessians" not in elsewhere.stages[GRADIENTS]
    assert elsewhere.disk["output Hessians"] == 2 * size  # those that are summed, and those that are kept
    alone = needs_of(source, rows_together=0)
    assert not any("output Hessians" in parts for parts in alone.stages.values())


def test_fewer_rows_are_solved_together_where_their_matrices_would_be_large(tmp_path, monkeypatch):
    source = save_model("llama", tmp_path / "source")
    whole = plan_of(source)
    assert whole.rows_together == 4096
    assert not any("together" in note for note in whole.notes)
    monkeypatch.setattr("matgptq.quantization.plan._OUTPUT_HESSIAN_BYTES", output_hessian_bytes(whole.blocks, 4096) - 1)
    fewer = plan_of(source)
    assert 1 < fewer.rows_together < 256
    assert output_hessian_bytes(fewer.blocks, fewer.rows_together) < output_hessian_bytes(whole.blocks, 4096)
    assert f"at most {fewer.rows_together} rows are solved together" in " ".join(fewer.notes)
    monkeypatch.setattr("matgptq.quantization.plan._OUTPUT_HESSIAN_BYTES", 0)
    assert plan_of(source, rows_together=0).rows_together == 0
    matgptq.quantize(source, tmp_path / "out", dataset=token_ids(), group_size=GROUP_SIZE)
    assert torch.isfinite(matgptq.load(tmp_path / "out", bits=4)(token_ids()).logits).all()


def test_too_little_memory_is_refused_before_the_first_token(tmp_path, monkeypatch):
    source = save_model("llama", tmp_path / "source")
    monkeypatch.setattr("matgptq.quantization.preparation.available_memory", lambda: 500_000_000)
    monkeypatch.setattr("matgptq.quantization.run.calibration_windows", lambda *_, **__: pytest.fail("text was read"))
    message = r"about 0\.\d GB of memory while blocks are solved, 0\.5 GB are free: --activations disk, or fewer"
    with pytest.raises(ConfigurationError, match=message):
        matgptq.quantize(
            source, tmp_path / "out", dataset=token_ids(), group_size=GROUP_SIZE, activations="memory", quality="fast"
        )
    # Where the whole model is what takes most: it is written with as a whole, and read block by block otherwise.
    monkeypatch.setattr("matgptq.quantization.stage_memory._SWEEP_BYTES", 0)
    large = save_model("llama", tmp_path / "large", shape={"vocab_size": 1 << 16})
    with pytest.raises(ConfigurationError, match=r"while the model writes text, .*a text of your own \(--dataset\)"):
        matgptq.quantize(large, tmp_path / "out", dataset="self", group_size=GROUP_SIZE, quality="fast")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["large", "source"]


@pytest.mark.parametrize(
    ("stage", "advice"),
    [
        (TEXT, r"a text of your own \(--dataset\)"),
        (GRADIENTS, "--activations disk, or fewer or shorter windows"),
        (TUNING, "--quality balanced, which tunes nothing"),
    ],
)
def test_what_would_take_less_memory_depends_on_the_stage(stage, advice, tmp_path):
    needs = needs_of(save_model("llama", tmp_path / "source"), activations="memory")
    needs = replace(needs, stages={**needs.stages, stage: {"something large": 1 << 60}})
    with pytest.raises(ConfigurationError, match=f"while {stage}, .* are free: {advice}"):
        check_requirements(needs, tmp_path / "out")


def test_too_little_disk(tmp_path, monkeypatch):
    needs = needs_of(save_model("llama", tmp_path / "source"))
    check_requirements(needs, tmp_path / "not" / "there" / "out")

    class Usage:
        free = 10_000

    monkeypatch.setattr("matgptq.quantization.requirements.shutil.disk_usage", lambda _: Usage)
    with pytest.raises(ConfigurationError, match=r"of disk while it runs, 0\.0 GB are free at"):
        check_requirements(needs, tmp_path / "out")
    check_requirements(needs, tmp_path / "out", sum(needs.disk.values()) - 10_000)  # the rest lies there already


def test_what_this_machine_has():
    free = available_memory()
    assert free is None or free > 0


def test_time_is_said_where_there_is_something_to_go_by(tmp_path):
    source = save_model("llama", tmp_path / "source")

    def seconds(device="cpu", text=None, **options):
        recipe = make_recipe(group_size=GROUP_SIZE, **options)
        return estimate_seconds(plan_of(source, text, **options), recipe, torch.device(device), 256)

    assert seconds(quality="balanced") > 0
    assert seconds(method="rtn") == 0
    steps = {"tuned_bits": (2,), "tuning_steps": 10_000}
    assert seconds(text=token_ids(8), quality="balanced", **steps) > 10 * seconds(text=token_ids(8), quality="balanced")
    assert seconds("cuda", quality="balanced") is None


def test_time_grows_with_the_square_of_columns_and_with_what_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr("matgptq.quantization.run_time._products_per_second", lambda: 1e11)
    monkeypatch.setattr("matgptq.quantization.run_time._seconds_per_square", lambda recipe, device: 1e-9)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    plan = plan_of(save_model("llama", tmp_path / "source"))
    squares = sum(layer.out_features * layer.in_features**2 for layer in plan.layers.values())

    def seconds(**options):
        recipe = make_recipe(group_size=GROUP_SIZE, **options)
        return estimate_seconds(plan_of(tmp_path / "source", **options), recipe, torch.device("cpu"), 256)

    alone, joined = seconds(quality="balanced", rows_together=0), seconds(quality="balanced")
    assert squares * 1e-9 < alone < joined < 4 * alone


def test_experts_take_the_time_of_the_tokens_that_are_given_to_them(tmp_path, monkeypatch):
    monkeypatch.setattr("matgptq.quantization.run_time._products_per_second", lambda: 1.0)
    monkeypatch.setattr("matgptq.quantization.run_time._seconds_per_square", lambda recipe, device: 0.0)
    source, options = save_model("mixtral", tmp_path / "source"), {"rows_together": 0, "group_size": GROUP_SIZE}

    def seconds(share, **more):
        plan = replace(prepared(source, **{**options, **more}).plan, expert_share=share)
        return estimate_seconds(plan, make_recipe(**options, **more), torch.device("cpu"), 256)

    plan = plan_of(source, rows_together=0)
    assert plan.expert_share == 2 / 4  # of four experts, two for each token
    assert seconds(0.0) > 0
    assert seconds(0.5) == pytest.approx((seconds(0.0) + seconds(1.0)) / 2)
    assert seconds(0.5, all_experts=True) == pytest.approx(seconds(1.0))
    assert plan_of(save_model("llama", tmp_path / "llama")).expert_share == 1


def test_only_rows_that_are_solved_together_take_as_long_as_those(tmp_path, monkeypatch):
    monkeypatch.setattr("matgptq.quantization.run_time._products_per_second", lambda: 1e30)
    monkeypatch.setattr("matgptq.quantization.run_time._seconds_per_square", lambda recipe, device: 1.0)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    plan = plan_of(save_model("mixtral", tmp_path / "source"), quality="balanced")
    squares = {name: layer.out_features * layer.in_features**2 for name, layer in plan.layers.items()}
    experts = sum(count for name, count in squares.items() if ".experts." in name)
    seconds = estimate_seconds(plan, make_recipe(group_size=GROUP_SIZE), torch.device("cpu"), 256)
    assert seconds == pytest.approx(2 * sum(squares.values()) - experts)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_time_of_tuning_grows_with_steps_and_widths(threads, tmp_path, monkeypatch):
    monkeypatch.setattr("matgptq.quantization.run_time._products_per_second", lambda: 1e15)
    monkeypatch.setattr("matgptq.quantization.run_time._seconds_per_square", lambda recipe, device: 0.0)
    monkeypatch.setattr("matgptq.quantization.run_time._seconds_per_gradient", lambda device: 1e-9)
    monkeypatch.setattr("matgptq.quantization.run_time._seconds_of_logits", lambda hidden: _OfLogits(1e-9, 1e-9))
    monkeypatch.setattr("matgptq.quantization.run_time._TUNING_FACTOR", 1.0)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    plan = plan_of(save_model("llama", tmp_path / "source"))
    weights = sum(layer.out_features * layer.in_features for layer in plan.layers.values())

    def seconds(vocabulary, **options):
        return estimate_seconds(plan, make_recipe(group_size=GROUP_SIZE, **options), torch.device("cpu"), vocabulary)

    # a step has two windows of 512 tokens, which two threads share
    of_a_step = 2 / min(threads, 2) * 512 * (weights + 256) * 1e-9
    one = seconds(256, tuned_bits=(2,), tuning_steps=100)
    assert seconds(256, tuned_bits=(2,), tuning_steps=101) - one == pytest.approx(of_a_step, rel=1e-3)
    assert seconds(256, tuned_bits=(2, 3, 4), tuning_steps=100) == pytest.approx(3 * one, rel=1e-3)
    assert seconds(512, tuned_bits=(2,), tuning_steps=100) > one > 100 * of_a_step


def test_samples_take_time():
    assert _seconds_per_gradient(torch.device("cpu")) > 0
    assert min(_seconds_of_logits(64)) > 0


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
