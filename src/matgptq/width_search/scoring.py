"""How far allocations take a model that stays in memory from the full one, measured on windows of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from matgptq.models.logits import chunks
from matgptq.models.teacher import Teacher
from matgptq.width_search.block_runner import BlockRunner
from matgptq.width_search.layer_groups import LayerGroup
from matgptq.width_search.optimum import Genome

Fitness = Literal["kl", "ppl"]
# Logits and the reference's probabilities of a batch are in memory at once, in float32 at worst.
_BATCH_LOGITS = 1 << 27
_BROKEN = 1e3  # nats per token of a model whose logits are not finite: worse than any other, and still a number
_CHUNK_LOGITS = 1 << 20  # divergences are computed in pieces that stay in the cache


def batch_of(seqlen: int, vocabulary: int) -> int:
    """Windows in one forward pass."""
    return max(1, _BATCH_LOGITS // (seqlen * vocabulary))


class Scorer:
    """Scores allocations of one model.

    All allocations of a call are walked in the order of their blocks, so that what they share before the first
    difference is computed once: the work is one step for each node of the tree of their beginnings.

    Args:
        model: of ``matgptq.load``, resident.
        blocks: its blocks in order.
        groups: layers that share a width, in the order of their blocks.
        windows: int64 ``[windows, seqlen]``.
        teacher: the full model's logits on the same windows; None scores negative log-likelihood.
    """

    def __init__(
        self,
        model: Any,
        blocks: Sequence[nn.Module],
        groups: Sequence[LayerGroup],
        windows: Tensor,
        teacher: Teacher | None,
    ) -> None:
        self.windows = windows
        self._model = model
        self._runner = BlockRunner(model, blocks)
        self._groups = groups
        self._teacher = teacher
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._batch = batch_of(windows.shape[1], vocabulary)
        self._chunk = max(1, _CHUNK_LOGITS // vocabulary)
        self._current: Genome | None = None

    def score(self, genomes: Sequence[Genome], rows: Sequence[int]) -> list[float]:
        """Mean over the tokens of some windows, in nats per token: KL to the full model, or negative log-likelihood.

        Args:
            genomes: a width for each group.
            rows: windows to score on.
        """
        totals = [0.0] * len(genomes)
        order = sorted(range(len(genomes)), key=genomes.__getitem__)
        for start in range(0, len(rows), self._batch):
            batch = list(rows[start : start + self._batch])
            tokens = self.windows[batch].to(self._model.device)
            measure = self._likelihood(tokens) if self._teacher is None else self._divergence(self._teacher, batch)
            first = 0  # the entries that the runner keeps belong to other tokens
            for index in order:
                first = min(first, self._set(genomes[index]))
                totals[index] += measure(self._runner.logits(tokens, first))
                first = len(self._runner.blocks)
        count = len(rows) * (self.windows.shape[1] - 1)
        return [total / count if math.isfinite(total) else _BROKEN for total in totals]

    def _set(self, genome: Genome) -> int:
        """Give the model these widths; returns the first block in which one changed."""
        first = len(self._runner.blocks)
        widths = {}
        for index, group in enumerate(self._groups):
            if self._current is None or self._current[index] != genome[index]:
                widths.update(dict.fromkeys(group.layers, genome[index]))
                first = min(first, group.block)
        self._model.set_bits(widths)
        self._current = genome
        return first

    def _divergence(self, teacher: Teacher, rows: list[int]) -> Callable[[Tensor], float]:
        """KL(full || slice), summed over positions; the full model's side of it is computed here, once."""
        positions = self.windows.shape[1] - 1
        probabilities = torch.empty(len(rows), positions, teacher.vocabulary, device=self._model.device)
        negative_entropy = 0.0
        for target, row in zip(probabilities, rows, strict=True):
            for piece in chunks(positions, teacher.vocabulary):
                log_probabilities = teacher.log_probabilities(row, piece)
                torch.exp(log_probabilities, out=target[piece])
                negative_entropy += float(log_probabilities.mul_(target[piece]).sum(-1).double().sum())

        def measure(logits: Tensor) -> float:
            total = negative_entropy
            for target, row_logits in zip(probabilities, logits, strict=True):
                for piece in self._pieces(positions):
                    log_probabilities = torch.log_softmax(row_logits[piece].float(), -1)
                    total -= float(log_probabilities.mul_(target[piece]).sum(-1).double().sum())
            return total

        return measure

    def _likelihood(self, tokens: Tensor) -> Callable[[Tensor], float]:
        targets = tokens[:, 1:].flatten()

        def measure(logits: Tensor) -> float:
            logits = logits[:, :-1].flatten(0, 1)
            total = 0.0
            for piece in self._pieces(len(logits)):
                total += float(nn.functional.cross_entropy(logits[piece].float(), targets[piece], reduction="sum"))
            return total

        return measure

    def _pieces(self, positions: int) -> list[slice]:
        return [slice(start, min(start + self._chunk, positions)) for start in range(0, positions, self._chunk)]
