"""What an allocation may cost, in integers: bits of codes and scales, and bytes of the whole model.

bits per weight   codes at their width and every stored scale that serving reads, over the number of codes
size              that, rounded up to bytes, and every other tensor as stored: embeddings, norms, head
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from matgptq.errors import AllocationError, ConfigurationError
from matgptq.width_search.layer_groups import LayerGroup

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class SearchSpace:
    """Everything an allocation can be.

    Attributes:
        groups: layers that share a width, in the order of the forward pass.
        widths: that a group may have, ascending.
        other_bytes: of the tensors that are not quantized.
    """

    groups: tuple[LayerGroup, ...]
    widths: tuple[int, ...]
    other_bytes: int

    @property
    def weights(self) -> int:
        """Number of codes of the model."""
        return sum(group.weights for group in self.groups)

    @property
    def costs(self) -> list[dict[int, int]]:
        """For each group ``{width: bits that serving reads}``."""
        return [{bits: group.cost(bits) for bits in self.widths} for group in self.groups]

    def uniform(self, bits: int) -> tuple[int, ...]:
        """One width for all groups."""
        return (bits,) * len(self.groups)

    def cost(self, genome: Sequence[int]) -> int:
        """Bits of codes and scales."""
        return sum(group.cost(bits) for group, bits in zip(self.groups, genome, strict=True))

    def size(self, genome: Sequence[int]) -> int:
        """Bytes of the whole model as served."""
        return (self.cost(genome) + 7) // 8 + self.other_bytes

    def code_bits(self, genome: Sequence[int]) -> float:
        """Average width of the codes, scales left out."""
        return sum(group.weights * bits for group, bits in zip(self.groups, genome, strict=True)) / self.weights

    def bits_per_weight(self, genome: Sequence[int]) -> float:
        """Average bits of codes and scales."""
        return self.cost(genome) / self.weights

    def allocation(self, genome: Sequence[int]) -> dict[str, int]:
        """``{layer: width}``."""
        return {layer: bits for group, bits in zip(self.groups, genome, strict=True) for layer in group.layers}


@dataclass(frozen=True)
class Budget:
    """A limit on codes and scales.

    Attributes:
        bits: most bits of codes and scales together.
        name: in words: ``3.25 bits per weight``, ``80 MB``.
        label: for names of files: ``3.25bpw``, ``80MB``.
    """

    bits: int
    name: str
    label: str


def bits_budget(space: SearchSpace, target: float | str | Fraction) -> Budget:
    """A budget in bits per weight, scales included; ``target`` is taken as the decimal number that it is written as.

    Raises:
        ConfigurationError: not a positive number.
        AllocationError: no allocation is that small, or all are smaller.
    """
    try:
        exact = Fraction(str(target))
    except (ValueError, ZeroDivisionError):
        raise ConfigurationError(f"a target must be a number of bits per weight, not {target!r}") from None
    smallest, largest = (space.cost(space.uniform(bits)) for bits in _ends(space))
    number = f"{float(exact):.6g}"
    if not smallest <= exact * space.weights <= largest:
        # Rounded inwards, so that the numbers that are printed can be asked for.
        low = math.ceil(10_000 * smallest / space.weights) / 10_000
        high = math.floor(10_000 * largest / space.weights) / 10_000
        raise AllocationError(
            f"{number} bits per weight cannot be reached: widths {_ends(space)[0]} to {_ends(space)[1]} take {low:g} "
            f"to {high:g}, scales included"
        )
    return Budget(int(exact * space.weights), f"{number} bits per weight", f"{number}bpw")


def size_budget(space: SearchSpace, target: int | str) -> Budget:
    """A budget for the whole model as served, in bytes or as text: ``80MB``, ``0.1 GB``, ``76MiB``.

    Raises:
        ConfigurationError: not a size.
        AllocationError: what is not quantized takes more, no allocation is that small, or all are smaller.
    """
    size = parse_size(target)
    number = f"{size / 10**6:.10g}"
    name = f"{number} MB"
    if size < space.other_bytes:
        raise AllocationError(
            f"{name} cannot be reached: what is not quantized (embeddings, norms, head) takes "
            f"{space.other_bytes:,} bytes alone"
        )
    smallest, largest = (space.size(space.uniform(bits)) for bits in _ends(space))
    if not smallest <= size <= largest:
        raise AllocationError(
            f"{name} cannot be reached: widths {_ends(space)[0]} to {_ends(space)[1]} take {smallest:,} to {largest:,} "
            f"bytes, {space.other_bytes:,} of them not quantized"
        )
    return Budget((size - space.other_bytes) * 8, name, f"{number}MB")


def parse_size(text: int | str) -> int:
    """Bytes from ``80MB``, ``0.5 GiB`` or a plain number."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if found is None or found[2].upper() not in _UNITS:
        raise ConfigurationError(f"a size is a number of bytes, or ends in KB, MB, GB, KiB, MiB or GiB; not {text!r}")
    return int(Fraction(found[1]) * _UNITS[found[2].upper()])


def parse_sweep(text: str) -> list[Fraction]:
    """Targets from ``FIRST:LAST:STEP``, both ends included.

    Raises:
        ConfigurationError: not three positive numbers in order.
    """
    try:
        first, last, step = (Fraction(part) for part in text.split(":"))
    except (ValueError, ZeroDivisionError):
        raise ConfigurationError(f"a sweep is FIRST:LAST:STEP in bits, like 2.25:6:0.25; not {text!r}") from None
    if step <= 0 or not 0 < first <= last:
        raise ConfigurationError(f"a sweep must go up from a positive FIRST in positive steps; not {text!r}")
    return [first + step * index for index in range(int((last - first) / step) + 1)]


def _ends(space: SearchSpace) -> tuple[int, int]:
    return space.widths[0], space.widths[-1]
