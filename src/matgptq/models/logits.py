"""From the states that enter a model's output head to logits: a few positions, or a part of the vocabulary, at a time.

Logits of a window seldom fit where they are wanted: 2048 tokens of Gemma's 262,144 are 2 GB in float32, and each
copy that a softmax makes of them is as much again, all of it memory that the system must first hand out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from matgptq.errors import UnsupportedModelError
from matgptq.models.blocks import Block, skipped

CHUNK_ELEMENTS = 1 << 24  # logits in memory at a time: 64 MB in float32 for each temporary
_CACHED_ELEMENTS = 1 << 19


@dataclass(frozen=True)
class OutputHead:
    """From the base model's last hidden state to logits.

    Attributes:
        module: the output embedding.
        softcap: Gemma's bound c on logits, ``c * tanh(logits / c)``, or None.
    """

    module: nn.Module
    softcap: float | None

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[..., vocabulary]`` float32 logits of ``[..., hidden]`` states."""
        return self._finished(self.module(hidden))

    @property
    def has_parts(self) -> bool:
        """Whether a part of the vocabulary costs its share: the module does nothing but multiply by its weight."""
        module = self.module
        hooked = bool(module._forward_hooks or module._forward_pre_hooks)
        multiplies = type(module) is nn.Linear or getattr(module, "multiplies_by_weight", False)
        return multiplies and not hooked and not module.weight.is_meta

    def vocabulary(self, hidden: Tensor) -> int:
        """Number of logits at a position of ``[positions, hidden]``."""
        return len(self.module.weight) if self.has_parts else self(hidden[:1]).shape[-1]  # type: ignore[arg-type]

    def parts(self, hidden: Tensor) -> Callable[[slice], Tensor]:
        """Gives float32 logits of ``[positions, hidden]`` states for a part of the vocabulary."""
        if not self.has_parts:
            logits = self(hidden)
            return lambda part: logits[:, part]
        weight: Any = self.module.weight
        bias: Any = self.module.bias

        def product(part: slice) -> Tensor:
            return self._finished(nn.functional.linear(hidden, weight[part], None if bias is None else bias[part]))

        return product

    def _finished(self, logits: Tensor) -> Tensor:
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits.float()


def output_head(model: Any, blocks: Sequence[Block] = ()) -> OutputHead:
    """The head of a causal language model; checked against the model's own logits on a few tokens.

    Args:
        model: in eval mode.
        blocks: to leave out of the check, because their weights are not in memory.

    Raises:
        UnsupportedModelError: the model does something else with its logits than ``OutputHead`` knows.
    """
    head = OutputHead(model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None))
    few = torch.arange(8, device=model.device).unsqueeze(0)
    with torch.no_grad(), skipped(blocks):
        expected = model(input_ids=few, use_cache=False).logits.float()
        found = head(last_hidden(model, few))
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise UnsupportedModelError(
            f"{type(model).__name__} changes its logits after the output head in an unknown way"
        )
    return head


def last_hidden(model: Any, windows: Tensor) -> Tensor:
    """``[n, seqlen, hidden]`` states that enter the output head, for ``[n, seqlen]`` token ids; differentiable."""
    hidden: Tensor = model.base_model(input_ids=windows, use_cache=False).last_hidden_state
    return hidden


def chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    """Pieces of a window whose logits are small enough to be held in memory."""
    return pieces(positions, max(1, CHUNK_ELEMENTS // vocabulary))


def pieces(count: int, size: int) -> Iterator[slice]:
    """Neighbouring ranges of at most ``size`` that cover ``count``."""
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def softmax_(logits: Tensor) -> Tensor:
    """``softmax(logits, -1)`` in place, ``[positions, vocabulary]``, a few positions in the cache at a time."""
    positions, vocabulary = logits.shape
    for piece in pieces(positions, max(1, _CACHED_ELEMENTS // vocabulary)):
        few = logits[piece]
        few.sub_(few.amax(-1, keepdim=True)).exp_()
        few.div_(few.sum(-1, keepdim=True))
    return logits
