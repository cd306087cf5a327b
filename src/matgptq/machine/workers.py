"""Independent pieces of work shared out among threads, so that no result depends on how many there are.

The libraries beneath PyTorch cut a product by the number of threads, and with another cut sums round otherwise. Here
every piece is computed from start to end by one thread, in pieces that depend on the problem alone, and what the pieces
give is put together in their order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Workers:
    """Threads for pieces of work.

    PyTorch's grad mode and autocast are each thread's own: a piece sets those that it needs.

    Args:
        count: of threads, each of which computes with one of PyTorch's. With one, work is done where it is asked for,
            with as many of PyTorch's as there are.

    Attributes:
        count: as given.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "matgptq", torch.set_num_threads, (1,)) if count > 1 else None

    def map(self, work: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
        """What ``work`` makes of each item, in the order of the items; a few are worked on at the same time.

        A piece must not hand out pieces of its own. What a piece raises is raised here, after those that are being
        worked on have ended; the others are not begun.
        """
        if self._pool is None:
            yield from map(work, items)
            return
        running: deque[Future[_Result]] = deque()
        try:
            for item in items:
                running.append(self._pool.submit(work, item))
                if len(running) > self.count:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for each in running:
                each.cancel()
            for each in running:
                if not each.cancelled():
                    each.exception()

    def run(self, work: Callable[[_Item], object], items: Iterable[_Item]) -> None:
        """``map`` for what gives nothing."""
        for _ in self.map(work, items):
            pass

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


INLINE = Workers()


@contextmanager
def one_thread_each(device: torch.device) -> Iterator[Workers]:
    """As many workers as PyTorch has threads on the CPU, each with one of them; on another device, none but this one.

    Inside, this thread computes with one of PyTorch's threads, too.
    """
    count = torch.get_num_threads()
    if device.type != "cpu" or count == 1:
        yield INLINE
        return
    torch.set_num_threads(1)
    workers = Workers(count)
    try:
        yield workers
    finally:
        workers.close()
        torch.set_num_threads(count)
