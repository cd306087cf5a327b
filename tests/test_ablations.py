"""The changes that ``benchmarks/ablations.py`` makes to the pipeline from outside do what their names say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_model, token_ids

import matgptq

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import ablations
from quality_table import Texts


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("source"), torch.float32)


def codes(source: Path, out: Path, **options) -> dict[str, torch.Tensor]:
    options = {"quality": "balanced", "saliency": 0.0, "group_size": 32, "channel_scaling": 0.0, **options}
    matgptq.quantize(source, out, dataset=token_ids(8, 48), **options)
    return load_file(out / "model.safetensors")


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], part: str) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if part in name and not torch.equal(one[name], other[name])}


def test_what_feeds_a_block_changes_only_what_comes_after(source: Path, tmp_path: Path) -> None:
    plain = codes(source, tmp_path / "plain")
    with ablations.fed_by_the_full_model():
        full = codes(source, tmp_path / "full")
    with ablations.fed_by(2):
        coarse = codes(source, tmp_path / "coarse")
    for other in (full, coarse):
        changed = differing(plain, other, "codes")
        assert changed
        assert not any(".layers.0." in name for name in changed)
    assert len(differing(full, coarse, "codes")) >= len(differing(full, plain, "codes"))


def test_layers_in_order_see_the_quantized_ones_before_them(source: Path, tmp_path: Path) -> None:
    plain = codes(source, tmp_path / "plain")
    with ablations.in_order(2):
        ordered = codes(source, tmp_path / "ordered")
    changed = differing(plain, ordered, ".layers.0.")
    assert any("o_proj.codes" in name for name in changed)
    assert not any("q_proj" in name for name in changed)
    with ablations.in_order(2, 0.5):
        matched = codes(source, tmp_path / "matched")
    changed = differing(ordered, matched, ".layers.0.")
    assert any("o_proj.codes" in name for name in changed)
    assert not any("q_proj.codes" in name for name in changed)  # the first layers see what the full model's see


def test_fine_groups_at_two_bits_only(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablations, "COARSE", 32)
    plain = codes(source, tmp_path / "plain")
    with ablations.fine_groups_at_two_bits():
        fine = codes(source, tmp_path / "fine", group_size=16)
    for name in plain:
        if name.endswith("scales_3") and ".layers.0." in name:
            assert torch.equal(fine[name][:, ::2], fine[name][:, 1::2])
    two = [name for name in plain if name.endswith("scales_2")]
    assert any(not torch.equal(fine[name][:, ::2], fine[name][:, 1::2]) for name in two)
    model = matgptq.load(tmp_path / "fine", 2, device="cpu")
    assert torch.isfinite(model(token_ids(1, 8)).logits).all()


def test_texts(source: Path, tmp_path: Path) -> None:
    calibration, other = tmp_path / "calibration.txt", tmp_path / "other.txt"
    calibration.write_text("One sentence. And another one.\n\nAlone\n\nFirst. Second. Third.")
    other.write_text("x" * 40 + "y" * 120)
    texts = Texts(str(source), calibration, other, tmp_path)
    assert ablations.chat_text(texts).read_text().count('"assistant"') == 2
    texts.directory.joinpath("other").mkdir()
    rest = ablations.other_text(Texts(str(source), calibration, other, tmp_path / "other")).read_text()
    assert rest == "y" * 120


def test_kept_saliency_is_what_is_found_without(source: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    plain = codes(source, tmp_path / "plain", saliency=1.0)
    for out in ("first", "again"):
        with ablations.kept_saliency(kept):
            found = codes(source, tmp_path / out, saliency=1.0)
        assert not differing(plain, found, "codes")
    assert len(list(kept.iterdir())) == 1
    with ablations.kept_saliency(kept):
        codes(source, tmp_path / "rotated", saliency=1.0, rotate=True)
    assert len(list(kept.iterdir())) == 2
