"""What a full-precision model says about some token windows, kept so that other models can be compared with it.

Logits of a whole vocabulary do not fit: 128k tokens in float32 are half a megabyte for each position. But they are a
function of the few numbers that enter the output head, and those are what is kept, in the dtype in which the model
computes them: 2.3 kB instead of 197 kB a position for SmolLM2 (hidden size 576, vocabulary 49,152), 8 kB instead of
513 kB for Llama-3-8B in bfloat16. Logits are recomputed from them a few hundred positions at a time, by the same head.

Nothing is rounded for storage: the logits are the model's own but for the order in which a matrix product sums, about
1e-5 in float32; what that can do to a KL is bounded in ``tests/test_teacher.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from matgptq.errors import UnsupportedModelError
from matgptq.machine.workers import INLINE, Workers
from matgptq.models.blocks import Block, skipped

CHUNK_ELEMENTS = 1 << 24  # logits in memory at a time: 64 MB in float32 for each temporary


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
        logits: Tensor = self.module(hidden)
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


@dataclass(frozen=True)
class Teacher:
    """A full-precision model's predictions on windows.

    Attributes:
        windows: token ids, int64 ``[n, seqlen]``, on the CPU.
        hidden: ``[n, seqlen, hidden]`` in the model's dtype, on the CPU.
        head: the model's; all that is still needed of it.
    """

    windows: Tensor
    hidden: Tensor = field(repr=False)
    head: OutputHead = field(repr=False)

    @property
    def vocabulary(self) -> int:
        """Number of logits at a position."""
        return len(next(self.head.module.parameters()))

    def log_probabilities(self, window: int, positions: slice) -> Tensor:
        """``[positions, vocabulary]`` float32 log-probabilities of the next token, on the head's device."""
        device = next(self.head.module.parameters()).device
        with torch.no_grad():
            return torch.log_softmax(self.head(self.hidden[window, positions].to(device)), -1)

    def kl(self, window: int, logits: Tensor, first: int = 0) -> Tensor:
        """``KL(teacher || other)`` in nats at each position, float32 ``[positions]``.

        Args:
            window: which one.
            logits: ``[positions, vocabulary]`` of the other model, from position ``first`` of the window on.
            first: where they start.
        """
        mine = self.log_probabilities(window, slice(first, first + len(logits)))
        return (mine.exp() * (mine - torch.log_softmax(logits.float(), -1))).sum(-1)

    def mean_kl(self, hidden: Callable[[int], Tensor], head: OutputHead, workers: Workers = INLINE) -> float:
        """Mean ``KL(teacher || other)`` in nats a token over all positions of all windows.

        Args:
            hidden: gives the ``[seqlen, hidden]`` states that enter the other model's head, by window.
            head: of the other model.
            workers: that windows are shared out among.
        """

        @torch.no_grad()
        def total(window: int) -> float:
            states = hidden(window)
            pieces = chunks(len(states), self.vocabulary)
            return sum(float(self.kl(window, head(states[piece]), piece.start).double().sum()) for piece in pieces)

        return sum(workers.map(total, range(len(self.windows)))) / self.windows.numel()


def observe(model: Any, windows: Tensor, tick: Callable[[], None] = lambda: None, workers: Workers = INLINE) -> Teacher:
    """Run a model over windows and keep what it says.

    Args:
        model: a causal language model in eval mode. Its blocks can be dropped afterwards; only the head is kept.
        windows: int64 ``[n, seqlen]``.
        tick: called after each window.
        workers: that windows are shared out among.
    """
    head = output_head(model)

    @torch.no_grad()
    def hidden(window: Tensor) -> Tensor:
        return last_hidden(model, window.unsqueeze(0).to(model.device))[0].cpu()

    states = []
    for each in workers.map(hidden, windows):
        states.append(each)
        tick()
    return Teacher(windows.cpu(), torch.stack(states), head)


def chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    """Pieces of a window whose logits are small enough to be held in memory."""
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    for first in range(0, positions, size):
        yield slice(first, min(first + size, positions))
