"""Random damage to what is read from elsewhere: GGUF files, and the published code's pickles, which must never run."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import answered, byte_damage, fuzz
from hypothesis import given
from hypothesis import strategies as st
from test_source import write_gguf

from matgptq.errors import MatGPTQError, SourceError
from matgptq.models.source import open_source
from matgptq.reference_formats.folders import DATA_NAME, read_data

LAYER = "model.layers.0.mlp.up_proj"
SHAPE = (8, 64)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(file, "llama")
    return file


@fuzz(25)
@given(data=st.data())
def test_gguf(gguf_file, tmp_path_factory, data) -> None:
    directory = tmp_path_factory.mktemp("harmed")
    data.draw(byte_damage(gguf_file))(directory)
    with answered(directory, MatGPTQError):
        network = open_source(directory / gguf_file.name).load_model(torch.float32)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in network.state_dict().values())


def layer_data() -> dict[str, Any]:
    scale = torch.full((SHAPE[0], 2), 0.01)
    codes = torch.arange(SHAPE[0] * SHAPE[1]).remainder(256).to(torch.uint8).view(SHAPE)
    return {"qweight": codes, "scale": scale, "zero": torch.full_like(scale, 128), "perm": None}


@fuzz(200)
@given(data=st.data())
def test_pickles_of_tensors(tmp_path_factory, data) -> None:
    whole = tmp_path_factory.mktemp("whole") / DATA_NAME
    torch.save(layer_data(), whole, _use_new_zipfile_serialization=data.draw(st.booleans()))
    directory = tmp_path_factory.mktemp("harmed")
    data.draw(byte_damage(whole))(directory)
    with answered(directory, SourceError):
        layer = read_data(directory / DATA_NAME, LAYER, SHAPE)
        assert tuple(layer.codes.shape) == SHAPE
        assert layer.codes.dtype == torch.uint8


class Bait:
    """Makes a file when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


@fuzz(60)
@given(data=st.data())
def test_no_pickle_runs(tmp_path_factory, data) -> None:
    """Wherever the call hides, whatever it calls, and in each of the containers that ``torch.load`` reads."""
    directory = tmp_path_factory.mktemp("hostile")
    trap = directory / "ran"
    function, *arguments = data.draw(
        st.sampled_from(
            [
                (os.mkdir, str(trap)),
                (os.system, f"touch {trap}"),
                (eval, f"open({str(trap)!r}, 'w')"),
                (exec, f"open({str(trap)!r}, 'w')"),
                (io.open, str(trap), "w"),
                (getattr, Path(trap), "touch"),
                (torch.save, 1, str(trap)),
                (torch.load, str(trap)),
            ]
        )
    )
    bait = Bait(function, *arguments)
    record: Any = layer_data()
    place = data.draw(st.sampled_from(["whole", "qweight", "scale", "perm", "key", "inside", "extra"]))
    if place == "whole":
        record = bait
    elif place == "inside":
        record["perm"] = [{"a": (bait,)}]
    elif place == "key":
        record["x"] = {(1, bait): 1}
    else:
        record[place] = bait
    file = directory / DATA_NAME
    container = data.draw(st.sampled_from(["zip", "legacy", "plain", "zip-by-hand"]))
    protocol = data.draw(st.integers(2, pickle.HIGHEST_PROTOCOL))
    if container == "plain":
        file.write_bytes(pickle.dumps(record, protocol=protocol))
    elif container == "zip-by-hand":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(bait, protocol=protocol))
            archive.writestr("archive/version", "3\n")
    else:
        torch.save(record, file, _use_new_zipfile_serialization=container == "zip", pickle_protocol=protocol)
    with pytest.raises(SourceError, match=f"layer {LAYER}: "):
        read_data(file, LAYER, SHAPE)
    assert not trap.exists()
