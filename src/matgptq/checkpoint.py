"""Checkpoints on disk: written whole or not at all, opened with every header checked."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from matgptq.atomic_files import write_text
from matgptq.checksums import CHECKSUMS_NAME, checksums_text, read_checksums, stored_checksums
from matgptq.errors import AllocationError, CheckpointError, SourceError
from matgptq.format import (
    CODES,
    GUARD,
    QUANT_METHOD,
    SLICE_METHOD,
    SLICED_CODES,
    SLICED_SCALES,
    Settings,
    check_layer,
    is_own,
    parse_settings,
    scales_name,
)
from matgptq.model_config import stored_dtype
from matgptq.nested_weight import NestedWeight, scale_source
from matgptq.size import layer_bits
from matgptq.slicing import MIN_BITS, WIDTHS
from matgptq.source import INDEX_NAME, WEIGHTS_NAME, TensorInfo, read_headers, read_json, read_tensor
from matgptq.tensor_file import write_tensors

REPORT_NAME = "report.json"
RECORD_NAME = "evaluation.json"
CARD_NAME = "README.md"
CARD_MARK = "<!-- matgptq: "  # of the part of the card that is ours
EXPORT_NAME = "matgptq_export.json"  # in the directory of an export: what it is
DEFAULT_SHARD_BYTES = 4 << 30


class CheckpointWriter:
    """Collects a checkpoint in a temporary directory beside its destination and renames it when it is whole.

    Use as a context manager: leaving it with an exception (Ctrl-C and a full disk included) removes everything that
    was written; leaving it normally without ``commit`` does, too.

    Args:
        destination: directory to create.
        force: replace a checkpoint, an export or an empty directory that stands there.
        shard_bytes: tensors are gathered up to this size before a file is written.
        staging: the temporary directory; default one with a random name beside the destination.

    Raises:
        CheckpointError: the destination exists and ``force`` is off, or holds something that is neither a matgptq
            checkpoint nor an export and is therefore not ours to delete.
    """

    def __init__(
        self,
        destination: Path,
        *,
        force: bool = False,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        staging: Path | None = None,
    ) -> None:
        self.destination = Path(os.path.abspath(destination))
        self.force = force
        self.shard_bytes = shard_bytes
        check_destination(self.destination, force=force)
        self._wanted_staging = staging
        self._staging: Path | None = None
        self._pending: dict[str, Tensor | TensorInfo] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._checksums: dict[str, str] = {}

    def __enter__(self) -> CheckpointWriter:
        try:
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            staging = self._wanted_staging or _beside(self.destination, "partial")
            staging.mkdir()  # not mkdtemp, which makes directories private: the user's umask decides
            self._staging = staging
        except OSError as error:
            raise CheckpointError(f"{self.destination}: cannot be written: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    @property
    def staging(self) -> Path:
        """The temporary directory; files put there become part of the checkpoint."""
        if self._staging is None:
            raise CheckpointError("the checkpoint writer is not open")
        return self._staging

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor as it is."""
        self._take(name, tensor.detach().to("cpu").contiguous(), tensor.numel() * tensor.element_size())

    def add_stored(self, name: str, info: TensorInfo) -> None:
        """Take one tensor from another file, whose bytes are copied when the shard is written."""
        self._take(name, info, info.bytes)

    def _take(self, name: str, tensor: Tensor | TensorInfo, size: int) -> None:
        if name in self._pending or any(name in shard for shard in self._shards):
            raise CheckpointError(f"tensor {name} is written twice")
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size
        self._total_bytes += size

    def add_layer(self, layer: str, weight: NestedWeight) -> None:
        """Take one quantized layer: codes, scales and the guard that stock loaders stumble over."""
        for name, tensor in layer_tensors(layer, weight).items():
            self.add(name, tensor)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON side file."""
        with disk_errors(self.destination):
            _write_json(self.staging / name, value)

    def copy_file(self, name: str, file: Path) -> None:
        """Copy a side file to a place relative to the checkpoint."""
        with disk_errors(self.destination):
            (self.staging / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, self.staging / name)

    def commit(self) -> None:
        """Write what is pending, name the shards, and put the directory in its place."""
        self._flush()
        check_destination(self.destination, force=self.force)  # again: hours may have passed
        with disk_errors(self.destination):
            self._name_shards()
            for file in self.staging.iterdir():
                _sync(file)
            _sync(self.staging)
            if os.path.lexists(self.destination):
                _exchange(self.staging, self.destination)
                _remove(self.staging)  # what stood there before
            else:
                os.rename(self.staging, self.destination)
            self._staging = None
            _sync(self.destination.parent)

    def _flush(self) -> None:
        if not self._pending:
            return
        file = self.staging / f"shard-{len(self._shards)}.safetensors"
        with disk_errors(self.destination):
            self._checksums |= write_tensors(file, self._pending)
        self._shards.append(list(self._pending))
        self._pending = {}
        self._pending_bytes = 0

    def _name_shards(self) -> None:
        count = len(self._shards)
        if count == 0:  # an export to a file of another kind
            return
        (self.staging / CHECKSUMS_NAME).write_text(checksums_text(self._checksums), encoding="utf-8")
        if count == 1:
            os.rename(self.staging / "shard-0.safetensors", self.staging / WEIGHTS_NAME)
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            os.rename(self.staging / f"shard-{number}.safetensors", self.staging / name)
            weight_map.update(dict.fromkeys(names, name))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self.staging / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_checksums(directory: Path) -> None:
    """Give a directory of safetensors files that another program wrote the checksums of what lies there now.

    Raises:
        SourceError: its files are damaged.
        CheckpointError: it cannot be written.
    """
    write_text(directory / CHECKSUMS_NAME, checksums_text(stored_checksums(read_headers(directory))))


def layer_tensors(layer: str, weight: NestedWeight) -> dict[str, Tensor]:
    """What a checkpoint holds of a quantized layer: codes, scales and the guard that stock loaders stumble over."""
    return {
        f"{layer}.{CODES}": weight.codes,
        **{f"{layer}.{scales_name(bits)}": scales.to(torch.float16) for bits, scales in sorted(weight.scales.items())},
        f"{layer}.{GUARD}": torch.empty(0, dtype=torch.float16),
    }


def read_layer(layer: str, tensors: Mapping[str, TensorInfo], scale_bits: Sequence[int]) -> NestedWeight:
    """Codes and scales of a layer from the file that holds them."""
    codes, *scales = (f"{layer}.{name}" for name in (CODES, *map(scales_name, scale_bits)))
    return NestedWeight(
        read_tensor(codes, tensors[codes]),
        {bits: read_tensor(name, tensors[name]) for bits, name in zip(scale_bits, scales, strict=True)},
    )


def _beside(destination: Path, role: str) -> Path:
    return destination.with_name(f".{destination.name}.{role}-{secrets.token_hex(4)}")


def check_destination(destination: Path, *, force: bool) -> None:
    """Refuse a destination that stands, unless ``force`` may replace it; see ``CheckpointWriter``."""
    if not os.path.lexists(destination):  # a dangling link is in the way, too
        return
    if not force:
        raise CheckpointError(f"{destination}: exists already; use --force to replace it, or another -o")
    if not destination.is_dir():
        raise CheckpointError(f"{destination}: is a file; choose another -o")
    if any(destination.iterdir()) and not is_checkpoint(destination) and not (destination / EXPORT_NAME).is_file():
        raise CheckpointError(f"{destination}: is not a matgptq checkpoint or export, so --force does not delete it")


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory's ``config.json`` claims to be one of ours."""
    try:
        config = read_json(directory / "config.json")
    except SourceError:
        return False
    record = config.get("quantization_config")
    return isinstance(record, dict) and record.get("quant_method") in (QUANT_METHOD, SLICE_METHOD)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


class disk_errors:
    """Turn a full disk or a read-only directory into an error that says so."""

    def __init__(self, destination: Path, left: str = "nothing was left behind") -> None:
        self.destination = destination
        self.left = left

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(f"{self.destination}: cannot be written: {error}; {self.left}") from error


def _sync(path: Path) -> None:
    """Make a file or directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class LayerInfo:
    """Shape of a quantized layer in a checkpoint."""

    out_features: int
    in_features: int
    group_size: int


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; tensors stay on disk.

    Attributes:
        path: its directory.
        config: parsed ``config.json``.
        settings: its ``quantization_config``.
        tensors: headers of all stored tensors.
        layers: the quantized layers in the order of the files.
    """

    path: Path
    config: Mapping[str, Any]
    settings: Settings
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    layers: Mapping[str, LayerInfo] = field(repr=False)

    @property
    def widths_held(self) -> tuple[int | dict[str, int], ...]:
        """What can be served: every width of a parent, the one width or allocation of a slice."""
        if not self.settings.is_slice:
            return WIDTHS
        held = {layer: self.settings.bits_of(layer) for layer in self.layers}
        return (next(iter(held.values())) if len(set(held.values())) == 1 else held,)

    @property
    def stored_dtype(self) -> str | None:
        """The dtype that ``config.json`` names for what is not quantized, if it names one."""
        return stored_dtype(self.config)

    @property
    def quantized_weights(self) -> int:
        """Number of weights that have codes."""
        return sum(layer.out_features * layer.in_features for layer in self.layers.values())

    @property
    def other_bytes(self) -> int:
        """Bytes of everything that is not codes or scales: embeddings, norms, biases, head."""
        names = (CODES, SLICED_CODES, SLICED_SCALES, *map(scales_name, self.settings.scale_bits))
        own = {f"{layer}.{name}" for layer in self.layers for name in names}
        return sum(info.bytes for name, info in self.tensors.items() if name not in own)

    @functools.cached_property
    def identity(self) -> str:
        """16 hexadecimal digits that another quantization of the same model does not share.

        A hash of names, shapes and the first row of the codes and of every set of scales of each layer: a few
        megabytes to read at most. How the tensors are spread over files makes no difference, nor the default width.
        """
        names = (CODES, SLICED_CODES, SLICED_SCALES, *map(scales_name, self.settings.scale_bits))
        own = sorted({f"{layer}.{name}" for layer in self.layers for name in names} & set(self.tensors))
        digest = hashlib.sha256()
        with ExitStack() as stack:
            files = {info.file for info in map(self.tensors.__getitem__, own)}
            handles = {file: stack.enter_context(safe_open(file, "pt")) for file in files}
            for name in own:
                info = self.tensors[name]
                row = handles[info.file].get_slice(name)[:1].contiguous().view(torch.uint8)
                digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
                digest.update(row.numpy().tobytes())
        return digest.hexdigest()[:16]

    def widths(self, bits: int | Mapping[str, int]) -> dict[str, int]:
        """Width of each layer for a uniform width or an allocation (which must name every layer).

        Raises:
            AllocationError: a layer is unknown, or has no width.
        """
        if isinstance(bits, int):
            return dict.fromkeys(self.layers, bits)
        unknown = sorted(set(bits) - set(self.layers))
        lost = [layer for layer in self.layers if layer not in bits]
        if unknown or lost:
            problem = f"unknown layer {unknown[0]}" if unknown else f"no width for layer {lost[0]}"
            raise AllocationError(f"allocation: {problem}")
        return dict(bits)

    def served_bits(self, bits: int | Mapping[str, int]) -> int:
        """Bits of codes and scales that serving reads at a width or an allocation."""
        return sum(
            layer_bits(layer.out_features, layer.in_features, layer.group_size, width)
            for layer, width in ((self.layers[name], width) for name, width in self.widths(bits).items())
        )

    def bits_per_weight(self, bits: int | Mapping[str, int]) -> float:
        """Average bits per quantized weight, all scales that are read included."""
        return self.served_bits(bits) / self.quantized_weights

    def average_bits(self, bits: int | Mapping[str, int]) -> float:
        """Width of the codes, for an allocation the average over the weights; an int if it is the same everywhere."""
        if isinstance(bits, int):
            return bits
        sizes = {name: layer.out_features * layer.in_features for name, layer in self.layers.items()}
        return sum(size * bits[name] for name, size in sizes.items()) / self.quantized_weights

    def served_bytes(self, bits: int | Mapping[str, int]) -> int:
        """Size of the whole model as served: codes at their width, their scales, and every other tensor."""
        return (self.served_bits(bits) + 7) // 8 + self.other_bytes


def open_checkpoint(path: str | Path, *, slices: bool = False) -> Checkpoint:
    """Open a checkpoint directory, reading and checking headers only.

    Args:
        path: the directory.
        slices: open a slice that was exported from a parent, too. Its layers have no parent codes.

    Raises:
        CheckpointError: not a matgptq checkpoint, a slice that was not asked for, another format version, damaged
            files, or tensors that do not match ``config.json``; the message names the file or the layer.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: not a checkpoint directory (no config.json)")
    try:
        config = read_json(path / "config.json")
        record = config.get("quantization_config")
        if not isinstance(record, dict):
            raise CheckpointError(f"{path / 'config.json'}: no quantization_config, so not a {QUANT_METHOD} checkpoint")
        settings = parse_settings(record, str(path / "config.json"))
        if settings.is_slice and not slices:
            raise CheckpointError(f"{path}: holds one slice only; this needs the checkpoint that it was exported from")
        tensors = read_headers(path, exact=True)
    except SourceError as error:
        raise CheckpointError(str(error)) from error
    blocks = config.get("num_hidden_layers")
    if isinstance(blocks, int) and blocks > len(tensors):  # it would take for ever to build them before this is seen
        raise CheckpointError(
            f"{path / 'config.json'}: num_hidden_layers is {blocks}, but the files hold only {len(tensors)} tensors"
        )
    found: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for name, info in tensors.items():
        layer, _, leaf = name.rpartition(".")
        found.setdefault(layer, {})[leaf] = (info.dtype, info.shape)
    found = {layer: parts for layer, parts in found.items() if any(map(is_own, parts))}
    if not found:
        raise CheckpointError(f"{path}: config.json says {QUANT_METHOD}, but no tensor in it holds codes")
    layers = {}
    for layer, parts in found.items():
        check_layer(settings, layer, parts, None)
        if settings.is_slice:
            out_features, groups = parts[SLICED_SCALES][1]
            in_features = groups * settings.group_size_of(layer, 0)
        else:
            out_features, in_features = parts[CODES][1]
        layers[layer] = LayerInfo(out_features, in_features, settings.group_size_of(layer, in_features))
    unknown = sorted(({*settings.layer_group_sizes, *(settings.layer_bits or {})}) - set(layers))
    if unknown:
        raise CheckpointError(f"{path}: config.json names layer {unknown[0]}, which has no codes")
    return Checkpoint(path, config, settings, tensors, layers)


def replace_scales(path: str | Path, bits: int, scales: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Give one width of a checkpoint new scales. At every moment the directory holds either the old or the new ones.

    Only the files that hold scales of that width are written again, beside the checkpoint; the others are linked. A
    width without scales of its own gets them, and the next smaller width, if it read the same ones as this, gets
    copies of those, so that no other width changes.

    Args:
        path: the checkpoint.
        bits: the width.
        scales: ``{layer: [out, groups]}`` storable, of every layer.
        record: of how they came about, for ``refinement`` in ``config.json`` and ``report.json``.

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
            new[f"{layer}.{scales_name(below)}"] = read_tensor(name, checkpoint.tensors[name])
        own = (*own, below)
    settings = dataclasses.replace(
        checkpoint.settings,
        scale_bits=tuple(sorted({*own, bits})),
        refinement={**checkpoint.settings.refinement, str(bits): dict(record)},
    )
    staging = _beside(directory, "partial")
    try:
        with disk_errors(directory):
            shutil.copytree(directory, staging, copy_function=_link_or_copy, symlinks=True)
            _write_tensors(staging, checkpoint, new)
            _write_json(staging / "config.json", {**checkpoint.config, "quantization_config": settings.to_dict()})
            if (directory / REPORT_NAME).is_file():
                report = read_json(directory / REPORT_NAME)
                _write_json(staging / REPORT_NAME, {**report, "refinement": dict(settings.refinement)})
            for file in (*staging.iterdir(), staging):
                _sync(file)
            _exchange(staging, directory)
            _sync(directory.parent)
    except SourceError as error:
        raise CheckpointError(str(error)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _write_tensors(staging: Path, checkpoint: Checkpoint, new: Mapping[str, Tensor]) -> None:
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
        written = write_tensors(staging / f"{file}.new", {**kept, **tensors})
        # Only of the new ones: what was damaged before must not look right now.
        checksums.update({name: written[name] for name in tensors})
        os.replace(staging / f"{file}.new", staging / file)
    if (staging / INDEX_NAME).is_file():
        index = read_json(staging / INDEX_NAME)
        added = {name: file for file, tensors in by_file.items() for name in tensors if name not in checkpoint.tensors}
        index["weight_map"] = dict(sorted({**index["weight_map"], **added}.items()))
        size = sum(info.bytes for info in checkpoint.tensors.values())
        index["metadata"] = {
            **index.get("metadata", {}),
            "total_size": size + sum(new[name].numel() * 2 for name in added),
        }
        _write_json(staging / INDEX_NAME, index)
    if known is not None:
        _replace_text(staging / CHECKSUMS_NAME, checksums_text(checksums))


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    _replace_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _replace_text(file: Path, text: str) -> None:
    """Replace a file that may be a hard link; the other name keeps the old content."""
    beside = file.with_name(f"{file.name}.new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


def _exchange(first: Path, second: Path) -> None:
    """Swap two directories, in one step where the system can."""
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 and renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0:
        return
    aside = _beside(second, "replaced")
    os.rename(second, aside)
    try:
        os.rename(first, second)
    except BaseException:
        os.rename(aside, second)
        raise
    os.rename(aside, first)
