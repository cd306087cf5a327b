"""Write one slice of a checkpoint in the format of another engine, exactly."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from matgptq.checkpoints.allocation_scales import find_scales, scales_origin
from matgptq.checkpoints.allocation_store import find_allocation
from matgptq.checkpoints.checkpoint import Checkpoint, open_checkpoint
from matgptq.checkpoints.format import CARD_MARK, CARD_NAME, EXPORT_NAME, RECORD_NAME, REPORT_NAME
from matgptq.checkpoints.writer import DEFAULT_SHARD_BYTES, CheckpointWriter, check_destination
from matgptq.errors import ConfigurationError
from matgptq.exports.compressed_tensors import CompressedTensors
from matgptq.exports.dense import Dense
from matgptq.exports.gguf_file import GGUF
from matgptq.exports.gptq import GPTQ
from matgptq.exports.matgptq_slice import MatGPTQSlice
from matgptq.exports.target import Export, Target
from matgptq.files.checksums import CHECKSUMS_NAME
from matgptq.files.run_log import LOG_NAME
from matgptq.machine.devices import resolve_dtype
from matgptq.models.source import side_files
from matgptq.progress import Progress, Silent
from matgptq.slicing import check_bits

FORMATS: dict[str, Callable[[Target], Export]] = {
    "compressed-tensors": CompressedTensors,
    "gptq": GPTQ,
    "gguf": GGUF,
    "matgptq-slice": MatGPTQSlice,
    "dense": Dense,
}
_ABOUT_THE_PARENT = (REPORT_NAME, RECORD_NAME, LOG_NAME, CHECKSUMS_NAME)


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        output: directory.
        format: one of ``FORMATS``.
        widths: of every quantized layer.
        bytes: of the weight files.
        notes: what the user should know about the output.
    """

    output: Path
    format: str
    widths: Mapping[str, int]
    bytes: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "output": str(self.output),
            "format": self.format,
            "widths": dict(self.widths),
            "bytes": self.bytes,
            "notes": list(self.notes),
        }


def export(
    path: str | Path,
    output: str | Path,
    *,
    format: str,
    bits: int | None = None,
    allocation: Mapping[str, int] | str | Path | None = None,
    dtype: str = "auto",
    force: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a slice so that an engine without matgptq serves it; its weights are the slice's, bit for bit.

    One layer is in memory at a time, and a shard. The output appears whole or not at all.

    Args:
        path: a checkpoint.
        output: directory to create.
        format: ``compressed-tensors``, ``gptq``, ``gguf``, ``matgptq-slice`` or ``dense``; ``docs/export.md`` says who
            loads which.
        bits: width of all layers.
        allocation: ``{layer: bits}``, the name of a stored one, or a file; layers that it does not name get ``bits``,
            or else the checkpoint's default width. Scales that were tuned for it go along.
        dtype: of dense weights; ``auto`` is the model's own. float32 is exact, the others round once.
        force: replace a checkpoint or an export that stands at ``output``.
        shard_bytes: largest safetensors file.
        progress: receives stages and notes.

    Raises:
        ExportError: the format, or the engines that read it, cannot hold this slice; says why and what to do.
        ConfigurationError: neither ``bits`` nor ``allocation``, or an unknown format or dtype.
        CheckpointError: a damaged checkpoint, or an output that stands or cannot be written.
        AllocationError: unknown layers or widths.
    """
    progress = progress or Silent()
    if format not in FORMATS:
        raise ConfigurationError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    if dtype != "auto" and format != "dense":
        raise ConfigurationError(f"--dtype is for dense exports; {format} has its own")
    checkpoint = open_checkpoint(path)
    destination = Path(output)
    check_destination(destination, force=force)
    if destination.exists() and os.path.samefile(destination, checkpoint.path):
        raise ConfigurationError(f"{destination}: an export cannot take the place of its checkpoint; choose another -o")
    widths = _widths(checkpoint, bits, allocation)
    own_scales = find_scales(checkpoint, allocation, widths)
    target = Target(checkpoint, widths, _dtype(checkpoint, dtype), own_scales)
    exporter = FORMATS[format](target)
    for note in exporter.notes:
        progress.note(note)
    progress.start("export", len(checkpoint.layers))
    with CheckpointWriter(destination, force=force, shard_bytes=shard_bytes) as writer:
        exporter.write(writer, progress.advance)
        for name, file in side_files(checkpoint.path).items():
            own_card = name == CARD_NAME and CARD_MARK in file.read_text(encoding="utf-8", errors="replace")
            if name not in _ABOUT_THE_PARENT and not own_card:
                writer.copy_file(name, file)
        record = {"format": format, "checkpoint": checkpoint.path.resolve().name, "layer_bits": dict(target.widths)}
        record |= scales_origin(checkpoint, allocation)
        writer.write_json(EXPORT_NAME, record)
        writer.commit()
    size = sum(file.stat().st_size for file in destination.iterdir() if file.suffix in (".safetensors", ".gguf"))
    return ExportReport(destination, format, target.widths, size, tuple(exporter.notes))


def _widths(
    checkpoint: Checkpoint, bits: int | None, allocation: Mapping[str, int] | str | Path | None
) -> dict[str, int]:
    if bits is None and allocation is None:
        raise ConfigurationError("say what to export: --bits, or --allocation")
    default = checkpoint.settings.bits if bits is None else check_bits(bits)
    return find_allocation(checkpoint, allocation or {}, default)


def _dtype(checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    return resolve_dtype(dtype, torch.device("meta"), checkpoint.stored_dtype or "float32")
