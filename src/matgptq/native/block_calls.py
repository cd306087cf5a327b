"""Tokens of some sequences through a transformer block of the plain kind, as two native calls, and through all, as one.

``csrc/block.cpp``. Between the two calls of a block keys and values join a cache, which is PyTorch's business;
the one call writes them itself. Calls are made dozens of times for a token, and check their arguments no more than the
library does.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from matgptq.native.library import (
    ACTIVATIONS,
    BLOCK_NORMS,
    DTYPES,
    GATES,
    Activations,
    Block,
    Gate,
    check_status,
    expect_tensor,
    isa,
    require_library,
)
from matgptq.native.weights import Weight

Held = Sequence[tuple[Tensor, Tensor]]  # keys and values of the layers of a cache
_ATTEND_UNIT = 32


def attends(size: int) -> bool:
    """Whether the library computes attention with heads of that size."""
    return not size % _ATTEND_UNIT


def attends_to_many(dtype: torch.dtype) -> bool:
    """Whether tokens of one sequence meet its keys and values together, in matrix units, and not each alone."""
    return dtype is torch.bfloat16 and isa() == "amx"


@dataclass(frozen=True)
class RMSNorm:
    """Its weight (contiguous, of the block's dtype, on the CPU) and what is added to the mean square."""

    weight: Tensor
    eps: float


class BlockCalls:
    """The two calls of one block, for weights, widths and norms that do not change: prepared once, called often.

    Args:
        dtype: ``torch.float32`` or ``torch.bfloat16``, of all vectors and norms.
        weights: packed weights of query, key, value, output, gate, up and down. They must live when a call is made.
        bits: one width per weight.
        biases: ``[out]`` per weight, or None.
        norms: before attention, before the MLP, of the heads of queries and of keys, and of what attention and the MLP
            add; all but the first two may be None.
        size: of a head.
        scale: of attention's scores.
        activations: as for ``matmul``.
        gate: the activation of the MLP.
        norms_from_one: norms multiply by 1 + weight, and round only the result.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        weights: Sequence[Weight],
        bits: Sequence[int],
        biases: Sequence[Tensor | None],
        norms: Sequence[RMSNorm | None],
        size: int,
        scale: float,
        *,
        activations: Activations = "exact",
        gate: Gate = "silu",
        norms_from_one: bool = False,
    ) -> None:
        library = require_library()
        self._start, self._finish = library.matgptq_block_start, library.matgptq_block_finish
        self.dtype = dtype
        self.size = size
        query, key, value = (weight.out_features for weight in weights[:3])
        self.heads, self.key_heads = query // size, key // size
        self._total = (query + key + value) // size
        self._alive: list[object] = [*norms]
        block = Block(dtype=DTYPES[dtype], activations=ACTIVATIONS[activations], size=size, scale=scale)
        block.gate, block.norms_from_one = GATES[gate], norms_from_one
        block.hidden = weights[0].in_features
        for name, norm in zip(BLOCK_NORMS, norms, strict=True):
            if norm is not None:
                setattr(block, f"{name}_norm", norm.weight.data_ptr())
                setattr(block, f"{name}_eps", norm.eps)
        for product, weight, width, bias in zip(block.products, weights, bits, biases, strict=True):
            product.weight = weight._handle
            product.bits = weight.served_bits(width)
            if bias is not None:
                wide = expect_tensor(bias.float(), "bias", torch.float32, (weight.out_features,))
                self._alive.append(wide)
                product.bias = wide.data_ptr()
        self._block = block
        self._address = ctypes.addressof(block)

    def start(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Query, key and value of a token of each sequence, side by side.

        Args:
            x: ``[sequences, hidden]``, contiguous.
            cosine, sine: of the rotary embedding, as many elements for each sequence as a head has, contiguous.

        Returns:
            ``[sequences, heads, 1, size]``, the heads of the query, then those of key and value.
        """
        qkv = x.new_empty((len(x), self._total, 1, self.size))
        status = self._start(
            self._address,
            x.data_ptr(),
            len(x),
            cosine.data_ptr(),
            sine.data_ptr(),
            qkv.data_ptr(),
            torch.get_num_threads(),
        )
        if status:
            check_status(status)
        return qkv

    def reads(self, held: Tensor) -> bool:
        """Whether ``finish`` can read such keys or values: of the block's dtype, with adjacent elements."""
        return held.is_cpu and held.dtype is self.dtype and held.stride(3) == 1

    def attend(
        self,
        x: Tensor,
        qkv: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        first: Sequence[int] | None = None,
        append: bool = False,
    ) -> None:
        """The rest of the block with its attention, ``x`` in place.

        Args:
            x: ``[sequences, hidden]``, contiguous.
            qkv: of ``start``.
            keys, values: ``[sequences, key heads, positions, size]``, such as ``reads`` is true of, if the library
                ``attends`` with heads of that size.
            first: for each sequence the position before which it sees nothing, such as behind padding; by default it
                sees all.
            append: first write key and value of ``qkv`` to their last position.
        """
        self._run_finish(x, qkv, append, _Caches([[(keys, values)]], first))

    def finish(self, x: Tensor, attended: Tensor) -> None:
        """The rest of the block, ``x`` in place, behind another attention.

        Args:
            x: ``[sequences, hidden]``, contiguous.
            attended: what attention gave, ``[sequences, heads * size]``, contiguous.
        """
        self._run_finish(x, attended, False, None)

    def _run_finish(self, x: Tensor, given: Tensor, append: bool, caches: _Caches | None) -> None:
        status = self._finish(
            self._address,
            x.data_ptr(),
            len(x),
            given.data_ptr(),
            append,
            None if caches is None else caches.where,
            0,
            None if caches is None else caches.lengths,
            torch.get_num_threads(),
        )
        if status:
            check_status(status)


class _Caches:
    """Keys and values of some sequences, as the library reads them: for each sequence a table of its layers.

    Args:
        held: of each cache the keys and values ``[sequences, key heads, positions, size]`` of each layer.
        first: see ``BlockCalls.attend``; of the sequences of all caches.
        tokens: of each sequence, for each of which the library is told as many positions as it sees.
    """

    def __init__(self, held: Sequence[Held], first: Sequence[int] | None, tokens: int = 1) -> None:
        self._tables = []
        addresses: list[int] = []
        lengths: list[int] = []
        for layers in held:
            sequences, _, length, _ = layers[0][0].shape
            # A pointer has the size of a stride wherever this runs: keys, values, and how far heads and positions are.
            table = np.array(
                [
                    (keys.data_ptr(), values.data_ptr(), *keys.stride()[1:3], *values.stride()[1:3])
                    for keys, values in layers
                ],
                dtype=np.int64,
            )
            done = len(lengths) // tokens
            begin = [0] * sequences if first is None else first[done : done + sequences]
            if sequences > 1 or begin[0]:
                size = layers[0][0].element_size()
                apart = np.array([(keys.stride(0), values.stride(0)) for keys, values in layers])
                skipped = np.array(begin)[:, None, None] * table[None, :, [3, 5]]
                table = np.tile(table, (sequences, 1, 1))
                table[:, :, :2] += size * (np.arange(sequences)[:, None, None] * apart + skipped)
            self._tables.append(table)
            address, step = table.ctypes.data, table.nbytes // sequences
            addresses += [address + number * step for number in range(sequences) for _ in range(tokens)]
            lengths += [length - skipped - later for skipped in begin for later in reversed(range(tokens))]
        self._arrays = (ctypes.c_void_p * len(addresses))(*addresses), (ctypes.c_int64 * len(lengths))(*lengths)
        self.where, self.lengths = ctypes.addressof(self._arrays[0]), ctypes.addressof(self._arrays[1])


class StackCall:
    """All blocks for a token as one call, for as long as each of them stays as it is.

    Args:
        blocks: such as it ``takes``; the library ``attends`` with their heads.
    """

    @staticmethod
    def takes(blocks: Sequence[BlockCalls]) -> bool:
        """Whether blocks are alike: of one dtype, with heads of keys of one number and size."""
        kinds = {(block.dtype, block.size, block.key_heads) for block in blocks}
        return len(kinds) == 1

    def __init__(self, blocks: Sequence[BlockCalls]) -> None:
        self.dtype, self.size, self.key_heads = blocks[0].dtype, blocks[0].size, blocks[0].key_heads
        self._run = require_library().matgptq_blocks
        self._blocks = list(blocks)
        self._addresses = (ctypes.c_void_p * len(blocks))(*(block._address for block in blocks))
        self._where = ctypes.addressof(self._addresses)

    def is_of(self, blocks: Sequence[BlockCalls]) -> bool:
        """Whether these are its blocks."""
        return len(blocks) == len(self._blocks) and all(map(operator.is_, blocks, self._blocks))

    def run(
        self,
        x: Tensor,
        cosine: Tensor,
        sine: Tensor,
        held: Sequence[Held],
        first: Sequence[int] | None = None,
        tokens: int = 1,
    ) -> None:
        """``x`` through all blocks, in place; keys and values are written to the last positions of what is held.

        Args:
            x: ``[sequences * tokens, hidden]``, contiguous, the tokens of a sequence one after the other.
            cosine, sine: of the rotary embedding, as many elements for each token as a head has, contiguous.
            held: of each cache the keys and values ``[its sequences, key heads, positions, size]`` for each block, such
                as it ``reads``; the sequences of the caches one after the other are those of ``x``.
            first: as of ``BlockCalls.attend``.
            tokens: of each sequence; each sees those before it.
        """
        caches = _Caches(held, first, tokens)
        status = self._run(
            self._where,
            len(self._blocks),
            x.data_ptr(),
            len(x),
            cosine.data_ptr(),
            sine.data_ptr(),
            caches.where,
            caches.lengths,
            torch.get_num_threads(),
        )
        if status:
            check_status(status)
