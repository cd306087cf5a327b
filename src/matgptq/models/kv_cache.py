"""Room for the next tokens in transformers' cache of keys and values.

``DynamicLayer`` copies all that it holds for each token. Here it holds the beginning of a longer tensor, so that a
token is written behind the others and only a context that has outgrown its tensor is copied. A layer that sees a window
holds what is next to its end.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

# What models and blocks call the cache that they are given, and give back: since transformers 5.24 the first.
CACHE_ARGUMENT = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
_ROOM = "_matgptq_room"


@dataclass
class _Room:
    """A tensor of which a cache holds the beginning, or a part."""

    memory: Tensor  # [sequences, heads, capacity, size]
    filled: int  # positions; what is behind them belongs to whoever holds the last of them


class CacheGroup:
    """Caches of sequences that are decoded together; a model that takes the short way is given it as its cache.

    Args:
        caches: transformers', each of one sequence.
    """

    def __init__(self, caches: Sequence[DynamicCache]) -> None:
        self.caches = list(caches)


def append_positions(
    caches: Sequence[Any],
    layers: Sequence[int],
    sequences: int,
    heads: int,
    size: int,
    dtype: torch.dtype,
    positions: int = 1,
    *,
    windows: bool = False,
) -> list[list[tuple[Tensor, Tensor]]] | None:
    """Let layers of caches hold some positions more, which are still to be written.

    Args:
        caches: transformers'.
        layers: their indices.
        sequences, heads, size, dtype, positions: of the keys and values to come, in each cache
            ``[sequences, heads, positions, size]``.
        windows: layers that see a window are taken, too, if one position is to come.

    Returns:
        Of each cache the keys and values ``[sequences, heads, all positions, size]`` of each layer, adjacent elements,
        that the new positions see, and which the cache holds from now on; None if one is of another kind: then nothing
        has happened to any.
    """
    chosen = []
    for cache in caches:
        fitting = _fitting(cache, layers, sequences, heads, size, dtype, windows=windows and positions == 1)
        if fitting is None:
            return None
        chosen.append(fitting)
    for layer in itertools.chain.from_iterable(chosen):
        if not layer.is_initialized:
            nothing = torch.empty(sequences, heads, 0, size, dtype=dtype)
            layer.lazy_initialization(nothing, nothing)
            layer.keys, layer.values = nothing, nothing.clone()
        layer.keys, layer.values = _longer(layer.keys, positions), _longer(layer.values, positions)
    held = [[(layer.keys, layer.values) for layer in fitting] for fitting in chosen]
    for layer in itertools.chain.from_iterable(chosen):
        if type(layer) is DynamicSlidingWindowLayer:
            layer.cumulative_length += positions
            layer.keys, layer.values = (_last(part, layer.sliding_window - 1) for part in (layer.keys, layer.values))
    return held


def first_positions(cache: DynamicCache, positions: int) -> DynamicCache | None:
    """A cache of what another holds of its first positions, without a copy: it moves when it grows.

    Args:
        cache: transformers'; may grow meanwhile, but not lose positions.
        positions: at most as many as it holds.

    Returns:
        A cache of its own; None if ``cache`` is of a kind that does not keep all positions side by side.
    """
    layers = _plain_layers(cache)
    if not layers or any(layer.keys.shape[2] < positions for layer in layers):
        return None
    shorter = DynamicCache()
    for layer in map(copy.copy, layers):
        layer.keys, layer.values = layer.keys[:, :, :positions], layer.values[:, :, :positions]
        shorter.layers.append(layer)
    return shorter


def memory_of(cache: DynamicCache) -> int:
    """Bytes that a cache of the kind of ``first_positions`` keeps, with the room behind its positions."""
    tensors = [held for layer in _plain_layers(cache) or () for held in (layer.keys, layer.values)]
    return sum({held.untyped_storage().data_ptr(): held.untyped_storage().nbytes() for held in tensors}.values())


def _plain_layers(cache: Any) -> list[Any] | None:
    """All layers of a cache, if each holds keys and values of every position so far."""
    if type(cache) is not DynamicCache or cache.offloading:
        return None
    if any(type(layer) is not DynamicLayer or not layer.is_initialized for layer in cache.layers):
        return None
    return list(cache.layers)


def _fitting(
    cache: Any, layers: Sequence[int], sequences: int, heads: int, size: int, dtype: torch.dtype, *, windows: bool
) -> list[Any] | None:
    """The layers of a cache, if they are such as hold what is to come."""
    if type(cache) is not DynamicCache or cache.offloading:
        return None
    if cache.get_seq_length() == 0:
        return _empty_layers(cache, layers)
    if max(layers) >= len(cache.layers):
        return None
    chosen: list[Any] = [cache.layers[index] for index in layers]
    for layer in chosen:
        if type(layer) is DynamicSlidingWindowLayer:
            if not windows or getattr(layer, "record_past", False):
                return None
        elif type(layer) is not DynamicLayer:
            return None
        if not layer.is_initialized:
            return None
        keys, values = layer.keys, layer.values
        shape = (sequences, heads, chosen[0].keys.shape[2], size)  # all have seen the same tokens
        if keys.shape != shape or values.shape != shape:
            return None
        if keys.dtype is not dtype or values.dtype is not dtype or not keys.is_cpu or not values.is_cpu:
            return None
    return chosen


def _empty_layers(cache: DynamicCache, layers: Sequence[int]) -> list[Any] | None:
    """The layers of a cache that holds nothing yet, if they will hold keys and values of every position."""
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.extend(DynamicLayer() for _ in range(len(cache.layers), max(layers) + 1))
    if max(layers) >= len(cache.layers):
        return None
    chosen = [cache.layers[index] for index in layers]
    return None if any(type(layer) is not DynamicLayer or layer.is_initialized for layer in chosen) else chosen


def _longer(held: Tensor, positions: int) -> Tensor:
    length = held.shape[2]
    room: _Room | None = held.__dict__.get(_ROOM)
    begin = 0 if room is None else held.storage_offset() // held.shape[3]
    end = begin + length + positions
    # After a crop, or where two caches began as one, what is behind is another's.
    if room is None or room.filled != begin + length or room.memory.shape[2] < end:
        begin, end = 0, length + positions
        memory = held.new_empty((*held.shape[:2], end + length // 4 + 255, held.shape[3]))
        memory[:, :, :length] = held
        room = _Room(memory, length)
    room.filled = end
    longer = room.memory[:, :, begin:end]
    longer.__dict__[_ROOM] = room
    return longer


def _last(held: Tensor, positions: int) -> Tensor:
    """At most so many positions, in the same room."""
    if held.shape[2] <= positions:
        return held
    last = held[:, :, held.shape[2] - positions :]
    last.__dict__[_ROOM] = held.__dict__[_ROOM]
    return last
