"""A width for every layer, as a file or a mapping."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matgptq.errors import AllocationError, ConfigurationError
from matgptq.slicing import check_bits


def read_allocation(file: str | Path) -> dict[str, int]:
    """Read ``{layer: bits}`` from JSON (``{"layers": {...}}`` or the mapping itself) or from ``layer: bits`` lines.

    Raises:
        AllocationError: the file cannot be read, or a line or a width is wrong; names it.
    """
    file = Path(file)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AllocationError(f"{file}: cannot be read: {error}") from error
    if text.lstrip().startswith("{"):
        try:
            # Objects become lists of pairs, so that a layer named twice is seen.
            record = json.loads(text, object_pairs_hook=list)
        except ValueError as error:
            raise AllocationError(f"{file}: not valid JSON: {error}") from error
        pairs: list[tuple[str, Any]] = next((value for key, value in record if key == "layers"), record)
        if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
            raise AllocationError(f'{file}: "layers" must map layers to widths')
    else:
        pairs = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            layer, separator, bits = line.rpartition(":")
            if not separator or not bits.strip().isdecimal():
                raise AllocationError(f"{file}, line {number}: expected 'layer: bits', found {line.strip()!r}")
            pairs.append((layer.strip(), int(bits)))
    if not pairs:
        raise AllocationError(f"{file}: no layers in it")
    widths: dict[str, int] = {}
    for layer, bits in pairs:
        if layer in widths:
            raise AllocationError(f"{file}: layer {layer} is named twice")
        widths[layer] = _width(layer, bits, str(file))
    return widths


def complete_allocation(widths: Mapping[str, int], layers: Iterable[str], default_bits: int) -> dict[str, int]:
    """Check an allocation against a model's layers; layers that it does not name get ``default_bits``.

    Raises:
        AllocationError: it names a layer that the model does not have, or a width outside 2..8.
    """
    complete = dict.fromkeys(layers, default_bits)
    for layer, bits in widths.items():
        if layer not in complete:
            raise AllocationError(f"allocation: unknown layer {layer}")
        complete[layer] = _width(layer, bits, "allocation")
    return complete


def _width(layer: str, bits: Any, where: str) -> int:
    try:
        return check_bits(bits)
    except ConfigurationError as error:
        raise AllocationError(f"{where}: layer {layer}: {error}") from None
