"""Allocations that live with a checkpoint: ``OUT/allocations/NAME.json``, and ``NAME.txt`` for other programs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matgptq.allocation import Allocation, complete_allocation, format_lines, read_allocation
from matgptq.checkpoints.checkpoint import Checkpoint
from matgptq.errors import AllocationError, ConfigurationError, SourceError
from matgptq.files.atomic import write_text
from matgptq.files.json_files import read_json

ALLOCATIONS = "allocations"
_LONGEST = 200  # files of 255 bytes hold its scales' digest, and what a name has while it is written


def check_name(name: str) -> str:
    """Return a name that can be a file's; raise ``ConfigurationError`` otherwise."""
    if len(name) > _LONGEST:
        raise ConfigurationError(f"an allocation's name has at most {_LONGEST} characters, not {len(name)}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigurationError(f"an allocation's name is letters, digits, dots, dashes and underscores, not {name!r}")
    return name


def stored_file(checkpoint: Checkpoint, name: str) -> Path:
    """Where an allocation of that name lies, or would."""
    return checkpoint.path / ALLOCATIONS / f"{check_name(name)}.json"


def is_stored(checkpoint: Checkpoint, file: Path) -> bool:
    """Whether the file of an allocation lies with the checkpoint."""
    return file.resolve().parent == (checkpoint.path / ALLOCATIONS).resolve()


def save_allocation(checkpoint: Checkpoint, allocation: Allocation, more: Mapping[str, Any] | None = None) -> Path:
    """Write both files, replacing those of that name; returns the JSON one.

    Args:
        checkpoint: that it lies with.
        allocation: to be stored.
        more: what else its record holds.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    file = stored_file(checkpoint, allocation.name)
    write_record(file, {**allocation.to_dict(), **(more or {})})
    write_text(file.with_suffix(".txt"), format_lines(allocation.layers))
    return file


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Replace the JSON file of an allocation; raises ``CheckpointError`` if it cannot be written."""
    write_text(file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def name_codes(directory: Path, checkpoint: Checkpoint) -> None:
    """Let allocations of earlier releases, which name the scales, too, outlive a change of scales.

    Args:
        directory: of the checkpoint or a copy of it; the files are replaced.
        checkpoint: as it was before.
    """
    for file in (directory / ALLOCATIONS).glob("*.json"):
        try:
            record = read_json(file)
        except SourceError:  # whoever uses it is told
            continue
        if record.get("checkpoint") == checkpoint.identity:
            write_record(file, {**record, "checkpoint": checkpoint.codes_identity})


def stored_allocations(checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
    """The records of all allocations that lie with a checkpoint, by name.

    Raises:
        AllocationError: one cannot be read.
    """
    records = {}
    for file in sorted((checkpoint.path / ALLOCATIONS).glob("*.json")):
        read_allocation(file)
        records[file.stem] = json.loads(file.read_text(encoding="utf-8"))
    return records


def find_allocation(
    checkpoint: Checkpoint, allocation: Mapping[str, int] | str | Path, default_bits: int | None = None
) -> dict[str, int]:
    """A width for every layer from a mapping, the name of a stored allocation, or a file.

    Layers that it does not name get ``default_bits``, or else the checkpoint's default width.

    Raises:
        AllocationError: there is no such name or file, it belongs to another checkpoint, or names unknown layers.
    """
    if isinstance(allocation, Mapping):
        widths = dict(allocation)
    else:
        widths = read_allocation(allocation_file(checkpoint, allocation), checkpoint.allocation_identities)
    return complete_allocation(widths, checkpoint.layers, default_bits or checkpoint.settings.bits)


def allocation_file(checkpoint: Checkpoint, allocation: str | Path) -> Path:
    """The file of a stored allocation, by its name, or else the file of that name.

    Raises:
        AllocationError: there is neither.
    """
    file = checkpoint.path / ALLOCATIONS / f"{allocation}.json"
    if Path(allocation).name != str(allocation) or not os.path.exists(file):  # whatever its length
        file = Path(allocation)
    if not os.path.exists(file):
        names = sorted(each.stem for each in (checkpoint.path / ALLOCATIONS).glob("*.json"))
        stored = f"has {', '.join(names)}" if names else "has none"
        raise AllocationError(f"{allocation}: no such file, and no such allocation: {checkpoint.path} {stored}")
    return file
