"""What a full-precision model says about some token windows, kept so that other models can be compared with it.

Logits of a whole vocabulary do not fit: 128k tokens in float32 are half a megabyte for each position. But they are a
function of the few numbers that enter the output head, and those are what is kept, in the dtype in which the model
computes them: 2.3 kB instead of 197 kB a position for SmolLM2 (hidden size 576, vocabulary 49,152), 8 kB instead of
513 kB for Llama-3-8B in bfloat16. Logits are recomputed from them a few hundred positions at a time, by the same head.

Nothing is rounded for storage: the logits are the model's own but for the order in which a matrix product sums, about
1e-5 in float32; what that can do to a KL is bounded in ``tests/test_teacher.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from matgptq.machine.workers import INLINE, Workers
from matgptq.models.divergence import Predictor, compare
from matgptq.models.logits import OutputHead, last_hidden, output_head, softmax_


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
        return torch.log_softmax(self._logits(window, positions), -1)

    def probabilities(self, window: int, positions: slice) -> Tensor:
        """``[positions, vocabulary]`` float32 probabilities of the next token, on the head's device."""
        return softmax_(self._logits(window, positions))

    def mean_kl(self, hidden: Callable[[int], Tensor], head: OutputHead, workers: Workers = INLINE) -> float:
        """Mean ``KL(teacher || other)`` in nats a token over all positions of all windows.

        Args:
            hidden: gives the ``[seqlen, hidden]`` states that enter the other model's head, by window.
            head: of the other model.
            workers: that windows are shared out among.
        """

        @torch.no_grad()
        def total(window: int) -> float:
            other = hidden(window)
            mine = self.hidden[window].to(other.device)
            return float(compare([Predictor(self.head, mine), Predictor(head, other)])[1].kl.sum())

        return sum(workers.map(total, range(len(self.windows)))) / self.windows.numel()

    @torch.no_grad()
    def _logits(self, window: int, positions: slice) -> Tensor:
        device = next(self.head.module.parameters()).device
        return self.head(self.hidden[window, positions].to(device))


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
