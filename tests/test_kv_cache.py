"""A cache whose layers hold the beginnings of longer tensors is a cache like any other."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MistralConfig, StaticCache
from transformers.cache_utils import DynamicLayer

from matgptq.models.kv_cache import append_positions, first_positions, memory_of

HEADS, SIZE = 2, 4
CONFIG = LlamaConfig(
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=HEADS, hidden_size=16, intermediate_size=8
)

SLIDING = MistralConfig(**{**CONFIG.to_dict(), "model_type": "mistral", "sliding_window": 8})


def vectors(length: int, seed: int) -> Tensor:
    return torch.randn(1, HEADS, length, SIZE, generator=torch.Generator().manual_seed(seed))


def filled(length: int = 5) -> DynamicCache:
    cache = DynamicCache(config=CONFIG)
    for layer in range(2):
        cache.update(vectors(length, layer), -vectors(length, layer), layer)
    return cache


def room(
    cache: object,
    *layers: int,
    sequences: int = 1,
    heads: int = HEADS,
    size: int = SIZE,
    dtype: torch.dtype = torch.float32,
) -> list[tuple[Tensor, Tensor]] | None:
    held = append_positions([cache], layers, sequences, heads, size, dtype)
    return None if held is None else held[0]


def append(cache: DynamicCache, seed: int, layer: int = 1) -> tuple[Tensor, Tensor]:
    key = vectors(1, 100 + seed)
    held = room(cache, layer)
    assert held is not None
    keys, values = held[0]
    keys[:, :, -1:], values[:, :, -1:] = key, -key
    return keys, values


def expected(seeds: list[int], length: int = 5) -> Tensor:
    return torch.cat([vectors(length, 1), *(vectors(1, 100 + seed) for seed in seeds)], 2)


def check(cache: DynamicCache, seeds: list[int]) -> None:
    layer = cache.layers[1]
    assert torch.equal(layer.keys, expected(seeds))
    assert torch.equal(layer.values, -expected(seeds))
    assert cache.get_seq_length(1) == 5 + len(seeds)


def test_positions_are_appended_without_a_copy_until_the_room_is_full():
    cache, addresses = filled(), []
    for seed in range(600):
        keys, _ = append(cache, seed)
        addresses.append(keys.data_ptr())
    check(cache, list(range(600)))
    assert 2 <= len(set(addresses)) <= 3
    assert torch.equal(cache.layers[0].keys, vectors(5, 0))


def test_what_transformers_appends_itself_comes_behind():
    cache = filled()
    append(cache, 0)
    cache.update(vectors(1, 101), -vectors(1, 101), 1)
    append(cache, 2)
    check(cache, [0, 1, 2])


def test_after_a_crop_nothing_is_overwritten():
    cache = filled()
    append(cache, 0)
    append(cache, 1)
    longer = cache.layers[1].keys
    cache.crop(-1)
    append(cache, 2)
    check(cache, [0, 2])
    assert torch.equal(longer, expected([0, 1]))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy], ids=["deep", "shallow"])
def test_two_caches_that_began_as_one(copied: Callable[[DynamicCache], DynamicCache]):
    first = filled()
    append(first, 0)
    second = copied(first)
    if copied is copy.copy:  # as it is when one cache is made from the tensors of another
        second.layers = [copy.copy(layer) for layer in first.layers]
    append(first, 1)
    append(second, 2)
    append(first, 3)
    append(second, 4)
    check(first, [0, 1, 3])
    check(second, [0, 2, 4])


def test_other_operations_of_a_cache():
    cache = filled()
    append(cache, 0)
    cache.batch_repeat_interleave(2)
    assert cache.layers[1].keys.shape[0] == 2
    assert room(cache, 1) is None
    assert room(cache, 1, sequences=3) is None
    cache.batch_select_indices(torch.tensor([1]))
    append(cache, 1)
    check(cache, [0, 1])
    cache.reset()
    assert room(cache, 1, sequences=3)[0][0].shape == (3, HEADS, 1, SIZE)


def test_several_sequences_have_room_of_their_own():
    cache = filled()
    cache.batch_repeat_interleave(3)
    before = cache.layers[1].keys.clone()
    written = [torch.randn(3, HEADS, 1, SIZE, generator=torch.Generator().manual_seed(seed)) for seed in range(300)]
    for key in written:
        held = room(cache, 1, sequences=3)
        assert held is not None
        held[0][0][:, :, -1:], held[0][1][:, :, -1:] = key, -key
    assert torch.equal(cache.layers[1].keys, torch.cat([before, *written], 2))
    assert torch.equal(cache.layers[1].values, -cache.layers[1].keys)
    cache.reorder_cache(torch.tensor([2, 0, 0]))  # as beams do
    held = room(cache, 1, sequences=3)
    assert held is not None
    assert torch.equal(held[0][0][:, :, :-1], torch.cat([before, *written], 2)[[2, 0, 0]])


def append_in_window(cache: DynamicCache, seed: int) -> tuple[Tensor, Tensor]:
    """As a layer's own ``update``."""
    held = append_positions([cache], [1], 1, HEADS, SIZE, torch.float32, windows=True)
    assert held is not None
    keys, values = held[0][0]
    keys[:, :, -1:], values[:, :, -1:] = vectors(1, seed), -vectors(1, seed)
    return keys, values


@pytest.mark.parametrize("length", [1, 5, 7, 8, 20])
def test_a_window_moves_on_as_it_does_in_transformers(length: int):
    caches = [DynamicCache(config=SLIDING) for _ in range(2)]
    for cache in caches:
        for layer in range(2):
            cache.update(vectors(length, layer), -vectors(length, layer), layer)
    ours, theirs = caches
    addresses = set()
    for seed in range(600):
        if seed % 50 == 49:  # transformers' own way in between
            found = ours.update(vectors(1, seed), -vectors(1, seed), 1)
        else:
            found = append_in_window(ours, seed)
            addresses.add(found[0].untyped_storage().data_ptr())
        expected = theirs.update(vectors(1, seed), -vectors(1, seed), 1)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        for part in ("keys", "values", "cumulative_length"):
            one, other = (getattr(cache.layers[1], part) for cache in (ours, theirs))
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    assert ours.get_mask_sizes(1, 1) == theirs.get_mask_sizes(1, 1)
    assert len(addresses) <= 2 * 600 / 50 + 2  # it moves when transformers has made it anew, and when the room is full
    assert memory_of(ours) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy], ids=["deep", "shallow"])
def test_two_windows_that_began_as_one(copied: Callable[[DynamicCache], DynamicCache]):
    first = DynamicCache(config=SLIDING)
    for layer in range(2):
        first.update(vectors(20, layer), -vectors(20, layer), layer)
    for seed in range(3):
        append_in_window(first, seed)
    second = copied(first)
    second.layers = [copy.copy(layer) for layer in first.layers]
    past = torch.cat([vectors(20, 1), *(vectors(1, seed) for seed in range(3))], 2)
    pasts = [past, past]
    for which, seed in ((0, 10), (0, 11), (1, 20), (1, 21), (0, 12), (1, 22)):
        found, _ = append_in_window((first, second)[which], seed)
        pasts[which] = torch.cat([pasts[which], vectors(1, seed)], 2)
        assert torch.equal(found, pasts[which][:, :, -8:])


def test_windows_that_are_left_alone():
    cache = DynamicCache(config=SLIDING)
    for layer in range(2):
        cache.update(vectors(20, layer), -vectors(20, layer), layer)
    options = ([cache], [1], 1, HEADS, SIZE, torch.float32)
    assert append_positions(*options) is None
    assert append_positions(*options, 2, windows=True) is None
    cache.activate_past_recording()
    assert append_positions(*options, windows=True) is None
    assert cache.get_seq_length(1) == 20


def test_all_caches_or_none():
    caches = [filled(5), filled(8), filled(2)]
    held = append_positions(caches, [0, 1], 1, HEADS, SIZE, torch.float32)
    assert held is not None
    assert [[keys.shape[2] for keys, _ in layers] for layers in held] == [[6, 6], [9, 9], [3, 3]]
    for other in (None, StaticCache(config=CONFIG, max_cache_len=8)):
        assert append_positions([*caches, other], [0, 1], 1, HEADS, SIZE, torch.float32) is None
    assert [cache.get_seq_length() for cache in caches] == [6, 9, 3]


def test_other_caches_are_left_alone():
    assert room(StaticCache(config=CONFIG, max_cache_len=8), 0) is None
    assert room(DynamicCache(offloading=False, config=SLIDING), 0) is None
    assert room(None, 0) is None
    cache = filled()
    assert room(cache, 1, dtype=torch.bfloat16) is None
    assert room(cache, 1, heads=1) is None
    assert room(cache, 1, size=2) is None

    class Other(DynamicLayer):
        pass

    cache.layers[1].__class__ = Other
    assert room(cache, 1) is None
    assert torch.equal(cache.layers[1].keys, vectors(5, 1))


def test_all_layers_or_none():
    cache = filled()
    held = room(cache, 0, 1)
    assert held is not None
    assert [keys.shape[2] for keys, _ in held] == [6, 6]
    cache.layers[1].values = cache.layers[1].values.bfloat16()
    assert room(cache, 0, 1) is None
    assert cache.layers[0].keys.shape[2] == 6
    assert room(cache, 0, 2) is None
    cache = filled()
    append(cache, 0)
    assert room(cache, 0, 1) is None
    check(cache, [0])


# ---- the beginning of another ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [1, 4, 5])
def test_a_beginning_is_its_own(positions: int) -> None:
    cache = filled()
    first = first_positions(cache, positions)
    assert first is not None
    assert first.get_seq_length() == positions
    for layer, held in enumerate(first.layers):
        assert torch.equal(held.keys, vectors(5, layer)[:, :, :positions])
        assert torch.equal(held.values, -vectors(5, layer)[:, :, :positions])
    for layer in range(2):
        first.update(vectors(3, 7), -vectors(3, 7), layer)
    assert torch.equal(first.layers[1].keys, torch.cat([vectors(5, 1)[:, :, :positions], vectors(3, 7)], 2))
    check(cache, [])


def test_a_beginning_and_the_rest_grow_apart() -> None:
    cache = filled()
    append(cache, 1)
    append(cache, 2)
    first = first_positions(cache, 5)
    assert first is not None
    append(first, 3)
    append(cache, 4)
    whole = first_positions(cache, 5)
    assert whole is not None
    check(first, [3])
    check(cache, [1, 2, 4])
    check(whole, [])


def test_caches_that_have_no_beginning() -> None:
    assert first_positions(filled(), 6) is None
    assert first_positions(DynamicCache(), 1) is None
    assert first_positions(DynamicCache(config=CONFIG), 1) is None
    assert first_positions(StaticCache(config=CONFIG, max_cache_len=8), 1) is None  # type: ignore[arg-type]


def test_memory_counts_the_room() -> None:
    cache = filled()
    plain = 2 * 2 * HEADS * 5 * SIZE * 4
    assert memory_of(cache) == plain
    append(cache, 1, layer=0)
    room_of = plain // 4 // 5 * (5 + 1 + 256)
    assert memory_of(cache) == plain // 2 + 2 * room_of
    assert memory_of(DynamicCache()) == 0


@pytest.mark.parametrize("config", [None, CONFIG], ids=["without configuration", "with one"])
def test_a_cache_that_holds_nothing_yet(config):
    cache = DynamicCache(config=config)
    held = append_positions([cache], [0, 1], 1, HEADS, SIZE, torch.float32, 3)
    assert held is not None
    for layer, (keys, values) in enumerate(held[0]):
        assert keys.shape == (1, HEADS, 3, SIZE)
        keys.copy_(vectors(3, layer))
        values.copy_(-vectors(3, layer))
    assert cache.get_seq_length() == 3
    assert torch.equal(cache.layers[1].keys, vectors(3, 1))
    keys, values = cache.update(vectors(1, 7), -vectors(1, 7), 1)
    assert torch.equal(keys, torch.cat([vectors(3, 1), vectors(1, 7)], 2))
    assert torch.equal(values, -keys)


def test_positions_side_by_side():
    cache = filled()
    memory = None
    for count in (1, 300, 2, 17):
        length = cache.get_seq_length()
        held = append_positions([cache], [0, 1], 1, HEADS, SIZE, torch.float32, count)
        assert held is not None
        (_, _), (keys, values) = held[0]
        assert keys.shape[2] == values.shape[2] == length + count == cache.get_seq_length()
        keys[:, :, length:] = vectors(count, count)
        if count in (2, 17):  # there was room
            assert keys.data_ptr() == memory
        memory = keys.data_ptr()
    wanted = torch.cat([vectors(5, 1), *(vectors(count, count) for count in (1, 300, 2, 17))], 2)
    assert torch.equal(cache.layers[1].keys, wanted)
