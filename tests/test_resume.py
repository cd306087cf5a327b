"""Runs that are stopped anywhere go on from there, and end as if nothing had happened."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny_models import GROUP_SIZE, save_model, token_ids

import matgptq
from matgptq.errors import CheckpointError, ConfigurationError
from matgptq.quantization.work_directory import WorkDirectory, work_path
from matgptq.tuning import run as tuning_run

BLOCKS = 3


def quantize(source: Path, out: Path, **options):
    return matgptq.quantize(source, out, dataset=token_ids(), group_size=GROUP_SIZE, **options)


def what_counts(directory: Path) -> dict[str, object]:
    """Everything under a directory but times: ``log.jsonl``, and what ``report.json`` says about seconds."""
    files: dict[str, object] = {
        str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }
    files.pop("log.jsonl")
    report = json.loads(files["report.json"])
    for timed in (report, *report["layers"]):
        del timed["seconds"]
    del report["output"]
    return {**files, "report.json": report}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("model") / "source", torch.bfloat16, num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(source, out)
    return what_counts(out)


class Stop(Exception):
    """Something that goes wrong."""


def stop(*_: object, **__: object) -> None:
    raise Stop


def stop_after(monkeypatch, solves: int) -> None:
    import matgptq.quantization.block_quantizer as block_quantizer

    real, calls = block_quantizer.solve, []

    def solve(*arguments):
        calls.append(1)
        if len(calls) > solves:
            raise Stop
        return real(*arguments)

    monkeypatch.setattr(block_quantizer, "solve", solve)


@pytest.mark.parametrize("activations", ["memory", "disk"])
@pytest.mark.parametrize("solves", [4, 6, 8])
def test_the_same_command_goes_on(solves, activations, source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop_after(monkeypatch, solves)
    with pytest.raises(Stop):
        quantize(source, out, activations=activations)
    assert not out.exists()
    assert len(list(work_path(out).glob("block-*.json"))) == solves // 4
    monkeypatch.undo()
    stop_after(monkeypatch, 4 * BLOCKS - solves // 4 * 4)  # no finished block is solved again
    quantize(source, out, activations=activations)
    assert what_counts(out) == whole
    assert list(tmp_path.iterdir()) == [out]


def test_states_in_memory_are_kept_now_and_then(source, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("matgptq.quantization.run._SECONDS_BETWEEN_STATES", 0.0)
    stop_after(monkeypatch, 9)
    with pytest.raises(Stop):
        quantize(source, tmp_path / "out")
    assert [place.name for place in (work_path(tmp_path / "out") / "states-1-of-1").iterdir()] == ["000002"]
    monkeypatch.undo()
    monkeypatch.setattr("matgptq.quantization.run.QuantizationRun._install", lambda *_: pytest.fail("was run again"))
    quantize(source, tmp_path / "out")
    assert what_counts(tmp_path / "out") == whole


@pytest.mark.parametrize("activations", ["memory", "disk"])
def test_output_hessians_are_there_before_token_weights(activations, source, whole, tmp_path, monkeypatch):
    """Killed between the two, a run finds both again."""
    out = tmp_path / "out"
    real = WorkDirectory.keep

    def keep(work, name, tensors):
        if name == "token_weights.safetensors":
            assert (work.path / "outputs-00001.safetensors").is_file()
            shutil.copytree(work.path, tmp_path / "left")  # as a process leaves it that is killed
            raise Stop
        real(work, name, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(WorkDirectory, "keep", keep)
        with pytest.raises(Stop):
            quantize(source, out, activations=activations)
    (tmp_path / "left").rename(work_path(out))
    quantize(source, out, activations=activations)
    assert what_counts(out) == whole


def test_what_gradients_say_is_kept_before_the_first_block_is_finished(source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for solves in (3, 0):  # the second time it stops before anything was looked at
        with monkeypatch.context() as patch:
            stop_after(patch, solves)
            if not solves:
                patch.setattr("matgptq.quantization.quantize.prepare", stop)
            with pytest.raises(Stop):
                quantize(source, out)
        assert (work_path(out) / "token_weights.safetensors").is_file()
    monkeypatch.setattr(
        "matgptq.quantization.calibration_gradients.token_saliency", lambda *_, **__: pytest.fail("was found again")
    )
    quantize(source, out)
    assert what_counts(out) == whole
    assert list(tmp_path.iterdir()) == [out]


def test_a_text_that_the_model_wrote_is_kept(source, tmp_path, monkeypatch):
    options = {"nsamples": 2, "seqlen": 16, "group_size": GROUP_SIZE, "quality": "fast"}
    matgptq.quantize(source, tmp_path / "whole", dataset="self", **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        with pytest.raises(Stop):
            matgptq.quantize(source, tmp_path / "out", dataset="self", **options)
    monkeypatch.setattr(
        "matgptq.quantization.run.calibration_windows", lambda *_, **__: pytest.fail("was written again")
    )
    matgptq.quantize(source, tmp_path / "out", dataset="self", **options)
    assert what_counts(tmp_path / "out") == what_counts(tmp_path / "whole")


def test_nothing_found_nothing_left(source, tmp_path, monkeypatch):
    monkeypatch.setattr("matgptq.quantization.calibration_gradients.token_saliency", stop)
    with pytest.raises(Stop):
        quantize(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_arguments_than_those_of_gradients_begin_anew(source, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        with pytest.raises(Stop):
            quantize(source, tmp_path / "out", seed=1)
    quantize(source, tmp_path / "out")
    assert what_counts(tmp_path / "out") == whole


def test_other_arguments_are_refused_by_name(source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop_after(monkeypatch, 5)
    with pytest.raises(Stop):
        quantize(source, out)
    monkeypatch.undo()
    with pytest.raises(ConfigurationError, match=r"recipe\.damping: 0\.02, was 0\.01.*--no-resume"):
        quantize(source, out, damping=0.02)
    with pytest.raises(ConfigurationError, match=r"text: .*, was ") as refusal:
        matgptq.quantize(source, out, dataset=token_ids(seed=1), group_size=GROUP_SIZE)
    assert refusal.value.__traceback__ is not None  # held, as a notebook does: the lock is not
    changed = shutil.copytree(source, tmp_path / "changed")
    stored = bytearray((changed / "model.safetensors").read_bytes())
    stored[-1] ^= 1
    (changed / "model.safetensors").write_bytes(stored)
    with pytest.raises(ConfigurationError, match=r"model\.model\.safetensors: "):
        quantize(changed, out)
    moved = shutil.copytree(source, tmp_path / "moved")
    quantize(moved, out)  # the same files in another place are the same model
    assert what_counts(out).keys() == whole.keys()
    assert what_counts(out)["model.safetensors"] == whole["model.safetensors"]


@pytest.mark.parametrize("changed", ["b.txt", "source/tokenizer.json"])
def test_texts_and_tokenizer_are_part_of_a_run(changed, source, tmp_path, monkeypatch):
    shutil.copytree(source, tmp_path / "source")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"Here is {name}, and not much of it.\n" * 50)
    options = {"dataset": f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}", "nsamples": 8, "seqlen": 16}
    stop_after(monkeypatch, 5)
    with pytest.raises(Stop):
        matgptq.quantize(tmp_path / "source", tmp_path / "out", **options)
    file = tmp_path / changed
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ConfigurationError, match=r"text: |model\.tokenizer\.json: "):
        matgptq.quantize(tmp_path / "source", tmp_path / "out", **options)


@pytest.mark.parametrize("name", ["llama-biased", "mixtral"])
def test_a_rotated_and_scaled_model_goes_on_to_the_same_bytes(name, tmp_path, monkeypatch):
    """Biases and routers are both: rounded to what is stored, they feed the next block in either run."""
    source = save_model(name, tmp_path / "source", torch.bfloat16, num_hidden_layers=BLOCKS)
    options = {"rotate": True, "channel_scaling": 0.5}
    quantize(source, tmp_path / "whole", **options)
    stop_after(monkeypatch, len(matgptq.load(tmp_path / "whole").model.layers) * 3)
    with pytest.raises(Stop):
        quantize(source, tmp_path / "out", **options)
    monkeypatch.undo()
    quantize(source, tmp_path / "out", **options)
    assert what_counts(tmp_path / "out") == what_counts(tmp_path / "whole")


@pytest.mark.parametrize("widths_done", [0, 1])
def test_interrupted_tuning_goes_on(widths_done, source, tmp_path, monkeypatch):
    """The solve is not repeated, whatever has been tuned already."""
    options = {"quality": "fast", "tuned_bits": (2, 3), "tuning_steps": 16}  # leaves something to tune at both widths
    windows = token_ids(12)
    matgptq.quantize(source, tmp_path / "whole", dataset=windows, group_size=GROUP_SIZE, **options)
    real, calls = tuning_run.replace_scales, []

    def replace_scales(*arguments, **named):
        if len(calls) == widths_done:
            raise KeyboardInterrupt
        calls.append(1)
        real(*arguments, **named)

    monkeypatch.setattr(tuning_run, "replace_scales", replace_scales)
    with pytest.raises(KeyboardInterrupt):
        matgptq.quantize(source, tmp_path / "out", dataset=windows, group_size=GROUP_SIZE, **options)
    monkeypatch.undo()
    with pytest.raises(ConfigurationError, match=r"recipe\.seed: 1, was 0"):  # and throws nothing away
        matgptq.quantize(source, tmp_path / "out", dataset=windows, group_size=GROUP_SIZE, seed=1, **options)
    monkeypatch.setattr("matgptq.quantization.quantize.prepare", lambda *_, **__: pytest.fail("was begun again"))
    matgptq.quantize(source, tmp_path / "out", dataset=windows, group_size=GROUP_SIZE, **options)
    assert what_counts(tmp_path / "out") == what_counts(tmp_path / "whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "whole"]


def test_what_was_kept_and_is_damaged_is_named(source, tmp_path, monkeypatch):
    stop_after(monkeypatch, 5)
    with pytest.raises(Stop):
        quantize(source, tmp_path / "out")
    windows = work_path(tmp_path / "out") / "windows.safetensors"
    windows.write_bytes(windows.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"windows\.safetensors: damaged .*--no-resume"):
        quantize(source, tmp_path / "out")


def test_begin_anew(source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop_after(monkeypatch, 5)
    with pytest.raises(Stop):
        quantize(source, out, damping=0.02)
    monkeypatch.undo()
    quantize(source, out, resume=False)
    assert what_counts(out) == whole
    assert list(tmp_path.iterdir()) == [out]


def test_a_second_process_is_refused(source, tmp_path):
    with WorkDirectory(tmp_path / "out", {}), pytest.raises(CheckpointError, match="another process"):
        quantize(source, tmp_path / "out")


@pytest.mark.parametrize("force", [False, True])
def test_killed_between_commit_and_cleaning_up(force, source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    if force:
        quantize(source, out, method="rtn")
    monkeypatch.setattr(WorkDirectory, "drop_blocks", lambda _: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        quantize(source, out, force=force)
    monkeypatch.undo()
    monkeypatch.setattr("matgptq.quantization.quantize.prepare", lambda *_, **__: pytest.fail("was begun again"))
    report = quantize(source, out)
    assert len(report.layers) == 7 * BLOCKS
    assert what_counts(out) == whole
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(CheckpointError, match="exists already"):
        quantize(source, out)


# Forks a process for each attempt, so that PyTorch is imported once.
_ATTEMPTS = """
    import os, random, signal, sys, time
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    import transformers, matgptq, matgptq.quantization.quantize
    from pathlib import Path
    from tiny_models import GROUP_SIZE, token_ids

    source, out = Path({source!r}), Path({out!r})

    def attempt():
        child = os.fork()
        if child == 0:
            try:
                matgptq.quantize(source, out, dataset=token_ids(), group_size=GROUP_SIZE)
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(1)
            os._exit(0)
        return child

    def finished(number):
        os.rename(out, out.with_name(f"finished-{{number}}"))

    started = time.monotonic()
    assert os.waitpid(attempt(), 0)[1] == 0
    longest = time.monotonic() - started
    finished(0)
    rng, kills, runs = random.Random(0), 0, 1
    while kills < 20:
        child = attempt()
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            kills += 1
        else:
            assert status == 0
            finished(runs)
            runs += 1
    assert os.waitpid(attempt(), 0)[1] == 0
    finished(runs)
    print(runs + 1)
"""


def test_killed_at_random(source, whole, tmp_path):
    """kill -9 at 20 random moments; each process goes on from what the ones before it left."""
    code = _ATTEMPTS.format(tests=str(Path(__file__).parent), source=str(source), out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = int(done.stdout.split()[-1])
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(f"finished-{number}" for number in range(runs))
    for number in range(runs):
        assert what_counts(tmp_path / f"finished-{number}") == whole
