"""All transformer blocks of a model for a few tokens of each sequence, in one call of the native library.

``decoding`` makes two calls of a block. What an interpreter does around them, for every block and token, still takes a
third of a small model's time, and most of what a few tokens take: a short turn of a conversation, what a draft model
proposed. Here the model below the output head finds out once for all tokens that all of its blocks are as they were,
makes room in the cache, and lets the library go through them; embedding, rotary embedding and last norm stay the
model's own modules. Whatever is not this case goes to the model's own code, and in it to the blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from matgptq import native
from matgptq.inference.decoding import DecodesRows, RowBlock, Watch, of_each, rows_of
from matgptq.inference.mixed_classes import Mixin, mix_in
from matgptq.kernels import kernel_choice
from matgptq.models.kv_cache import CACHE_ARGUMENT, CacheGroup, append_positions
from matgptq.native import BlockCalls, StackCall

# Of a sequence at a time: products of more rows are not what the library is the fastest for.
MOST_TOKENS = 128
# Positions that tokens see, over all of them, where each attends alone: for more PyTorch's attention is faster.
MOST_SEEN = 1 << 16
_PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")
# Arguments of a model that are no obstacle to the short way. ``generate`` hands the tokenizer of stop strings on, too.
_KNOWN = frozenset({"inputs_embeds", "attention_mask", "position_ids", CACHE_ARGUMENT, "use_cache", "tokenizer"})


class _GroupError(Exception):
    """A model cannot take the short way with a group of caches, to which nothing has happened."""


class DecodesTokens(Mixin):
    """Mixed into the class of a model without its head: the next few tokens of each sequence take the short way."""

    _block_stack: BlockStack
    norm: nn.Module

    def forward(self, input_ids: Tensor | None = None, *positional: Any, **keywords: Any) -> Any:
        """What the model computes; arguments as in transformers."""
        inputs_embeds = keywords.get("inputs_embeds")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if (
            not torch.compiler.is_compiling()
            and not positional
            and given is not None
            and (input_ids is None or inputs_embeds is None)
            and given.ndim > 1
            and 0 < given.shape[1] <= MOST_TOKENS
            and all(value is None or name in _KNOWN for name, value in keywords.items())
        ):
            cache = keywords.get(CACHE_ARGUMENT)
            mask, positions = keywords.get("attention_mask"), keywords.get("position_ids")
            hidden = self._block_stack.run(self, given, mask, positions, cache)
            if hidden is not None:
                return BaseModelOutputWithPast(self.norm(hidden), **{CACHE_ARGUMENT: cache})
        if isinstance(keywords.get(CACHE_ARGUMENT), CacheGroup):
            raise _GroupError
        return super().forward(input_ids, *positional, **keywords)  # type: ignore[misc]


def decode_in_one_call(model: nn.Module, blocks: str) -> bool:
    """Let a model take next tokens through all blocks at once, if it is of the kind; returns whether it is.

    Args:
        model: after ``decoding.decode_in_rows``.
        blocks: module path of the list of blocks.
    """
    base: Any = model.get_submodule(blocks.rpartition(".")[0])
    config = base.config
    full = {"full_attention"}  # elsewhere a token may have a mask
    if (
        any(not hasattr(base, part) for part in _PARTS)
        or any(not isinstance(block, DecodesRows) or not block.row_block.attends for block in base.layers)
        or len(base.layers) != config.num_hidden_layers
        or getattr(config, "sliding_window", None) is not None
        or not full.issuperset(getattr(config, "layer_types", None) or full)
    ):
        return False
    base.__dict__["_block_stack"] = BlockStack(base)
    if not isinstance(base, DecodesTokens):
        mix_in(DecodesTokens, base)
    return True


class BlockStack:
    """The way of the next tokens of each sequence through all blocks of a model.

    Args:
        base: the model without its head.
    """

    def __init__(self, base: Any) -> None:
        self._blocks: list[RowBlock] = [block.row_block for block in base.layers]
        self._list: nn.ModuleList = base.layers
        self._watch = Watch([base.layers], base)
        self._watch.include(block.watch for block in self._blocks)
        self._layers = [block.layer_index for block in self._blocks]
        self._call: StackCall | None = None

    def run(self, base: Any, given: Tensor, mask: Any, positions: Tensor | None, cache: Any) -> Tensor | None:
        """What the last block gives, ``[sequences, tokens, hidden]``; None where the short way cannot be taken.

        Args:
            base: the model without its head.
            given: ids of tokens ``[sequences, tokens]``, or what stands for them, ``[sequences, tokens, hidden]``.
            mask, positions, cache: as transformers' models take them; or a ``CacheGroup`` and neither of the others,
                for one token of each sequence.
        """
        caches = cache.caches if type(cache) is CacheGroup else [cache]
        if torch.is_grad_enabled() or any(type(each) is not DynamicCache for each in caches):
            return None
        lengths: list[int] = [each.get_seq_length() for each in caches]
        sequences, tokens = given.shape[:2]
        first: list[int] | None = None
        if type(cache) is CacheGroup:
            if mask is not None or positions is not None or sequences != len(caches) or tokens != 1:
                return None
        else:
            first = _first_seen(mask, sequences, lengths[0], tokens)
            if first is None:
                return None
        if positions is not None and not lengths[0] and bool((positions.diff() != 1).any()):
            return None  # sequences that are packed into one
        seen = tokens * (max(lengths) + tokens)
        if tokens > 1 and seen > MOST_SEEN and not native.attends_to_many(self._blocks[0].dtype):
            return None
        if not self._is_as_it_was(base):
            return None
        ready = self._ready(sequences * tokens)
        if ready is None:
            return None
        call, _weights = ready  # which stay alive until the call is made
        hidden: Tensor = base.embed_tokens(given) if given.ndim == 2 else given
        if positions is None:
            positions = torch.tensor(lengths, device=hidden.device)[:, None] + torch.arange(
                tokens, device=hidden.device
            )
        cosine, sine = base.rotary_emb(hidden, position_ids=positions)
        if not self._blocks[0].fits(hidden, (cosine, sine), tokens):
            return None
        of_each_cache = sequences // len(caches)
        held = append_positions(caches, self._layers, of_each_cache, call.key_heads, call.size, call.dtype, tokens)
        if held is None:
            return None
        rows = rows_of(hidden)
        call.run(rows, of_each(cosine, sequences), of_each(sine, sequences), held, first, tokens)
        return rows.view(hidden.shape)

    def _ready(self, rows: int) -> tuple[StackCall, list[list[native.Weight]]] | None:
        """The call for all blocks as they are, and the weights that must live while it is made."""
        forced = kernel_choice.forced_kernel()
        calls: list[BlockCalls] = []
        weights = []
        for block in self._blocks:
            ready = block.ready(forced, rows)
            if ready is None:
                return None
            calls.append(ready[0])
            weights.append(ready[1])
        call = self._call
        if call is None or not call.is_of(calls):
            if not StackCall.takes(calls):
                return None
            call = self._call = StackCall(calls)
        return call, weights

    def _is_as_it_was(self, base: Any) -> bool:
        config = base.config
        return (
            base.layers is self._list
            and config.num_hidden_layers == len(self._blocks)
            and not config.output_hidden_states
            and not config.output_attentions
            and config.return_dict
            and self._watch.untouched()
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockStack:
        """That of a copied model, whose blocks have calls of their own."""
        copied = object.__new__(BlockStack)
        copied.__dict__ = copy.deepcopy({**self.__dict__, "_call": None}, memo)
        return copied


def next_logits(model: Any, tokens: Tensor, caches: Sequence[DynamicCache]) -> Tensor:
    """What follows the next token of each of several sequences.

    Where the model takes the short way they go through it together, otherwise one after the other.

    Args:
        model: with its head.
        tokens: ``[sequences]``, int64, on the model's device.
        caches: of each sequence, which will hold its token, too.

    Returns:
        Logits ``[sequences, vocabulary]``.
    """
    tokens = tokens[:, None]
    if len(caches) > 1 and takes_groups(model):
        try:
            output = model(input_ids=tokens, **{CACHE_ARGUMENT: CacheGroup(caches)}, use_cache=True)
            return cast("Tensor", output.logits[:, -1])
        except _GroupError:
            pass  # this time not: a hook was set, say
    each = [
        model(input_ids=tokens[number : number + 1], **{CACHE_ARGUMENT: cache}, use_cache=True).logits[:, -1]
        for number, cache in enumerate(caches)
    ]
    return torch.cat(each)


def takes_groups(model: Any) -> bool:
    """Whether a model is of the kind that takes tokens of several sequences with caches of their own together."""
    return isinstance(model.base_model, DecodesTokens)


def _first_seen(mask: Any, sequences: int, length: int, tokens: int) -> list[int] | None:
    """The position before which each sequence sees nothing; None where a mask, as a caller gives it, hides others.

    Args:
        mask: of the positions so far and of the new tokens, or None.
        sequences, length, tokens: how many there are, positions so far and new tokens of each.
    """
    if mask is None:
        return [0] * sequences
    if not isinstance(mask, Tensor) or mask.shape != (sequences, length + tokens):
        return None
    seen = mask.bool()
    if bool(seen.all()):
        return [0] * sequences
    hidden = seen.logical_not().sum(1)
    # where tokenizers pad for decoding
    in_front = torch.arange(length + tokens, device=mask.device) < hidden[:, None]
    if bool((seen == in_front).any()) or not bool(seen[:, -tokens:].all()):
        return None
    first: list[int] = hidden.tolist()
    return first
