"""Write safetensors files without holding their content: tensors from memory, or copied from other files.

Format: 8 bytes little-endian length of the header, the header as JSON (``{name: {dtype, shape, data_offsets}}``,
offsets from its end), the data without gaps. Larger element sizes come first, so that every tensor is aligned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from matgptq.files.checksums import begin_checksum
from matgptq.files.stored_tensors import DTYPE_BITS, TensorInfo, data_starts

if TYPE_CHECKING:
    from hashlib import _Hash

_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.int64: "I64", torch.float64: "F64",
}  # fmt: skip
_ALIGNMENT = 8
_COPIED_AT_A_TIME = 1 << 24


def write_tensors(file: Path, tensors: Mapping[str, Tensor | TensorInfo]) -> dict[str, str]:
    """Write one safetensors file.

    Args:
        file: to create.
        tensors: by name; a ``TensorInfo`` is copied byte by byte from the file that it names.

    Returns:
        ``{name: checksum}`` of what was written; see ``matgptq.files.checksums``.

    Raises:
        OSError: the file cannot be written, or one that is copied from cannot be read.
    """
    dtypes = {name: _NAMES[each.dtype] if isinstance(each, Tensor) else each.dtype for name, each in tensors.items()}
    order = sorted(tensors, key=lambda name: (-DTYPE_BITS[dtypes[name]], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        each = tensors[name]
        size = each.numel() * each.element_size() if isinstance(each, Tensor) else each.bytes
        offsets = [position, position + size]
        header[name] = {"dtype": dtypes[name], "shape": list(each.shape), "data_offsets": offsets}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    starts: dict[Path, dict[str, int]] = {}
    checksums = {}
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            each = tensors[name]
            digest = begin_checksum(name, dtypes[name], each.shape)
            if isinstance(each, Tensor):
                if each.numel():
                    flat = each.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                    digest.update(flat.data)
                    flat.tofile(target)
            else:
                if each.file not in starts:
                    starts[each.file] = data_starts(each.file)
                _copy(each, starts[each.file][each.name], target, digest)
            checksums[name] = digest.hexdigest()
    return checksums


def _copy(tensor: TensorInfo, start: int, target: BinaryIO, digest: _Hash) -> None:
    count = tensor.bytes
    with tensor.file.open("rb") as handle:
        handle.seek(start)
        while count:
            piece = handle.read(min(count, _COPIED_AT_A_TIME))
            if not piece:
                raise OSError(f"{tensor.file}: ends too early")
            target.write(piece)
            digest.update(piece)
            count -= len(piece)
