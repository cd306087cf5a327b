"""New scales for a width of a checkpoint that stands."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matgptq.checkpoints.allocation_store import name_codes
from matgptq.checkpoints.checkpoint import Checkpoint, open_checkpoint
from matgptq.checkpoints.format import CODES, REPORT_NAME, scales_name
from matgptq.errors import CheckpointError, SourceError
from matgptq.files.atomic import json_text, replacing
from matgptq.files.checksums import CHECKSUMS_NAME, checksums_text, read_checksums
from matgptq.files.directories import directory_beside, disk_errors, exchange, link_or_copy, sync
from matgptq.files.json_files import read_json
from matgptq.files.stored_tensors import INDEX_NAME, read_tensor
from matgptq.files.tensor_file import write_tensors
from matgptq.nested_weight import scale_source
from matgptq.slicing import MIN_BITS


def replace_scales(
    path: str | Path,
    bits: int,
    scales: Mapping[str, Tensor],
    record: Mapping[str, Any],
    *,
    staging: Path | None = None,
) -> None:
    """Give one width of a checkpoint new scales. At every moment the directory holds either the old or the new ones.

    Only the files that hold scales of that width are written again, beside the checkpoint; the others are linked. A
    width without scales of its own gets them, and the next smaller width, if it read the same ones as this, gets
    copies of those, so that no other width changes.

    Args:
        path: the checkpoint.
        bits: the width.
        scales: ``{layer: [out, groups]}`` storable, of every layer.
        record: of how they came about, for ``refinement`` in ``config.json`` and ``report.json``.
        staging: the temporary directory, on the same file system; default one with a random name beside the checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, or cannot be written; it is then as it was.
    """
    directory = Path(path).resolve()  # a link to a checkpoint goes on pointing to it
    checkpoint = open_checkpoint(directory)
    new = {f"{layer}.{scales_name(bits)}": scales[layer].detach().cpu() for layer in checkpoint.layers}
    own = checkpoint.settings.scale_bits
    below = bits - 1
    if bits not in own and below >= MIN_BITS and below not in own:
        shared = scales_name(scale_source(own)[bits])
        for layer in checkpoint.layers:
            name = f"{layer}.{shared}"
            new[f"{layer}.{scales_name(below)}"] = read_tensor(checkpoint.tensors[name])
        own = (*own, below)
    settings = dataclasses.replace(
        checkpoint.settings,
        scale_bits=tuple(sorted({*own, bits})),
        refinement={**checkpoint.settings.refinement, str(bits): dict(record)},
    )
    staging = directory_beside(directory, "partial") if staging is None else staging
    try:
        with disk_errors(directory):
            shutil.copytree(directory, staging, copy_function=link_or_copy, symlinks=True)
            name_codes(staging, checkpoint)
            _replace_tensors(staging, checkpoint, new)
            _replace_json(staging / "config.json", {**checkpoint.config, "quantization_config": settings.to_dict()})
            if (directory / REPORT_NAME).is_file():
                report = read_json(directory / REPORT_NAME)
                _replace_json(staging / REPORT_NAME, {**report, "refinement": dict(settings.refinement)})
            for file in (*staging.iterdir(), staging):
                sync(file)
            exchange(staging, directory)
            sync(directory.parent)
    except SourceError as error:
        raise CheckpointError(str(error)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace_tensors(staging: Path, checkpoint: Checkpoint, new: Mapping[str, Tensor]) -> None:
    """Put tensors into the shards of a linked copy: where one of that name was, or else beside its layer's codes."""
    by_file: dict[str, dict[str, Tensor]] = {}
    for name, tensor in new.items():
        place = name if name in checkpoint.tensors else f"{name.rpartition('.')[0]}.{CODES}"
        by_file.setdefault(checkpoint.tensors[place].file.name, {})[name] = tensor.to(torch.float16).contiguous()
    known = read_checksums(staging)
    checksums = known or {}
    for file, tensors in by_file.items():
        kept = {name: info for name, info in checkpoint.tensors.items() if info.file.name == file}
        # Beside and then in its place: what lies there is the very file of the old checkpoint.
        with replacing(staging / file, durable=False) as beside:
            written = write_tensors(beside, {**kept, **tensors})
        # Only of the new ones: what was damaged before must not look right now.
        checksums.update({name: written[name] for name in tensors})
    if (staging / INDEX_NAME).is_file():
        index = read_json(staging / INDEX_NAME)
        added = {name: file for file, tensors in by_file.items() for name in tensors if name not in checkpoint.tensors}
        index["weight_map"] = dict(sorted({**index["weight_map"], **added}.items()))
        size = sum(info.bytes for info in checkpoint.tensors.values())
        index["metadata"] = {
            **index.get("metadata", {}),
            "total_size": size + sum(new[name].numel() * 2 for name in added),
        }
        _replace_json(staging / INDEX_NAME, index)
    if known is not None:
        _replace_text(staging / CHECKSUMS_NAME, checksums_text(checksums))


def _replace_json(file: Path, value: Mapping[str, Any]) -> None:
    _replace_text(file, json_text(value))


def _replace_text(file: Path, text: str) -> None:
    with replacing(file, durable=False) as beside:
        beside.write_text(text, encoding="utf-8")
