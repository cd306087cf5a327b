"""Files are replaced whole, and whoever may read the others in the directory may read them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from matgptq.files.atomic import replacing, save_tensors, write_text


@pytest.fixture(params=[0o022, 0o077, 0o002])
def permissions(request: pytest.FixtureRequest) -> Iterator[int]:
    """What the umask leaves of a file's permissions."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def test_permissions_follow_the_umask(permissions: int, tmp_path: Path) -> None:
    save_tensors(tmp_path / "tensors", {"a": torch.ones(3)})
    write_text(tmp_path / "text", "text")
    with replacing(tmp_path / "bytes") as beside:
        beside.write_bytes(b"bytes")
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {permissions}


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_text(file, "old")
    os.link(file, tmp_path / "link")
    with pytest.raises(FileNotFoundError), replacing(file) as beside:
        beside.unlink()  # nothing to put in its place
    assert file.read_text() == "old"
    write_text(file, "new")
    assert (tmp_path / "link").read_text() == "old"
    assert {each.name for each in tmp_path.iterdir()} == {"file", "link"}
