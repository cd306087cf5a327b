"""``matgptq.refine`` on tiny checkpoints: quality, what stays, going on after a kill, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import VOCAB, token_ids

import matgptq
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.core.grid import storable_scales
from matgptq.errors import CalibrationError, CheckpointError, ConfigurationError, SourceError, UnsupportedModelError
from matgptq.tuning import run as tuning_run
from matgptq.tuning import workspace as tuning_workspace
from matgptq.tuning.text import HELD_OUT
from matgptq.tuning.workspace import TuningWorkspace

TEXT = "\n".join(f"document {n}: the quick brown fox jumps over the lazy dog" for n in range(60))


@pytest.fixture
def windows() -> torch.Tensor:
    return token_ids(12, 16, seed=3)


@pytest.fixture
def unseen() -> torch.Tensor:
    return torch.randint(2, VOCAB - 8, (3, 24), generator=torch.Generator().manual_seed(5))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            found.update({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    return found


def kl(path: Path, bits: int, text: torch.Tensor) -> float:
    value = matgptq.evaluate(path, (bits,), text=text).results[0].kl
    assert value is not None
    return value


def leftovers(path: Path) -> list[Path]:
    return [each for each in path.parent.iterdir() if each.name.startswith(f".{path.name}")]


@pytest.mark.parametrize(("scope", "steps", "rate"), [("model", 24, 1e-2), ("block", 96, 3e-3)])
def test_two_widths_get_better_and_nothing_else_changes(
    scope: str, steps: int, rate: float, checkpoint: Path, unseen: torch.Tensor
) -> None:
    windows = token_ids(96, 24, seed=3)  # enough that what is learnt from them holds elsewhere
    before, kl_before = tensors(checkpoint), [kl(checkpoint, bits, unseen) for bits in (2, 3)]
    results = matgptq.refine(checkpoint, (2, 3), steps=steps, scope=scope, dataset=windows, learning_rate=rate)
    assert [result.bits for result in results] == [2, 3]
    assert all(result.kl_after < result.kl_before for result in results), results
    new = [kl(checkpoint, bits, unseen) for bits in (2, 3)]
    assert all(n < old for n, old in zip(new, kl_before, strict=True)), (new, kl_before, results)

    after = tensors(checkpoint)
    assert list(after) == list(before)
    for name, tensor in after.items():
        tuned = name.endswith(("scales_2", "scales_3"))
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)) != tuned, name
        if tuned:
            assert torch.equal(tensor.float(), storable_scales(tensor.float()))
            assert torch.equal(tensor.sign(), before[name].sign())
    record = open_checkpoint(checkpoint).settings.refinement
    assert set(record) == {"2", "3"}
    assert record["2"]["kl_after"] == results[0].kl_after
    assert record["2"]["scope"] == scope
    assert json.loads((checkpoint / "report.json").read_text())["refinement"] == record
    assert not leftovers(checkpoint)


def test_held_out_kl_is_what_evaluation_measures(checkpoint: Path, windows: torch.Tensor) -> None:
    held_out = windows[-HELD_OUT:]
    (result,) = matgptq.refine(checkpoint, (3,), steps=8, dataset=windows)
    model = matgptq.load(checkpoint, 3)
    from matgptq.models.source import open_source

    full = open_source(open_checkpoint(checkpoint).settings.source).load_model(torch.float32)
    total = 0.0
    with torch.no_grad():
        for window in held_out:
            p, q = (torch.log_softmax(each(input_ids=window[None]).logits[0].double(), -1) for each in (full, model))
            total += float((p.exp() * (p - q)).sum(-1).mean()) / len(held_out)
    assert result.kl_after == pytest.approx(total, rel=1e-3)


def test_not_better_is_not_written(checkpoint: Path, windows: torch.Tensor) -> None:
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    (result,) = matgptq.refine(checkpoint, (8,), steps=4, dataset=windows, learning_rate=3.0)
    assert result.kl_after == result.kl_before
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before
    assert not leftovers(checkpoint)


class Listener:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def start(self, stage: str, total: int) -> None: ...
    def advance(self, steps: int = 1) -> None: ...
    def note(self, message: str) -> None:
        self.notes.append(message)


@contextmanager
def interrupt(event: int, *, before: bool) -> Iterator[None]:
    """Raise at the n-th time that something is written, beside the checkpoint or in its place."""
    count = 0

    def interrupted(function):
        def wrapper(*arguments, **options):
            nonlocal count
            count += 1
            if count == event and before:
                raise KeyboardInterrupt
            function(*arguments, **options)
            if count == event:
                raise KeyboardInterrupt

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for write in (tuning_workspace.write_text, tuning_workspace.save_tensors):
            patch.setattr(tuning_workspace, write.__name__, interrupted(write))
        patch.setattr(tuning_run, "replace_scales", interrupted(tuning_run.replace_scales))
        yield


# Writes of a run with 3 steps: run.json, teacher, state of 2 bits at the start and after each step, the checkpoint,
# and the same for 3 bits. By blocks: run.json, teacher, each of 2 blocks, the end, the checkpoint, and so on.
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("scope", "event"),
    [*(("model", event) for event in (1, 2, 5, 7, 10)), *(("block", event) for event in (3, 5, 6))],
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    scope: str, event: int, before: bool, checkpoint: Path, windows: torch.Tensor
) -> None:
    other = shutil.copytree(checkpoint, checkpoint.with_name("uninterrupted"))
    options = {"steps": 3, "scope": scope, "dataset": windows, "learning_rate": 1e-2}
    matgptq.refine(other, (2, 3), **options)
    first, second = Listener(), Listener()
    with interrupt(event, before=before), pytest.raises(KeyboardInterrupt):
        matgptq.refine(checkpoint, (2, 3), **options, progress=first)
    open_checkpoint(checkpoint)
    assert bool(leftovers(checkpoint)) == (event > 1 or not before)
    results = matgptq.refine(checkpoint, (2, 3), **options, progress=second)
    assert [result.bits for result in results] == [2, 3]
    if event > 1:
        assert any("same command" in note for note in first.notes)
        assert any("going on" in note for note in second.notes)
    assert not leftovers(checkpoint)
    for name in ("model.safetensors", "config.json", "report.json"):
        assert (checkpoint / name).read_bytes() == (other / name).read_bytes()


def test_another_run_begins_anew(checkpoint: Path, windows: torch.Tensor) -> None:
    def stop_at(event: int, **options) -> None:
        with interrupt(event, before=False), pytest.raises(KeyboardInterrupt):
            matgptq.refine(checkpoint, (2,), dataset=windows, **options)

    stop_at(4, steps=3)
    listener = Listener()
    matgptq.refine(checkpoint, (2,), steps=4, dataset=windows, progress=listener)
    assert any("schedule changed" in note for note in listener.notes)
    stop_at(4, steps=3)
    (directory,) = leftovers(checkpoint)
    kept = shutil.copytree(directory, checkpoint.with_name("kept"))
    matgptq.refine(checkpoint, (2,), steps=3, dataset=windows)
    matgptq.refine(checkpoint, (2,), steps=5, dataset=windows)
    shutil.copytree(kept, directory)
    listener = Listener()
    matgptq.refine(checkpoint, (2,), steps=3, dataset=windows, progress=listener)
    assert any("scales of 2 bits changed" in note for note in listener.notes)


def test_a_width_without_scales_of_its_own_gets_them(
    make_checkpoint, tmp_path: Path, windows: torch.Tensor, unseen: torch.Tensor
) -> None:
    out = tmp_path / "out"
    matgptq.quantize(make_checkpoint("llama")[0], out, method="rtn", group_size=32, shard_bytes=30_000)
    assert open_checkpoint(out).settings.scale_bits == (8,)
    old = {bits: kl(out, bits, unseen) for bits in (2, 3, 4, 5, 8)}
    matgptq.refine(out, (4,), steps=12, dataset=windows, learning_rate=1e-2)
    settings = open_checkpoint(out).settings
    assert settings.scale_bits == (3, 4, 8)  # 3, and 2 through it, go on reading what they read before
    new = {bits: kl(out, bits, unseen) for bits in old}
    assert new[4] < old[4]
    assert {bits: new[bits] for bits in (2, 3, 5, 8)} == {bits: old[bits] for bits in (2, 3, 5, 8)}


def test_text_of_the_calibration_is_used_again(
    make_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT)
    matgptq.quantize(make_checkpoint("llama")[0], out, group_size=32, dataset=text, nsamples=2, seqlen=16)
    matgptq.refine(out, (2,), steps=6, nsamples=2, seqlen=16, learning_rate=1e-2)
    assert "text.txt" in open_checkpoint(out).settings.refinement["2"]["text"]
    matgptq.refine(out, (3,), steps=6, learning_rate=1e-2)  # fewer windows than it would like to have
    assert "text.txt" in open_checkpoint(out).settings.refinement["3"]["text"]

    text.unlink()
    monkeypatch.setenv("MATGPTQ_CACHE", str(tmp_path / "cache"))
    listener = Listener()
    matgptq.refine(out, (4,), steps=6, nsamples=2, seqlen=16, learning_rate=1e-2, progress=listener)
    assert any("text.txt" in note and "--dataset" in note for note in listener.notes)
    assert "the model itself" in open_checkpoint(out).settings.refinement["4"]["text"]


def test_files_may_be_links(checkpoint: Path, windows: torch.Tensor) -> None:
    """As in the cache of the hub: relative ones, to files that go by their hashes."""
    blobs = checkpoint.parent / "blobs"
    blobs.mkdir()
    for file in [file for file in checkpoint.iterdir() if file.is_file()]:
        file.rename(blobs / file.name)
        file.symlink_to(Path("..") / "blobs" / file.name)
    (result,) = matgptq.refine(checkpoint, (2,), steps=8, dataset=windows, learning_rate=1e-2)
    assert result.kl_after < result.kl_before
    assert (
        2 in open_checkpoint(checkpoint).settings.refinement or "2" in open_checkpoint(checkpoint).settings.refinement
    )
    assert not leftovers(checkpoint)


def test_a_damaged_file_of_an_interrupted_run_is_no_dead_end(checkpoint: Path, windows: torch.Tensor) -> None:
    options = {"dataset": windows, "steps": 3, "learning_rate": 1e-2}
    with interrupt(5, before=False), pytest.raises(KeyboardInterrupt):
        matgptq.refine(checkpoint, (2,), **options)
    (directory,) = leftovers(checkpoint)
    for name in ("state-2.safetensors", "teacher.safetensors"):
        (directory / name).write_bytes(b"short")
    listener = Listener()
    matgptq.refine(checkpoint, (2,), **options, progress=listener)
    assert any("damaged" in note and "beginning anew" in note for note in listener.notes)


def test_a_second_process_is_refused(checkpoint: Path, windows: torch.Tensor) -> None:
    with (
        TuningWorkspace(open_checkpoint(checkpoint), Listener()),
        pytest.raises(CheckpointError, match="another process is tuning"),
    ):
        matgptq.refine(checkpoint, (2,), dataset=windows)


def test_of_a_mix_the_texts_that_can_be_read_again(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["calibration"]["dataset"] = f"{text},self"
    (checkpoint / "config.json").write_text(json.dumps(config))
    matgptq.refine(checkpoint, (2,), steps=2, seqlen=16, learning_rate=1e-2)
    assert "text.txt" in open_checkpoint(checkpoint).settings.refinement["2"]["text"]


def test_refusals(checkpoint: Path, tmp_path: Path, windows: torch.Tensor) -> None:
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    with pytest.raises(ConfigurationError, match="not 9"):
        matgptq.refine(checkpoint, (2, 9), dataset=windows)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        matgptq.refine(tmp_path, (2,), dataset=windows)
    with pytest.raises(ConfigurationError, match="scope"):
        matgptq.refine(checkpoint, (2,), scope="galaxy", dataset=windows)
    with pytest.raises(ConfigurationError, match="steps"):
        matgptq.refine(checkpoint, (2,), steps=0, dataset=windows)
    with pytest.raises(CalibrationError, match="4 are held out"):
        matgptq.refine(checkpoint, (2,), dataset=windows[:4])
    short = tmp_path / "short.txt"
    short.write_text("too short\n")
    with pytest.raises(CalibrationError, match="too little text"):
        matgptq.refine(checkpoint, (2,), dataset=short)
    with pytest.raises(ConfigurationError, match="context"):
        matgptq.refine(checkpoint, (2,), dataset=short, seqlen=100_000)
    with pytest.raises(SourceError, match="nowhere"):
        matgptq.refine(checkpoint, (2,), dataset=windows, reference=tmp_path / "nowhere")
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["source"] = None
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="--reference"):
        matgptq.refine(checkpoint, (2,), dataset=windows)
    (checkpoint / "config.json").write_bytes(before["config.json"])
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before
    assert not leftovers(checkpoint)


def test_blocks_of_another_basis_are_refused(checkpoint: Path, make_checkpoint, windows: torch.Tensor) -> None:
    other = make_checkpoint("llama-biased")[0]
    with pytest.raises(UnsupportedModelError, match="--scope model"):
        matgptq.refine(checkpoint, (2,), scope="block", dataset=windows, reference=other)


def test_command_line(checkpoint: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from matgptq.cli import app

    text, table = tmp_path / "text.txt", tmp_path / "table.json"
    text.write_text(TEXT)
    arguments = ["refine", str(checkpoint), "--bits", "2", "--steps", "2", "--dataset", str(text), "--nsamples", "4",
                 "--seqlen", "16", "--json", str(table)]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "KL after" in result.output
    (record,) = json.loads(table.read_text())
    assert record["bits"] == 2
    assert record["history"][0] == [0, record["kl_before"]]
