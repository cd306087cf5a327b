"""An allocation with scales of its own: tuned, served, exported, published, interrupted and damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, token_ids
from typer.testing import CliRunner

import matgptq
from matgptq.allocation import Allocation
from matgptq.checkpoints.allocation_scales import find_scales, save_scales, widths_scales
from matgptq.checkpoints.allocation_store import ALLOCATIONS, find_allocation, save_allocation
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.checkpoints.format import EXPORT_NAME
from matgptq.checkpoints.integrity import check_integrity
from matgptq.cli import app
from matgptq.core.grid import storable_scales
from matgptq.errors import AllocationError, ConfigurationError, ExportError, UnsupportedModelError
from matgptq.exports.verification import verify
from matgptq.inference.nested_linear import nested_layers
from matgptq.nested_weight import NestedWeight
from matgptq.progress import Silent
from matgptq.publishing.hub import prepare_upload, published_texts
from matgptq.tuning import run as tuning_run
from matgptq.tuning import workspace as tuning_workspace
from matgptq.tuning.goals import default_learning_rate
from matgptq.vllm_plugin.choice import Choice, chosen_layers

NAME = "3.5bpw"


@pytest.fixture
def windows() -> torch.Tensor:
    return token_ids(48, 24, seed=3)


@pytest.fixture
def unseen() -> torch.Tensor:
    return torch.randint(2, VOCAB - 8, (3, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def mixed(checkpoint: Path) -> Path:
    """The checkpoint with an allocation of widths 2, 3 and 5; the last has no copy in the solve."""
    opened = open_checkpoint(checkpoint)
    layers = {layer: (2, 3, 5)[number % 3] for number, layer in enumerate(opened.layers)}
    found = {"method": "by hand"}
    fitness = {"measure": "kl", "value": 1.0}
    save_allocation(
        opened,
        Allocation(
            NAME, opened.codes_identity, "by hand", 3.3, opened.bits_per_weight(layers), 1, 0, fitness, found, layers
        ),
    )
    return checkpoint


@pytest.fixture
def tuned(mixed: Path, windows: torch.Tensor) -> Path:
    matgptq.refine(mixed, allocation=NAME, steps=12, dataset=windows, learning_rate=1e-2)
    return mixed


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def kl(path: Path, text: torch.Tensor, **options: Any) -> float:
    value = matgptq.evaluate(path, text=text, **options).results[-1].kl
    assert value is not None
    return value


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids(1, 16)).logits


@pytest.mark.parametrize(("scope", "steps", "rate"), [("model", 24, 1e-2), ("block", 96, 3e-3)])
def test_it_gets_better_and_no_width_changes(
    scope: str, steps: int, rate: float, mixed: Path, windows: torch.Tensor, unseen: torch.Tensor
) -> None:
    before, kl_before = files(mixed), kl(mixed, unseen, allocation=NAME)
    (result,) = matgptq.refine(mixed, allocation=NAME, steps=steps, scope=scope, dataset=windows, learning_rate=rate)
    assert result.allocation == NAME
    assert 2 < result.bits < 5
    assert result.kl_after < result.kl_before
    assert kl(mixed, unseen, allocation=NAME) < kl_before
    assert files(mixed) == before  # weights, config and report
    opened = open_checkpoint(mixed)
    scales, start = find_scales(opened, NAME, _layers(mixed)), widths_scales(opened, opened.widths(_layers(mixed)))
    assert scales is not None
    for layer, each in scales.items():
        assert torch.equal(each.float(), storable_scales(each.float()))
        assert torch.equal(each.sign(), start[layer].sign())
    record = json.loads((mixed / ALLOCATIONS / f"{NAME}.json").read_text())
    assert record["refinement"]["kl_after"] == result.kl_after
    assert record["refinement"]["scope"] == scope
    assert not [each for each in mixed.parent.iterdir() if each.name.startswith(".")]


def _layers(checkpoint: Path) -> dict[str, int]:
    layers: dict[str, int] = json.loads((checkpoint / ALLOCATIONS / f"{NAME}.json").read_text())["layers"]
    return layers


def test_layers_move_at_the_rate_of_their_width(
    mixed: Path, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    paces = {}

    def tunable(run: Any, *arguments: Any) -> dict[str, Any]:
        tuned = original(run, *arguments)
        paces.update({name: layer.pace for name, layer in tuned.items()})
        return tuned

    original = tuning_run.TuningRun._tunable
    monkeypatch.setattr(tuning_run.TuningRun, "_tunable", tunable)
    matgptq.refine(mixed, allocation=NAME, steps=1, dataset=windows)
    rates = {layer: pace * default_learning_rate(2) for layer, pace in paces.items()}
    assert rates == {layer: default_learning_rate(bits) for layer, bits in _layers(mixed).items()}


def test_it_is_served_and_fixed(tuned: Path) -> None:
    opened = open_checkpoint(tuned)
    scales, layers = find_scales(opened, NAME, _layers(tuned)), _layers(tuned)
    assert scales is not None
    plain, own = matgptq.load(tuned, allocation=layers), matgptq.load(tuned, allocation=NAME)
    for name, layer in nested_layers(own).items():
        levels = nested_layers(plain)[name].nested_weight.codes
        expected = NestedWeight(levels, {8: scales[name]}).dequantize(layers[name])
        assert torch.equal(layer.dequantize(), expected), name
    assert not torch.equal(logits(plain), logits(own))
    with pytest.raises(AllocationError, match="scales of its own"):
        own.set_bits(4)
    own.set_bits(layers)
    with pytest.raises(ConfigurationError, match="one allocation"):
        own.save_pretrained(tuned.with_name("saved"))


def test_it_is_served_without_kernels(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = logits(matgptq.load(tuned, allocation=NAME))
    monkeypatch.setenv("MATGPTQ_KERNEL", "reference")
    model = matgptq.load(tuned, allocation=NAME)
    assert torch.allclose(logits(model), packed, rtol=1e-4, atol=1e-4)
    with pytest.raises(AllocationError, match="scales of its own"):
        model.set_bits(4)


def test_beside_widths_in_one_evaluation(tuned: Path, unseen: torch.Tensor) -> None:
    both = matgptq.evaluate(tuned, (3, 4), allocation=NAME, text=unseen).results
    alone = [kl(tuned, unseen, bits=(3,)), kl(tuned, unseen, bits=(4,)), kl(tuned, unseen, allocation=NAME)]
    assert [result.kl for result in both] == pytest.approx(alone, rel=1e-6)
    assert [result.allocation for result in both] == [None, None, NAME]


@pytest.mark.parametrize("format", ["matgptq-slice", "dense"])
def test_exports_hold_them(format: str, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / format
    matgptq.export(tuned, out, format=format, allocation=NAME, **({"dtype": "float32"} if format == "dense" else {}))
    assert verify(out, tuned).passed
    matgptq.export(tuned, tmp_path / "plain", format=format, allocation=_layers(tuned))
    record = json.loads((tmp_path / "plain" / "matgptq_export.json").read_text())
    assert "scales_of" not in record
    record = json.loads((out / "matgptq_export.json").read_text())
    del record["scales_of"]
    (out / "matgptq_export.json").write_text(json.dumps(record))
    assert not verify(out, tuned).passed  # with the scales of the widths they differ


@pytest.mark.parametrize("place", ["stored", "by path", "elsewhere", "a name with .json", "an early export"])
def test_verify_finds_the_scales_of_an_export(place: str, tuned: Path, tmp_path: Path) -> None:
    allocation, stored = NAME, tuned / ALLOCATIONS
    if place == "elsewhere":
        shutil.copytree(stored, tmp_path / "my widths")
        shutil.rmtree(stored)
        allocation = str(tmp_path / "my widths" / f"{NAME}.json")
    elif place == "by path":
        allocation = str(stored / f"{NAME}.json")
    elif place == "a name with .json":
        allocation = "a.json"
        (stored / f"{NAME}.json").rename(stored / "a.json.json")
    out = tmp_path / "out"
    matgptq.export(tuned, out, format="matgptq-slice", allocation=allocation)
    record = json.loads((out / EXPORT_NAME).read_text())
    wanted = {"elsewhere": allocation, "a name with .json": allocation}
    assert record["scales_of"] == wanted.get(place, NAME)
    if place == "an early export":
        del record["scales_sha256"]
        (out / EXPORT_NAME).write_text(json.dumps(record))
    assert verify(out, tuned).passed
    if place == "elsewhere":
        opened = open_checkpoint(out, slices=True)
        published = json.loads(published_texts(opened, opened, "owner/name")[EXPORT_NAME])
        assert published["scales_of"] == f"{NAME}.json"
        (tmp_path / "my widths").rename(stored)
        assert verify(out, tuned).passed  # brought to the checkpoint
        (out / EXPORT_NAME).write_text(json.dumps(published))
        assert verify(out, tuned).passed


def test_verify_says_which_scales_are_gone(tuned: Path, tmp_path: Path) -> None:
    out, opened, layers = tmp_path / "out", open_checkpoint(tuned), _layers(tuned)
    matgptq.export(tuned, out, format="matgptq-slice", allocation=NAME)
    save_scales(opened, NAME, layers, widths_scales(opened, layers), {})
    with pytest.raises(ExportError, match="not those that were exported; they were tuned again"):
        verify(out, tuned)
    shutil.rmtree(tuned / ALLOCATIONS)
    with pytest.raises(ExportError, match=r"scales that it was made with are not found: .*no such allocation"):
        verify(out, tuned)


def test_tuning_goes_on_from_them(tuned: Path, windows: torch.Tensor) -> None:
    (first,) = matgptq.refine(tuned, allocation=NAME, steps=4, dataset=windows[:12], learning_rate=1e-3)
    again = matgptq.refine(tuned, allocation=NAME, steps=4, dataset=windows[:12], learning_rate=1e-3)
    assert again[0].kl_before == first.kl_after
    assert len(list((tuned / ALLOCATIONS).glob("*.safetensors"))) == 1  # the earlier ones are gone


@pytest.mark.parametrize("event", [1, 2, 4, 5])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    event: int, mixed: Path, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(mixed, mixed.with_name("uninterrupted"))
    options = {"allocation": NAME, "steps": 3, "dataset": windows, "learning_rate": 1e-2}
    matgptq.refine(other, **options)
    with monkeypatch.context() as patch:
        stopping = _stopping(event)
        for write in (tuning_workspace.write_text, tuning_workspace.save_tensors):
            patch.setattr(tuning_workspace, write.__name__, stopping(write))
        with pytest.raises(KeyboardInterrupt):
            matgptq.refine(mixed, **options)
    matgptq.refine(mixed, **options)
    assert files(mixed / ALLOCATIONS) == files(other / ALLOCATIONS)


def _stopping(event: int) -> Any:
    """Makes functions that raise after the n-th call of any of them."""
    count = 0

    def stopping(function: Any) -> Any:
        def wrapper(*arguments: Any) -> None:
            nonlocal count
            count += 1
            function(*arguments)
            if count == event:
                raise KeyboardInterrupt

        return wrapper

    return stopping


class Notes(Silent):
    """Notes about scales, and how many files of scales were there when each was written."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.notes: list[tuple[str, int]] = []

    def note(self, message: str) -> None:
        if "scales" in message:
            self.notes.append((message, len(list(self.directory.glob("*.safetensors")))))


def test_a_new_search_keeps_the_scales_of_the_same_widths(tuned: Path, windows: torch.Tensor) -> None:
    notes = Notes(tuned / ALLOCATIONS)
    options = {
        "save": NAME, "dataset": token_ids(24, 16, seed=3), "tokens": 256, "seqlen": 16, "generations": 0,
        "progress": notes,
    }  # fmt: skip
    matgptq.search(tuned, 3.5, **options)
    assert find_scales(open_checkpoint(tuned), NAME, _layers(tuned)) is None
    assert not list((tuned / ALLOCATIONS).glob("*.safetensors"))
    (note,) = notes.notes
    assert note[0].startswith(f"{NAME}: the scales of its own were tuned for other widths")
    assert note[1] == 1
    matgptq.refine(tuned, allocation=NAME, steps=8, dataset=windows, learning_rate=1e-2)
    before = files(tuned / ALLOCATIONS)
    matgptq.search(tuned, 3.5, **options)
    assert find_scales(open_checkpoint(tuned), NAME, _layers(tuned)) is not None
    assert files(tuned / ALLOCATIONS) == before  # the record of the tuning, too
    assert len(notes.notes) == 1


@pytest.mark.parametrize("early", [False, True])
def test_allocations_outlive_tuned_widths(early: bool, tuned: Path, windows: torch.Tensor) -> None:
    """Widths are what they were, and scales of its own never were those of a width."""
    opened, layers = open_checkpoint(tuned), _layers(tuned)
    file = tuned / ALLOCATIONS / f"{NAME}.json"
    codes, everything = opened.allocation_identities
    plain = json.loads(file.read_text()) | {"checkpoint": everything if early else codes}
    file.write_text(json.dumps(plain))
    del plain["scales"]
    file.with_name("plain.json").write_text(json.dumps(plain))
    before = logits(matgptq.load(tuned, allocation=NAME))
    matgptq.refine(tuned, (2,), steps=8, dataset=windows, learning_rate=1e-2)
    again = open_checkpoint(tuned)
    assert again.identity != everything
    assert again.codes_identity == codes
    assert torch.equal(logits(matgptq.load(tuned, allocation=NAME)), before)
    widths = logits(matgptq.load(tuned, allocation=layers))
    assert torch.equal(logits(matgptq.load(tuned, allocation="plain")), widths)
    shown = CliRunner().invoke(app, ["info", str(tuned)], env={"COLUMNS": "160"})
    assert "of another checkpoint" not in shown.output


def test_other_codes_or_groups_are_another_checkpoint(mixed: Path, make_checkpoint: Any, tmp_path: Path) -> None:
    opened = open_checkpoint(mixed)
    for name, options in (("groups", {"group_size": 32}), ("codes", {"group_size": 64, "seed": 1})):
        matgptq.quantize(make_checkpoint("llama")[0], tmp_path / name, dataset=token_ids(seed=1), **options)
        other = open_checkpoint(tmp_path / name)
        assert other.codes_identity not in opened.allocation_identities
        with pytest.raises(AllocationError, match="made for another checkpoint"):
            matgptq.load(tmp_path / name, allocation=mixed / ALLOCATIONS / f"{NAME}.json")


def test_an_upload_takes_them_along(tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "upload"
    matgptq.load(tuned, 4).save_pretrained(out)
    prepare_upload(out, "owner/name", tuned)
    assert find_scales(open_checkpoint(out), NAME, _layers(tuned)) is not None


def test_who_reads_the_widths_reads_the_scales(tuned: Path) -> None:
    modes = {file.suffix: file.stat().st_mode for file in (tuned / ALLOCATIONS).iterdir()}
    assert modes[".safetensors"] == modes[".json"] == modes[".txt"]


def test_damage_is_found(tuned: Path) -> None:
    assert check_integrity(tuned).passed
    (file,) = (tuned / ALLOCATIONS).glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(AllocationError, match="checksum differs"):
        matgptq.load(tuned, allocation=NAME)
    (damage,) = check_integrity(tuned).damage
    assert damage.tensor == NAME
    file.unlink()
    with pytest.raises(AllocationError, match="not beside it"):
        matgptq.evaluate(tuned, allocation=NAME, text=token_ids(1, 16))
    matgptq.load(tuned, allocation=tuned / ALLOCATIONS / f"{NAME}.txt")  # the widths alone
    record = json.loads((tuned / ALLOCATIONS / f"{NAME}.json").read_text())
    for entry in (3, {"file": "a"}, {"file": "../a", "sha256": "b"}, {"file": "a", "sha256": "b", "widths": 3}):
        (tuned / ALLOCATIONS / f"{NAME}.json").write_text(json.dumps({**record, "scales": entry}))
        with pytest.raises(AllocationError, match="must name a file"):
            matgptq.load(tuned, allocation=NAME)


def test_files_that_are_no_text_are_refused_by_name(mixed: Path, tmp_path: Path) -> None:
    file = tmp_path / "allocation.json"
    for content in (b"{\xff", b"{"):
        file.write_bytes(content)
        for use in (matgptq.evaluate, matgptq.load):
            with pytest.raises(AllocationError, match=r"allocation\.json"):
                use(mixed, allocation=file)
    with pytest.raises(AllocationError, match="not a file"):
        matgptq.evaluate(mixed, allocation=tmp_path)
    (mixed / ALLOCATIONS / f"{NAME}.json").write_bytes(b"{\xff")
    assert not check_integrity(mixed).passed


def test_scales_of_other_layers_are_refused(mixed: Path) -> None:
    opened = open_checkpoint(mixed)
    layers = _layers(mixed)
    scales = widths_scales(opened, layers)
    layer = next(iter(scales))
    save_scales(opened, NAME, layers, {**scales, layer: scales[layer][:, :1]}, {})
    with pytest.raises(AllocationError, match="not those of the layers"):
        matgptq.load(mixed, allocation=NAME)
    save_scales(opened, NAME, layers, {**scales, layer: torch.full_like(scales[layer], torch.nan)}, {})
    with pytest.raises(AllocationError, match="finite"):
        matgptq.load(mixed, allocation=NAME)


def test_scales_of_other_widths_are_refused(tuned: Path) -> None:
    opened, layers = open_checkpoint(tuned), _layers(tuned)
    file = tuned / ALLOCATIONS / f"{NAME}.json"
    record = json.loads(file.read_text())
    first, second, *others = layers
    swapped = {**layers, first: layers[second], second: layers[first]}
    file.write_text(json.dumps({**record, "layers": swapped}))
    for use in (
        matgptq.load,
        lambda path, allocation: matgptq.export(path, path / "x", format="dense", allocation=NAME),
    ):
        with pytest.raises(AllocationError, match="tuned for other widths than it gives"):
            use(tuned, allocation=NAME)
    (damage,) = check_integrity(tuned).damage
    assert "other widths" in damage.problem
    # Layers that it does not name have the width that it is completed with.
    file.write_text(json.dumps({**record, "layers": {layer: layers[layer] for layer in (second, *others)}}))
    assert find_scales(opened, NAME, find_allocation(opened, NAME, layers[first])) is not None
    with pytest.raises(AllocationError, match="other widths"):
        matgptq.load(tuned, 8, allocation=NAME)
    # Files of earlier releases do not say.
    del record["scales"]["widths"]
    file.write_text(json.dumps({**record, "layers": swapped}))
    assert find_scales(opened, NAME, swapped) is not None


def test_what_cannot_be_tuned(mixed: Path, windows: torch.Tensor) -> None:
    with pytest.raises(ConfigurationError, match="either widths or an allocation"):
        matgptq.refine(mixed, (2,), allocation=NAME, dataset=windows)
    with pytest.raises(AllocationError, match="no such allocation"):
        matgptq.refine(mixed, allocation="absent", dataset=windows)
    with pytest.raises(ConfigurationError, match="saved with the checkpoint"):
        matgptq.refine(mixed, allocation=str(mixed / ALLOCATIONS / f"{NAME}.txt"), dataset=windows)


def test_vllm_is_pointed_to_an_export(tuned: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="--format matgptq-slice"):
        chosen_layers(Choice(allocation=NAME), open_checkpoint(tuned))


def test_command_line(mixed: Path, tmp_path: Path) -> None:
    text, table = tmp_path / "text.txt", tmp_path / "table.json"
    text.write_text("\n".join(f"document {n}: the quick brown fox jumps over the lazy dog" for n in range(60)))
    arguments = ["refine", str(mixed), "--allocation", NAME, "--steps", "8", "--dataset", str(text), "--nsamples", "8",
                 "--seqlen", "16", "--lr", "0.01", "--json", str(table)]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert NAME in result.output
    (record,) = json.loads(table.read_text())
    assert record["allocation"] == NAME
    shown = CliRunner().invoke(app, ["info", str(mixed)], env={"COLUMNS": "160"})
    assert f"tuned: kl {record['kl_before']:.4f} to {record['kl_after']:.4f}" in shown.output
    check = CliRunner().invoke(app, ["eval", str(mixed), "--allocation", NAME, "--text", str(text), "--seqlen", "16"])
    assert check.exit_code == 0, check.output
