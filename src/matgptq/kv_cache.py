"""Room for the next token in transformers' cache of keys and values.

``DynamicLayer`` copies all that it holds for each token. Here it holds the beginning of a longer tensor, so that a
token is written behind the others and only a context that has outgrown its tensor is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

_ROOM = "_matgptq_room"


@dataclass
class _Room:
    """A tensor of which a cache holds the beginning."""

    memory: Tensor  # [1, heads, capacity, size]
    filled: int  # positions; what is behind them belongs to whoever holds so many


def append_position(cache: Any, index: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Let a layer of a cache hold one position more, which is still to be written.

    Args:
        cache: transformers' cache of one sequence.
        index: of the layer.
        like: ``[1, heads, 1, size]``, the key to come.

    Returns:
        Keys and values ``[1, heads, positions, size]`` with adjacent elements, which the cache holds from now on; None
        for another kind of cache, to which nothing has happened.
    """
    if type(cache) is not DynamicCache or cache.offloading or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    if type(layer) is not DynamicLayer or not layer.is_initialized:
        return None
    keys, values = layer.keys, layer.values
    _, heads, _, size = like.shape
    for held in (keys, values):
        if held.ndim != 4 or held.dtype is not like.dtype or not held.is_cpu:
            return None
        shape = held.shape
        if shape[0] != 1 or shape[1] != heads or shape[3] != size or shape[2] != keys.shape[2]:
            return None
    layer.keys, layer.values = _longer(keys), _longer(values)
    return layer.keys, layer.values


def _longer(held: Tensor) -> Tensor:
    length = held.shape[2]
    room: _Room | None = held.__dict__.get(_ROOM)
    # After a crop, or where two caches began as one, what is behind is another's.
    if room is None or room.filled != length or room.memory.shape[2] == length:
        memory = held.new_empty((1, held.shape[1], length + length // 4 + 256, held.shape[3]))
        memory[:, :, :length] = held
        room = _Room(memory, length)
    room.filled = length + 1
    longer = room.memory.narrow(2, 0, length + 1)
    longer.__dict__[_ROOM] = room
    return longer
