"""Scales that were tuned for one allocation; they lie beside it, ``OUT/allocations/NAME-<digest>.safetensors``.

A width reads the same scales in every layer that has it; an allocation may have better ones of its own. Its JSON file
names theirs, the SHA-256 of it and that of the widths, so that widths and scales cannot be mixed up.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from matgptq.allocation import Allocation, complete_allocation, digest_of_widths, read_allocation
from matgptq.checkpoints.allocation_store import (
    allocation_file,
    find_allocation,
    is_stored,
    save_allocation,
    stored_file,
    write_record,
)
from matgptq.checkpoints.checkpoint import Checkpoint
from matgptq.checkpoints.format import scales_name
from matgptq.core.finiteness import all_finite
from matgptq.errors import AllocationError, CheckpointError, SourceError
from matgptq.files.atomic import replacing
from matgptq.files.json_files import read_json
from matgptq.files.stored_tensors import read_tensor
from matgptq.nested_weight import scale_source
from matgptq.progress import Progress

SCALES = "scales"  # in an allocation's JSON: {"file": ..., "sha256": ..., "widths": ...}
_ADVICE = "its 'layer: bits' lines work without them"


def find_scales(
    checkpoint: Checkpoint, allocation: Mapping[str, int] | str | Path | None, widths: Mapping[str, int]
) -> dict[str, Tensor] | None:
    """Scales of an allocation's own; None if it has none.

    Args:
        checkpoint: that it is for.
        allocation: named as in ``find_allocation``.
        widths: of every layer, as ``find_allocation`` completes it.

    Returns:
        ``{layer: float16 [out, groups]}`` of every layer.

    Raises:
        AllocationError: no such allocation, or its scales are missing, damaged, or those of other layers or widths.
    """
    if allocation is None or isinstance(allocation, Mapping):
        return None
    file = allocation_file(checkpoint, allocation)
    entry = _entry(file)
    if entry is None:
        return None
    scales = _read(file, entry)
    shapes = {
        layer: (info.out_features, info.in_features // info.group_size) for layer, info in checkpoint.layers.items()
    }
    if {layer: tuple(each.shape) for layer, each in scales.items()} != shapes:
        raise AllocationError(f"{file}: its scales are not those of the layers of {checkpoint.path}")
    if entry.get("widths", digest_of_widths(widths)) != digest_of_widths(widths):
        raise AllocationError(f"{file}: its scales were tuned for other widths than it gives the layers; {_ADVICE}")
    return scales


def scales_origin(checkpoint: Checkpoint, allocation: Mapping[str, int] | str | Path | None) -> dict[str, str]:
    """Where an export's scales come from, for ``find_origin``; empty if the allocation has none of its own.

    Returns:
        ``scales_of``, the name of a stored allocation or the path of another file, and ``scales_sha256``.
    """
    if allocation is None or isinstance(allocation, Mapping):
        return {}
    file = allocation_file(checkpoint, allocation).resolve()
    entry = _entry(file)
    if entry is None:
        return {}
    return {"scales_of": file.stem if is_stored(checkpoint, file) else str(file), "scales_sha256": entry["sha256"]}


def find_origin(
    checkpoint: Checkpoint, record: Mapping[str, Any], widths: Mapping[str, int]
) -> dict[str, Tensor] | None:
    """The scales that an export was made with; None if those of the widths.

    An allocation outside of the checkpoint is looked for where it was, and then among the stored ones.

    Args:
        checkpoint: that was exported.
        record: of the export.
        widths: of every layer.

    Raises:
        AllocationError: they are not found, or are others now.
    """
    name = record.get("scales_of")
    if name is None:
        return None
    try:
        file = allocation_file(checkpoint, str(name))
    except AllocationError:
        file = allocation_file(checkpoint, Path(str(name)).stem)
    entry = _entry(file)
    if entry is None or record.get("scales_sha256", entry["sha256"]) != entry["sha256"]:
        raise AllocationError(f"{file}: its scales are not those that were exported; they were tuned again, or removed")
    return find_scales(checkpoint, file, widths)


def has_own_scales(checkpoint: Checkpoint, allocation: Mapping[str, int] | str | Path | None) -> bool:
    """Whether ``find_scales`` finds any, without reading them."""
    if allocation is None or isinstance(allocation, Mapping):
        return False
    return _entry(allocation_file(checkpoint, allocation)) is not None


def damage_of(checkpoint: Checkpoint, file: Path) -> str | None:
    """What is wrong with the scales that an allocation's JSON file names; None if nothing is, or it names none."""
    try:
        if _entry(file) is not None:
            widths = complete_allocation(read_allocation(file), checkpoint.layers, checkpoint.settings.bits)
            find_scales(checkpoint, file, widths)
    except AllocationError as error:
        return str(error)
    return None


def widths_scales(checkpoint: Checkpoint, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """``{layer: float16 [out, groups]}`` that each layer reads at its width if nothing was tuned for the whole."""
    source = scale_source(checkpoint.settings.scale_bits)
    names = {layer: f"{layer}.{scales_name(source[widths[layer]])}" for layer in checkpoint.layers}
    return {layer: read_tensor(checkpoint.tensors[name]) for layer, name in names.items()}


def save_scales(
    checkpoint: Checkpoint,
    allocation: str,
    widths: Mapping[str, int],
    scales: Mapping[str, Tensor],
    record: Mapping[str, Any],
) -> None:
    """Give a stored allocation scales of its own. At every moment it has its old ones or the new ones.

    Args:
        checkpoint: that it lies with.
        allocation: its name.
        widths: of every layer, that they were tuned for.
        scales: ``{layer: [out, groups]}``, storable, of every layer.
        record: of how they came about, for ``refinement`` in its JSON file.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    file = allocation_file(checkpoint, allocation)
    tensors = {layer: scales[layer].detach().cpu().to(torch.float16).contiguous() for layer in checkpoint.layers}
    content = save(tensors)
    digest = hashlib.sha256(content).hexdigest()
    own = file.with_name(f"{file.stem}-{digest[:16]}.safetensors")
    try:
        with replacing(own) as beside:
            beside.write_bytes(content)
    except OSError as error:
        raise CheckpointError(f"{file.parent}: cannot be written: {error}") from error
    known = json.loads(file.read_text(encoding="utf-8"))
    entry = {"file": own.name, "sha256": digest, "widths": digest_of_widths(widths)}
    write_record(file, {**known, "refinement": dict(record), SCALES: entry})
    _remove_others(file, own.name)


def scales_file(file: Path) -> Path | None:
    """The file of the scales that an allocation's JSON file names; None if it names none."""
    entry = _entry(file)
    return None if entry is None else file.with_name(entry["file"])


def save_found(checkpoint: Checkpoint, allocation: Allocation, progress: Progress) -> None:
    """Store an allocation in the place of one of its name, whose own scales it keeps if it has the same widths.

    Otherwise they are removed, which a note says before.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    file = stored_file(checkpoint, allocation.name)
    kept: dict[str, Any] = {}
    record = _tuned_record(file)
    if record:
        widths = complete_allocation(allocation.layers, checkpoint.layers, checkpoint.settings.bits)
        try:
            same = find_allocation(checkpoint, file) == widths and find_scales(checkpoint, file, widths) is not None
        except AllocationError:
            same = False
        if same:
            kept = {key: record[key] for key in ("refinement", SCALES) if key in record}
        else:
            progress.note(
                f"{allocation.name}: the scales of its own were tuned for other widths than were found now, and are "
                f"removed; 'matgptq refine {checkpoint.path} --allocation {allocation.name}' tunes some for these"
            )
    save_allocation(checkpoint, allocation, kept)
    _remove_others(file, kept[SCALES]["file"] if kept else None)


def _tuned_record(file: Path) -> dict[str, Any]:
    """The record of a stored allocation with scales of its own; empty if there is none."""
    try:
        record = read_json(file)
    except SourceError:
        return {}
    return record if record.get(SCALES) else {}


def _remove_others(file: Path, kept: str | None) -> None:
    pattern = re.compile(re.escape(file.stem) + r"-[0-9a-f]{16}\.safetensors")
    for each in file.parent.iterdir():
        if pattern.fullmatch(each.name) and each.name != kept:
            each.unlink(missing_ok=True)


def _entry(file: Path) -> dict[str, str] | None:
    """What an allocation's JSON says about scales of its own."""
    try:
        text = file.read_text(encoding="utf-8")
        entry = json.loads(text).get(SCALES) if text.lstrip().startswith("{") else None
    except (OSError, ValueError, RecursionError) as error:  # a text that is no UTF-8 is a ValueError, too
        raise AllocationError(f"{file}: cannot be read: {error}") from error
    if entry is None:
        return None
    valid = isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("file", "sha256"))
    valid = valid and isinstance(entry.get("widths", ""), str)
    if not valid or Path(entry["file"]).name != entry["file"]:
        raise AllocationError(f'{file}: "{SCALES}" must name a file beside it and its sha256')
    return dict(entry)


def _read(file: Path, entry: Mapping[str, str]) -> dict[str, Tensor]:
    own = file.with_name(entry["file"])
    if not own.is_file():
        raise AllocationError(f"{file}: its scales, {own.name}, are not beside it; {_ADVICE}")
    try:
        if _sha256(own) != entry["sha256"]:
            raise AllocationError(f"{own}: is not what was written, its checksum differs; {_ADVICE}")
        scales: dict[str, Tensor] = load_file(own)
    except (OSError, SafetensorError) as error:
        raise AllocationError(f"{own}: cannot be read: {error}; {_ADVICE}") from error
    for layer, each in scales.items():
        if each.dtype != torch.float16 or not all_finite(each) or bool((each == 0).any()):
            raise AllocationError(f"{own}: the scales of layer {layer} are not finite numbers other than zero")
    return scales


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
