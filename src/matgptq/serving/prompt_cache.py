"""What was read for earlier texts: a prompt that begins like one of them is read from where it differs.

A conversation sends all that was said so far with each turn, and programs send the same instructions with each request.
Keys and values of a position depend on the tokens up to it alone, so a new text goes on from a copy of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from matgptq.models.kv_cache import first_positions, memory_of

_FEWEST = 16  # tokens; fewer are read again as soon as found


@dataclass(frozen=True, eq=False)
class ReadText:
    """Tokens that a model has read, and what it keeps of them.

    Attributes:
        model: that read them; another width keeps something else.
        ids: the tokens that ``cache`` holds, ``[tokens]``.
        cache: of one sequence.
    """

    model: Any
    ids: Tensor
    cache: DynamicCache

    def shares(self, ids: Tensor) -> int:
        """How many of the first tokens are the same."""
        length = min(len(self.ids), len(ids))
        different = (self.ids[:length] != ids[:length]).nonzero()
        return int(different[0]) if len(different) else length


class PromptCache:
    """Texts that were read last, within a limit of memory.

    Args:
        limit: of all keys and values, bytes; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: list[ReadText] = []  # the one used last at the end

    def keep(self, text: ReadText) -> None:
        """Keep a text instead of those that it begins with, and of the others those used last."""
        size = memory_of(text.cache)
        if not size or size > self._limit:
            return
        self._kept = [each for each in self._kept if each.model is not text.model or not _begins(text, each)]
        self._kept.append(text)
        sizes = [memory_of(each.cache) for each in self._kept]
        while sum(sizes) > self._limit:
            del self._kept[0], sizes[0]

    def begin(self, model: Any, ids: Tensor, present: Iterable[ReadText] = ()) -> DynamicCache | None:
        """A cache of the longest beginning of a prompt that a text has, but for the prompt's last token.

        Args:
            model: that is to read it.
            ids: of the prompt, ``[tokens]``.
            present: texts that are being generated; they count as if they were kept.

        Returns:
            None if nothing is kept at all (a limit of 0), or no beginning is worth it.
        """
        if not self._limit:
            return None
        found, length = None, _FEWEST - 1
        for text in [*self._kept, *present]:
            if text.model is model and (shared := text.shares(ids[:-1])) > length:
                found, length = text, shared
        if found is None:
            return None
        if found in self._kept:
            self._kept.remove(found)
            self._kept.append(found)
        return first_positions(found.cache, length)


def _begins(longer: ReadText, text: ReadText) -> bool:
    return longer.shares(text.ids) == len(text.ids)
