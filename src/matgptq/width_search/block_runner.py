"""Run a causal language model from any block on, reusing what entered that block in the run before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from matgptq.models.blocks import replaced_forwards


class BlockRunner:
    """Forward passes that start at any block.

    Everything around the blocks (embedding, masks, final norm, head) is the model's own forward pass: blocks that are
    skipped hand on what they get, and the last of them hands on what was kept.

    Args:
        model: a causal language model of transformers in eval mode.
        blocks: all its blocks in order.
    """

    def __init__(self, model: Any, blocks: Sequence[nn.Module]) -> None:
        self.model = model
        self.blocks = list(blocks)
        # entries[i]: what entered block i in the last run, [windows, seqlen, hidden]; the last one left the last block.
        self._entries: list[Tensor | None] = [None] * (len(self.blocks) + 1)

    @property
    def entries(self) -> list[Tensor | None]:
        """What entered each block in the last run, and what left the last one: ``[windows, seqlen, hidden]`` each."""
        return self._entries

    @torch.inference_mode()
    def logits(self, windows: Tensor, first: int = 0) -> Tensor:
        """Logits of some windows.

        Args:
            windows: int64 ``[windows, seqlen]``; for ``first > 0`` those of the last run.
            first: the first block to run; what entered it is taken from ``entries``. The number of blocks runs none.

        Returns:
            ``[windows, seqlen, vocabulary]`` in the model's dtype.
        """
        with self._skip(first):
            result: Tensor = self.model(input_ids=windows.to(self.model.device), use_cache=False).logits
        return result

    @contextmanager
    def _skip(self, first: int) -> Iterator[None]:
        entries = self._entries

        def forward(index: int, original: Callable[..., Any]) -> Callable[..., Tensor]:
            def run(hidden: Tensor, *positional: Any, **keywords: Any) -> Tensor:
                if index < first:
                    kept = entries[first] if index == first - 1 else hidden
                    assert kept is not None, "nothing was run before"
                    return kept
                entries[index] = hidden
                output = original(hidden, *positional, **keywords)
                output = output[0] if isinstance(output, tuple) else output
                entries[index + 1] = output
                result: Tensor = output
                return result

            return run

        with replaced_forwards(self.blocks, forward):
            yield
