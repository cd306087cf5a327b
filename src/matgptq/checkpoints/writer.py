"""Checkpoints are written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from matgptq.checkpoints.checkpoint import is_checkpoint
from matgptq.checkpoints.format import EXPORT_NAME
from matgptq.checkpoints.stored_layers import layer_tensors
from matgptq.errors import CheckpointError
from matgptq.files.atomic import json_text
from matgptq.files.checksums import CHECKSUMS_NAME, checksums_text
from matgptq.files.directories import directory_beside, disk_errors, exchange, remove_whole, sync
from matgptq.files.stored_tensors import INDEX_NAME, WEIGHTS_NAME, TensorInfo
from matgptq.files.tensor_file import write_tensors
from matgptq.nested_weight import NestedWeight

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
        self._names: set[str] = set()
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._checksums: dict[str, str] = {}

    def __enter__(self) -> CheckpointWriter:
        try:
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            staging = self._wanted_staging or directory_beside(self.destination, "partial")
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
        if name in self._names:
            raise CheckpointError(f"tensor {name} is written twice")
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._names.add(name)
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
            (self.staging / name).write_text(json_text(value), encoding="utf-8")

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
                sync(file)
            sync(self.staging)
            if os.path.lexists(self.destination):
                exchange(self.staging, self.destination)
                remove_whole(self.staging)  # what stood there before
            else:
                os.rename(self.staging, self.destination)
            self._staging = None
            sync(self.destination.parent)

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


def check_destination(destination: Path, *, force: bool) -> None:
    """Refuse a destination that stands, unless ``force`` may replace it, or that cannot be made; see the writer."""
    place = next(each for each in destination.absolute().parents if os.path.lexists(each))
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise CheckpointError(f"{destination}: cannot be written: {place} is read-only, or no directory")
    if not os.path.lexists(destination):  # a dangling link is in the way, too
        return
    if not force:
        raise CheckpointError(f"{destination}: exists already; use --force to replace it, or another -o")
    if not destination.is_dir():
        raise CheckpointError(f"{destination}: is a file; choose another -o")
    if any(destination.iterdir()) and not is_checkpoint(destination) and not (destination / EXPORT_NAME).is_file():
        raise CheckpointError(f"{destination}: is not a matgptq checkpoint or export, so --force does not delete it")
