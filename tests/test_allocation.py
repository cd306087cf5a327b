"""Allocation files, JSON and text, and their completion for a model."""

from __future__ import annotations

import pytest

from matgptq.allocation import complete_allocation, read_allocation
from matgptq.errors import AllocationError

EXPECTED = {"model.layers.0.mlp.up_proj": 3, "model.layers.1.mlp.up_proj": 8}


@pytest.fixture
def write(tmp_path):
    def write(text: str):
        file = tmp_path / "allocation"
        file.write_text(text, encoding="utf-8")
        return file

    return write


@pytest.mark.parametrize(
    "text",
    [
        '{"model.layers.0.mlp.up_proj": 3, "model.layers.1.mlp.up_proj": 8}',
        '\n {"budget": 5.5, "layers": {"model.layers.0.mlp.up_proj": 3, "model.layers.1.mlp.up_proj": 8}}',
        "model.layers.0.mlp.up_proj: 3\nmodel.layers.1.mlp.up_proj: 8\n",
        "\n  model.layers.0.mlp.up_proj :3  \r\n\n\tmodel.layers.1.mlp.up_proj:8",
    ],
    ids=["mapping", "layers", "lines", "loose lines"],
)
def test_reads_every_form(write, text):
    assert read_allocation(write(text)) == EXPECTED
    assert list(read_allocation(str(write(text)))) == list(EXPECTED)


def test_a_long_line_is_not_shown_in_whole(write):
    with pytest.raises(AllocationError) as caught:
        read_allocation(write("a book without an end " * 1000))
    assert len(str(caught.value)) < 400


def test_splits_a_line_at_its_last_colon(write):
    assert read_allocation(write("block:0:up: 4")) == {"block:0:up": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no layers in it"),
        (" \n\n", "no layers in it"),
        ("{}", "no layers in it"),
        ('{"layers": {}}', "no layers in it"),
        ('{"a": 3', "not valid JSON"),
        ('{"layers": 3}', '"layers" must map layers to widths'),
        ('{"layers": ["a", 3]}', '"layers" must map layers to widths'),
        ("a: 3\nb 4", "line 2: expected 'layer: bits', found 'b 4'"),
        ("a: 3\n\nb: four", "line 3: expected 'layer: bits', found 'b: four'"),
        ("a: -3", "line 1"),
        ("a: 3.5", "line 1"),
        ("a: ²", "line 1"),
        ("[3, 4]", "line 1"),
        pytest.param("a: " + "3" * 5000, "line 1: expected 'layer: bits', found 'a: 33", id="many digits"),
        pytest.param('{"a": ' + "3" * 5000 + "}", "not valid JSON", id="many digits in JSON"),
        pytest.param('{"a": ' + "[" * 100_000, "not valid JSON", id="deep JSON"),
        ("a: 3\na: 4", "layer a is named twice"),
        ('{"a": 3, "a": 4}', "layer a is named twice"),
        ('{"layers": {"a": 3, "a": 4}}', "layer a is named twice"),
        ("a: 3\nb: 1", "layer b: bits must be an integer from 2 to 8, not 1"),
        ("a: 9", "layer a: bits must be an integer from 2 to 8, not 9"),
        ('{"a": "3"}', "layer a: bits must be"),
        ('{"a": 3.0}', "layer a: bits must be"),
        ('{"a": true}', "layer a: bits must be"),
        ('{"a": {"bits": 3}}', "layer a: bits must be"),
    ],
)
def test_refuses_by_name(write, text, message):
    file = write(text)
    with pytest.raises(AllocationError) as error:
        read_allocation(file)
    assert str(file) in str(error.value)
    assert message in str(error.value)


def test_refuses_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(AllocationError, match="missing: cannot be read"):
        read_allocation(tmp_path / "missing")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AllocationError, match="binary: cannot be read"):
        read_allocation(binary)


def test_completes_in_the_order_of_the_model():
    complete = complete_allocation({"c": 2, "a": 8}, ["a", "b", "c"], 4)
    assert list(complete.items()) == [("a", 8), ("b", 4), ("c", 2)]


def test_completion_refuses_unknown_layers_and_widths():
    with pytest.raises(AllocationError, match="unknown layer d"):
        complete_allocation({"a": 3, "d": 3}, ["a"], 4)
    with pytest.raises(AllocationError, match=r"layer a: bits must be .* not 1"):
        complete_allocation({"a": 1}, ["a"], 4)
