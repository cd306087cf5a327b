"""Documents in an order that depends on a seed only, without holding more of them than are needed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush

from matgptq.text.sources import Document, Reader


def shuffled(parts: Sequence[Reader], seed: int, budget: float) -> Iterator[Document]:
    """Documents in an order that depends on ``seed`` only: parts shuffled, and documents within their part.

    About ``budget`` characters are held in memory; a caller who needs more causes another pass over the part.
    """
    rng = random.Random(seed)
    order = list(parts)
    rng.shuffle(order)
    for part in order:
        part_seed, part_budget, yielded = rng.getrandbits(64), budget, 0
        while True:
            kept, whole = _smallest_keys(part(), random.Random(part_seed), part_budget)
            yield from kept[yielded:]
            if whole:
                break
            yielded, part_budget = len(kept), 4 * part_budget


def _smallest_keys(documents: Iterator[Document], rng: random.Random, budget: float) -> tuple[list[Document], bool]:
    """Sort documents by a random key each, and keep the shortest prefix of at least ``budget`` characters.

    The order does not depend on the budget: a larger one gives a longer prefix of the same permutation.

    Returns:
        The documents, and whether they are all there are.
    """
    heap: list[tuple[float, int, Document]] = []  # largest key on top
    total, whole = 0, True
    for number, document in enumerate(documents):
        heappush(heap, (-rng.random(), number, document))
        total += document.size
        while total - heap[0][2].size >= budget:
            total -= heappop(heap)[2].size
            whole = False
    return [document for _, _, document in sorted(heap, key=lambda item: (-item[0], item[1]))], whole
