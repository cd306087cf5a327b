"""How products are cut: every column once, no part empty; and what measuring remembers. No kernel runs here."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import make_weight

from matgptq.gpu.layout import pack_slice
from matgptq.gpu.tuning import Launch, Tuner, batch_class, candidate_launches, default_launch, describe


def packed(out_features, in_features):
    codes = torch.zeros(out_features, in_features, dtype=torch.uint8)
    return pack_slice(codes, torch.ones(out_features, 1, dtype=torch.float16), 4)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.integers(1, 1500), st.integers(1, 200), st.sampled_from([1, 8, 108, 132]))
def test_every_column_once(out_features, in_features, batch, processors):
    weight = packed(out_features, in_features)
    chunks = weight.planes.shape[2]
    for launch in candidate_launches(weight, batch, processors):
        assert launch.units % launch.blocks == 0
        assert launch.units == launch.blocks if launch.stages else launch.units % launch.warps == 0
        tiles, rows, splits = launch.grid(weight, batch)
        assert tiles * 8 * launch.tiles >= batch
        assert rows * launch.blocks * 32 >= out_features
        stretch = launch.steps(weight) * launch.units // launch.blocks
        assert (splits - 1) * stretch < chunks <= splits * stretch
        assert splits == 1 or tiles * rows <= weight.arrived.numel()
        assert launch.with_splits(weight, batch, splits) == launch


def test_a_default_fills_the_card():
    weight = packed(4096, 4096)
    for batch in (1, 16, 64):
        launch = default_launch(weight, batch, 132)
        tiles, rows, splits = launch.grid(weight, batch)
        assert tiles * rows * splits >= 120  # nearly all of 132 have a program
        assert launch in candidate_launches(weight, batch, 132)


def test_batches_are_measured_in_classes():
    assert [batch_class(batch) for batch in (1, 8, 9, 16, 17, 33, 64, 65, 4096)] == [8, 8, 16, 16, 32, 64, 64, 128, 128]
    weight = packed(64, 64)
    assert describe(weight, 4, 1, "float16") == describe(weight, 4, 8, "float16")
    assert describe(weight, 4, 8, "float16") != describe(weight, 4, 9, "float16")


def test_measured_once_and_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("MATGPTQ_CACHE", str(tmp_path))
    launches = [Launch(4, 4, 1, 1, splits) for splits in (1, 2, 3)]
    asked = []

    def seconds(launch):
        asked.append(launch)
        return abs(launch.splits - 2)

    tuner = Tuner("v1", "card")
    assert tuner.choose("a", lambda: launches, seconds, measure=False) is None
    assert tuner.choose("a", lambda: launches, seconds, measure=True) == launches[1]
    assert asked == launches
    assert tuner.choose("a", lambda: launches, seconds, measure=True) == launches[1]
    other = Tuner("v1", "card")
    assert other.choose("a", lambda: launches, seconds, measure=False) == launches[1]
    other.choose("b", lambda: launches[:1], seconds, measure=True)
    tuner.choose("c", lambda: launches[2:], seconds, measure=True)
    assert len(json.loads((tmp_path / "triton.json").read_text())) == 3  # neither forgets what the other wrote
    assert Tuner("v2", "card").choose("a", lambda: launches, seconds, measure=False) is None
    assert Tuner("v1", "other card").choose("a", lambda: launches, seconds, measure=False) is None


@pytest.mark.parametrize("damage", ["{", "[]", '{"x": 1}', '{"x": {"warps": 4}}'])
def test_a_damaged_file_is_made_again(damage, tmp_path, monkeypatch):
    monkeypatch.setenv("MATGPTQ_CACHE", str(tmp_path))
    (tmp_path / "triton.json").write_text(damage)
    only = Launch(4, 4, 1, 1, 1)
    assert Tuner("v", "card").choose("a", lambda: [only], lambda _: 0.0, measure=True) == only
    assert Tuner("v", "card").choose("a", lambda: [], lambda _: 0.0, measure=False) == only


def test_it_works_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MATGPTQ_CACHE", str(tmp_path / "file"))
    only = Launch(4, 4, 1, 1, 1)
    assert Tuner("v", "card").choose("a", lambda: [only], lambda _: 0.0, measure=True) == only


def test_forms_are_told_apart():
    weight = make_weight(64, 128, 2)
    single = pack_slice(weight.codes, weight.scales[4], 4)
    assert "slice 4 bits" in describe(single, 4, 1, "float16")
    assert "group 64" in describe(single, 4, 1, "float16")
    assert "group row" in describe(packed(64, 128), 4, 1, "float16")
