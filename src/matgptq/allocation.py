"""A width for every layer, as a mapping, as a record of how it was found, and as a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matgptq.errors import AllocationError, ConfigurationError
from matgptq.slicing import check_bits

_QUOTED = 60  # characters of a wrong line that are shown
_DIGITS = 60  # with spaces; Python makes no number of thousands


@dataclass(frozen=True)
class Allocation:
    """An allocation that was searched for.

    Attributes:
        name: of its file.
        checkpoint: ``Checkpoint.codes_identity`` of the one that it was made for.
        target: the budget, in words.
        bits: average width of the codes.
        bits_per_weight: with all scales that serving reads.
        bytes: size of the whole model as served, exactly.
        slack_bits: what is left of the budget.
        fitness: how it scores on text that the search did not see; see ``matgptq.search``.
        found: method, settings, seed and cost of the search; a record.
        layers: ``{layer: width}``.
    """

    name: str
    checkpoint: str
    target: str
    bits: float
    bits_per_weight: float
    bytes: int
    slack_bits: int
    fitness: Mapping[str, Any]
    found: Mapping[str, Any]
    layers: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def format_lines(widths: Mapping[str, int]) -> str:
    """The text format of the published reference: one ``layer: bits`` a line."""
    return "".join(f"{layer}: {bits}\n" for layer, bits in widths.items())


def digest_of_widths(widths: Mapping[str, int]) -> str:
    """SHA-256 over the lines of all layers, sorted by their names."""
    return hashlib.sha256(format_lines(dict(sorted(widths.items()))).encode()).hexdigest()


def read_allocation(file: str | Path, identities: Sequence[str] = ()) -> dict[str, int]:
    """Read ``{layer: bits}`` from JSON (``{"layers": {...}}`` or the mapping itself) or from ``layer: bits`` lines.

    Args:
        file: of one of these forms.
        identities: ``Checkpoint.allocation_identities`` of the one that it is to be used with; a file that names
            another one is refused.

    Raises:
        AllocationError: the file cannot be read, a line or a width is wrong, or it belongs to another checkpoint.
    """
    file = Path(file)
    try:
        if file.exists() and not file.is_file():  # a pipe would wait for ever
            raise AllocationError(f"{file}: not a file")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AllocationError(f"{file}: cannot be read: {error}") from error
    if text.lstrip().startswith("{"):
        pairs = _json_pairs(text, file, identities)
    else:
        pairs = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            layer, separator, bits = line.rpartition(":")
            if not separator or not bits.strip().isdecimal() or len(bits) > _DIGITS:
                found = line.strip()[:_QUOTED]  # it may be a book on one line
                raise AllocationError(f"{file}, line {number}: expected 'layer: bits', found {found!r}")
            pairs.append((layer.strip(), int(bits)))
    if not pairs:
        raise AllocationError(f"{file}: no layers in it")
    widths: dict[str, int] = {}
    for layer, bits in pairs:
        if layer in widths:
            raise AllocationError(f"{file}: layer {layer} is named twice")
        widths[layer] = _width(layer, bits, str(file))
    return widths


def _json_pairs(text: str, file: Path, identities: Sequence[str]) -> list[tuple[str, Any]]:
    try:
        # Objects become lists of pairs, so that a layer named twice is seen.
        record = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise AllocationError(f"{file}: not valid JSON: {error}") from error
    pairs: list[tuple[str, Any]] = record
    for key, value in record:
        if key == "layers":
            pairs = value
            entries = dict(record)
            if identities and "checkpoint" in entries and entries["checkpoint"] not in identities:
                raise AllocationError(
                    f"{file}: was made for another checkpoint ({entries['checkpoint']}, this one is {identities[0]}); "
                    "search again, or give its 'layer: bits' lines if it is meant to be used here"
                )
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise AllocationError(f'{file}: "layers" must map layers to widths')
    return pairs


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
