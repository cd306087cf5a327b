"""How far what models predict lies apart, token by token.

Everything that is asked of a position, its KL to the full model, the probability of a token and the most probable
one, is a sum or a maximum over the vocabulary. So it is gathered from parts of the vocabulary that stay in the cache,
one after another, for all models side by side; logits of a whole vocabulary are never in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from matgptq.models.logits import OutputHead, chunks, pieces

# Positions and words of a part. On a CPU its logits and what is made of them lie in the second level of the cache; a
# GPU wants long products and few launches.
_CPU_PART = (256, 2048)
_GPU_PART = (1024, 16384)


class Predictor(NamedTuple):
    """One model at some positions.

    Attributes:
        head: its output head.
        states: ``[positions, hidden]`` that enter it.
    """

    head: OutputHead
    states: Tensor


@dataclass(frozen=True)
class Predicted:
    """What one of several models predicts at some positions.

    Attributes:
        kl: ``KL(first || this)`` in nats, float64 ``[positions]``, where the first of the models stands for all others
            to be compared with; zero for itself.
        most_probable: int64 ``[positions]``; of several the first.
        log_probability: of the tokens asked for, float64 ``[positions]``; None where none were.
    """

    kl: Tensor
    most_probable: Tensor
    log_probability: Tensor | None


@torch.no_grad()
def compare(
    predictors: Sequence[Predictor], tokens: Tensor | None = None, tick: Callable[[int], None] = lambda positions: None
) -> list[Predicted]:
    """What models predict at the same positions, the first of them beside each other one.

    Args:
        predictors: of the same vocabulary, on the same device.
        tokens: int64 ``[positions]`` whose probability is wanted.
        tick: told how many positions are done, each time that some are.

    Returns:
        One for each predictor. Sums of a part are float32, those of all parts float64.
    """
    found: list[list[Predicted]] = [[] for _ in predictors]
    for positions, parts in _cut(predictors):
        logits = [predictor.head.parts(predictor.states[positions]) for predictor in predictors]
        asked = None if tokens is None else tokens[positions]
        for gathered, new in zip(found, _compare(logits, parts, asked), strict=True):
            gathered.append(new)
        tick(positions.stop - positions.start)
    return [_joined(gathered) for gathered in found]


@torch.no_grad()
def normalizers(predictor: Predictor) -> Tensor:
    """log of the sum of exp(logits), float64 ``[positions]``."""
    found = []
    for positions, parts in _cut([predictor]):
        states = predictor.states[positions]
        logits = predictor.head.parts(states)
        sums = _Normalizer(len(states), states.device)
        for part in parts:
            sums.add(logits(part))
        found.append(sums.normalizer)
    return torch.cat(found)


def kl_gradient(full: Predictor, full_normalizers: Tensor, other: Predictor) -> Tensor:
    """Gradient of the mean of ``KL(full || other)`` over positions in the states that enter the other's head.

    Logits of the other are computed twice, to be summed up and to be gone back from, which takes half as long as to
    keep all of a vocabulary in memory.

    Args:
        full: the full model at some positions.
        full_normalizers: ``normalizers(full)``.
        other: at the same positions.

    Returns:
        float ``[positions, hidden]``.
    """
    gradient = torch.zeros_like(other.states)
    of_other = normalizers(other)
    for positions, parts in _cut([full, other]):
        states = other.states[positions].detach().requires_grad_()
        logits, expected = other.head.parts(states), full.head.parts(full.states[positions])
        shift, expected_shift = (
            each[positions].float().unsqueeze(1) for each in (of_other, full_normalizers.to(of_other.device))
        )
        for part in parts:
            with torch.enable_grad():
                here = logits(part)
            with torch.no_grad():  # d KL / d logits = probabilities of the other - those of the full model
                change = (here - shift).exp_().sub_((expected(part) - expected_shift).exp_())
            torch.autograd.backward(here, change.div_(len(gradient)))
        assert states.grad is not None
        gradient[positions] = states.grad
    return gradient


def _cut(predictors: Sequence[Predictor]) -> Iterator[tuple[slice, list[slice]]]:
    """Positions that are looked at together, and the parts of the vocabulary that are, one after another."""
    first = predictors[0]
    count, vocabulary = len(first.states), first.head.vocabulary(first.states)
    if not all(predictor.head.has_parts for predictor in predictors):
        return ((positions, [slice(0, vocabulary)]) for positions in chunks(count, vocabulary))
    rows, words = _CPU_PART if first.states.device.type == "cpu" else _GPU_PART
    return ((positions, list(pieces(vocabulary, words))) for positions in pieces(count, rows))


def _compare(
    logits: Sequence[Callable[[slice], Tensor]], parts: Sequence[slice], tokens: Tensor | None
) -> list[Predicted]:
    sums: list[_Sums] = []
    for part in parts:
        first: Tensor | None = None
        weights: Tensor | None = None
        for index, source in enumerate(logits):
            here = source(part)
            if len(sums) == index:
                sums.append(_Sums(len(here), here.device, tokens))
            exponentials, shrink = sums[index].see(here, part)
            if first is None or weights is None:
                first, weights, of_first = here, exponentials, shrink
            else:
                difference = torch.sub(first, here, out=exponentials).mul_(weights)
                sums[index].difference.mul_(of_first).add_(difference.sum(-1))
    return [each.predicted(sums[0]) for each in sums]


class _Normalizer:
    """Running sum of the exponentials of one model's logits, ``[positions]``, relative to the largest so far."""

    def __init__(self, positions: int, device: torch.device) -> None:
        # Finite, so that nothing less is subtracted from itself.
        self.largest = torch.full((positions,), torch.finfo(torch.float32).min, device=device)
        self.total = torch.zeros(positions, dtype=torch.float64, device=device)

    def add(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a part of the vocabulary.

        Returns:
            exp of the logits less the largest so far, ``[positions, words]``, and the factor, ``[positions]``, by
            which earlier sums of such exponentials shrink.
        """
        return self._add(logits, logits.amax(-1))

    def _add(self, logits: Tensor, largest_here: Tensor) -> tuple[Tensor, Tensor]:
        largest = torch.maximum(self.largest, largest_here)
        shrink = (self.largest - largest).double().exp_()
        self.largest = largest
        exponentials = (logits - largest.unsqueeze(1)).exp_()
        self.total.mul_(shrink).add_(exponentials.sum(-1))
        return exponentials, shrink

    @property
    def normalizer(self) -> Tensor:
        """log of the sum of exp(logits)."""
        return self.total.log() + self.largest.double()


class _Sums(_Normalizer):
    """All running figures of one model, ``[positions]`` each."""

    def __init__(self, positions: int, device: torch.device, tokens: Tensor | None) -> None:
        super().__init__(positions, device)
        self.difference = torch.zeros_like(self.total)  # sum of exp(first) * (first - this)
        self.most_probable = torch.zeros(positions, dtype=torch.int64, device=device)
        self.tokens = tokens
        self.of_tokens = torch.zeros_like(self.total)

    def see(self, logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Take in a part of the vocabulary; returns what ``add`` does."""
        largest = logits.amax(-1)
        higher = (largest > self.largest).nonzero().squeeze(1)
        if len(higher):
            self.most_probable[higher] = logits[higher].argmax(-1) + part.start
        if self.tokens is not None:
            here = ((self.tokens >= part.start) & (self.tokens < part.stop)).nonzero().squeeze(1)
            self.of_tokens[here] = logits[here, self.tokens[here] - part.start].double()
        return self._add(logits, largest)

    def predicted(self, first: _Sums) -> Predicted:
        """The figures, the first of the models beside this one."""
        kl = torch.zeros_like(self.total)
        if self is not first:
            kl = self.difference / first.total + (self.normalizer - first.normalizer)
        return Predicted(kl, self.most_probable, None if self.tokens is None else self.of_tokens - self.normalizer)


def _joined(gathered: Sequence[Predicted]) -> Predicted:
    probabilities = [each.log_probability for each in gathered if each.log_probability is not None]
    return Predicted(
        torch.cat([each.kl for each in gathered]),
        torch.cat([each.most_probable for each in gathered]),
        torch.cat(probabilities) if probabilities else None,
    )
