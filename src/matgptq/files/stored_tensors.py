"""Tensors in safetensors files: their headers without the data, and one at a time."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from matgptq.errors import SourceError
from matgptq.files.json_files import read_json

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a stored tensor lies and what it is."""

    file: Path
    dtype: str  # safetensors' name: F32, BF16, U8 ...
    shape: tuple[int, ...]
    name: str  # in that file

    @property
    def bytes(self) -> int:
        """Size of the data."""
        count = 1
        for size in self.shape:
            count *= size
        return count * DTYPE_BITS[self.dtype] // 8


def read_headers(directory: Path, *, exact: bool = False) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of all tensors of a safetensors directory, sharded or not; reads headers only.

    Args:
        directory: of the files.
        exact: refuse tensors that lie in a shard in which the index does not put them. Programs that read whole shards
            would take them, or one of two of the same name.

    Raises:
        SourceError: no weights, a shard that is missing or truncated, or an index that does not match its shards.
    """
    index_file = directory / INDEX_NAME
    if os.path.lexists(index_file):
        index = read_json(index_file)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise SourceError(f"{index_file}: no usable weight_map")
        files = sorted(set(weight_map.values()))
        if any(Path(name).name != name or name == ".." or "\0" in name for name in files):
            raise SourceError(f"{index_file}: a shard lies outside the directory")
    elif os.path.lexists(directory / WEIGHTS_NAME):
        weight_map, files = None, [WEIGHTS_NAME]
    else:
        raise SourceError(f"{directory}: neither {WEIGHTS_NAME} nor {INDEX_NAME} found")
    tensors: dict[str, TensorInfo] = {}
    for name in files:
        for key, info in read_header(directory / name).items():
            if weight_map is None or weight_map.get(key) == name:
                tensors[key] = info
            elif exact:
                place = f"puts it into {weight_map[key]}" if key in weight_map else "does not know it"
                raise SourceError(f"{directory / name}: holds tensor {key}, but {INDEX_NAME} {place}")
    lost = sorted(set(weight_map or ()) - set(tensors))
    if lost:
        assert weight_map is not None
        raise SourceError(f"{directory / weight_map[lost[0]]}: tensor {lost[0]} of {INDEX_NAME} is not in it")
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file; raises ``SourceError`` when it is missing, truncated or not safetensors."""
    if not file.is_file():
        raise SourceError(f"{file}: file is missing")
    try:
        with safe_open(file, "pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
            tensors = {
                name: TensorInfo(file, part.get_dtype(), tuple(part.get_shape()), name) for name, part in slices.items()
            }
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise SourceError(f"{file}: truncated or not a safetensors file ({error})") from error
    for name, info in tensors.items():
        if info.dtype not in DTYPE_BITS:
            raise SourceError(f"{file}: tensor {name} is {info.dtype}, which is not known here")
    return tensors


def read_tensor(info: TensorInfo) -> Tensor:
    """Load one tensor exactly as stored."""
    with safe_open(info.file, "pt") as handle:
        tensor: Tensor = handle.get_tensor(info.name)
        return tensor


def data_starts(file: Path) -> dict[str, int]:
    """Where in a safetensors file, whose header has been checked, the bytes of each tensor begin."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
