"""How a product is cut into programs: a reasoned default, and the fastest of a few, measured once and remembered.

Measuring happens at the first product of a kind (card, shape, width, group size, dtype, and batch up to the next power
of two), takes seconds, most of them compilation, and is kept in ``triton.json`` in the cache directory.
``MATGPTQ_AUTOTUNE=0`` turns it off; it never happens while a CUDA graph is being recorded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from matgptq.files.atomic import replacing
from matgptq.files.cache import cache_dir
from matgptq.gpu.layout import CHUNK_COLUMNS, PlaneWeight


@dataclass(frozen=True)
class Launch:
    """How a product is cut.

    Attributes:
        warps: of a program.
        units: pairs of a block of rows and a chunk of columns that a program holds at a time: warps, or twice that.
        blocks: blocks of rows per program; divides ``units``.
        tiles: rows of x per program, in eights.
        splits: parts that the columns are cut into.
        ahead: whether the weights of a step are on their way while the one before is multiplied.
        stages: 0 to multiply from registers; else weights go through shared memory, and what they are made of is
            loaded so many steps ahead. Then ``units`` is ``blocks``.
    """

    warps: int
    units: int
    blocks: int
    tiles: int
    splits: int
    ahead: bool = False
    stages: int = 0

    def grid(self, weight: PlaneWeight, batch: int) -> tuple[int, int, int]:
        """Programs over the rows of x, the rows of the weight and the splits."""
        return _ceil(batch, 8 * self.tiles), _ceil(weight.planes.shape[1], self.blocks), self.splits

    def steps(self, weight: PlaneWeight) -> int:
        """Steps of a program over its columns."""
        return _ceil(_ceil(weight.planes.shape[2], self.units // self.blocks), self.splits)

    def with_splits(self, weight: PlaneWeight, batch: int, splits: int) -> Launch:
        """The same with about so many splits, all equal and none empty; 1 where there are no counters for more."""
        total = _ceil(weight.planes.shape[2], self.units // self.blocks)
        tiles, rows, _ = self.grid(weight, batch)
        if tiles * rows > weight.arrived.numel():
            splits = 1
        steps = _ceil(total, max(1, min(splits, total)))
        return dataclasses.replace(self, splits=_ceil(total, steps))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def default_launch(weight: PlaneWeight, batch: int, processors: int) -> Launch:
    """A launch that fills the card, by reasoning alone."""
    return _shapes(batch)[0][0].with_splits(
        weight, batch, _wanted_splits(weight, batch, *_shapes(batch)[0], processors)
    )


def candidate_launches(weight: PlaneWeight, batch: int, processors: int) -> list[Launch]:
    """The launches worth measuring, without repeats, the default first."""
    found = [default_launch(weight, batch, processors)]
    for shape, programs in _shapes(batch):
        wanted = _wanted_splits(weight, batch, shape, programs, processors)
        found += [shape.with_splits(weight, batch, splits) for splits in (wanted, wanted // 2, wanted * 2)]
    return list(dict.fromkeys(found))


def _shapes(batch: int) -> list[tuple[Launch, int]]:
    """Launches without splits, and how many such programs a multiprocessor holds at a time (by their registers).

    Those that were fastest for some width, form or shape on an H100.
    """
    if batch <= 8:
        return [
            (Launch(16, 16, 1, 1, 1, ahead=True), 1),
            (Launch(16, 32, 1, 1, 1, ahead=True), 1),
            (Launch(8, 8, 1, 1, 1, ahead=True), 2),
            (Launch(4, 8, 1, 1, 1, ahead=True), 3),
            (Launch(4, 8, 1, 1, 1), 4),
            (Launch(4, 4, 1, 1, 1, ahead=True), 5),
        ]
    if batch <= 16:
        return [
            (Launch(8, 8, 2, 2, 1), 2),
            (Launch(8, 8, 1, 2, 1), 2),
            (Launch(8, 8, 1, 2, 1, ahead=True), 2),
        ]
    if batch <= 32:
        return [
            (Launch(8, 8, 2, 4, 1, ahead=True), 1),
            (Launch(4, 4, 2, 4, 1, ahead=True), 2),
            (_through_shared_memory(4, 4, 4, ahead=True), 3),
            (_through_shared_memory(8, 4, 4, ahead=True), 2),
        ]
    if batch <= 64:
        return [
            (_through_shared_memory(8, 4, 8, ahead=True), 2),
            (_through_shared_memory(4, 4, 8, stages=3), 2),
            (Launch(8, 8, 4, 4, 1, ahead=True), 1),
            (Launch(4, 4, 2, 4, 1, ahead=True), 2),
        ]
    return [
        (_through_shared_memory(4, 2, 16, ahead=True), 2),
        (_through_shared_memory(4, 4, 8, stages=3), 2),
        (_through_shared_memory(4, 4, 16), 2),
    ]


def _through_shared_memory(warps: int, blocks: int, tiles: int, *, ahead: bool = False, stages: int = 1) -> Launch:
    return Launch(warps, blocks, blocks, tiles, 1, ahead, stages)


def _wanted_splits(weight: PlaneWeight, batch: int, shape: Launch, programs: int, processors: int) -> int:
    tiles, rows, _ = shape.grid(weight, batch)
    return max(1, round(programs * processors / (tiles * rows)))


def batch_class(batch: int) -> int:
    """What a measurement for this batch holds for: 8, 16, 32, 64 or 128 and more rows of x."""
    return min(128, 8 << (_ceil(batch, 8) - 1).bit_length())


def describe(weight: PlaneWeight, bits: int, batch: int, dtype: str) -> str:
    """What a measurement depends on, besides the card and the kernels."""
    form = "parent" if weight.resident else "slice"
    group = "row" if weight.group_size == weight.in_features else weight.group_size
    columns = weight.planes.shape[2] * CHUNK_COLUMNS
    return f"{weight.out_features}x{columns} group {group} {form} {bits} bits {dtype} batch {batch_class(batch)}"


class Tuner:
    """Remembers the fastest launch of each kind of product, in memory and in a file.

    Args:
        kernels: a number that changes with the code of the kernels.
        card: name of the GPU.
    """

    def __init__(self, kernels: str, card: str) -> None:
        self._known: dict[str, Launch] = {}
        self._prefix = f"{card} {kernels} "
        self._path = cache_dir() / "triton.json"
        self._known.update(self._read())

    def choose(
        self,
        kind: str,
        candidates: Callable[[], Iterable[Launch]],
        seconds: Callable[[Launch], float],
        *,
        measure: bool,
    ) -> Launch | None:
        """The fastest launch of a kind of product, measured if need be and allowed; None if it is not known."""
        key = self._prefix + kind
        if key not in self._known and measure:
            self._known[key] = min(candidates(), key=seconds)
            self._write()
        return self._known.get(key)

    def _read(self) -> dict[str, Launch]:
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            return {key: Launch(**fields) for key, fields in stored.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}  # it can be made again

    def _write(self) -> None:
        merged = {**self._read(), **self._known}  # another process may have written meanwhile
        text = json.dumps({key: dataclasses.asdict(launch) for key, launch in merged.items()}, indent=1)
        with contextlib.suppress(OSError):  # it is only a cache
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path, durable=False) as beside:
                beside.write_text(text, encoding="utf-8")
