"""Hessians of experts, each from the tokens that the router gives to it.

Gate and up projection of an expert share one, its down projection has its own. An expert that too few tokens reach
gets the Hessians of all tokens of the block instead, as they would be if the router sent every token to it; if even
these are of no use (not finite, because the expert was never meant to see such tokens), its layers are rounded to
nearest by the solver. With ``every_token`` all experts are calibrated like that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from matgptq.calibration.sightings import Notes, Sighting, Watch
from matgptq.core.hessian import mirror
from matgptq.machine.devices import fast_products
from matgptq.machine.distributed import Processes
from matgptq.models.experts import ExpertLayers, Experts


@dataclass(frozen=True)
class ExpertCalibration:
    """How experts are calibrated.

    Attributes:
        min_tokens: of the calibration windows that an expert has to see for Hessians of its own. With fewer tokens
            than a layer has inputs a Hessian knows only some of their directions, and damping fills in the rest; a
            handful of tokens knows next to nothing.
        every_token: all tokens go through all experts to calibrate them; what the block computes stays the same.
        saliency: exponent of the router's weight in the weight of a token, where tokens are weighted: the gradient in
            an expert's output is the router's weight times that in the sum of all experts.
    """

    min_tokens: int = 128
    every_token: bool = False
    saliency: float = 0.0


@dataclass(frozen=True)
class Coverage:
    """What a layer of an expert was calibrated on.

    Attributes:
        tokens: of the calibration windows that the router gave to the expert.
        shared: these were too few, and its Hessian is that of all tokens of the block.
    """

    tokens: int
    shared: bool


class ExpertTotals:
    """Running sums of the Hessians of some experts of one block.

    Args:
        experts: of the block, at full precision.
        layers: of the experts to watch, by number.
        calibration: how.

    Attributes:
        totals: float32 ``[in, in]`` by the full name of the first layer of each group; experts that are calibrated on
            the same tokens hold one tensor. Filled on and below the diagonal until they are finished.
        tokens: of each expert, by number, in streams that count.
        columns: inputs of all layers of one expert that have Hessians of their own.
    """

    def __init__(self, experts: Experts, layers: Mapping[int, ExpertLayers], calibration: ExpertCalibration) -> None:
        self._experts = experts
        self._layers = layers
        self._calibration = calibration
        self.totals: dict[str, Tensor] = {}
        self.tokens = dict.fromkeys(layers, 0)
        self.columns = 0
        self._common: str | None = None  # the name under which what enters all experts is noted
        for number, each in layers.items():
            expert: Any = experts[number]
            hidden, inner = expert.gate.in_features, expert.down.in_features
            self.columns = hidden + inner
            if each.inner is not None:
                if self._common is not None and calibration.every_token:
                    self.totals[each.inner] = self.totals[self._common]
                else:
                    self.totals[each.inner] = torch.zeros(hidden, hidden, device=expert.gate.weight.device)
                    self._common = each.inner
            if each.down is not None:
                self.totals[each.down] = torch.zeros(inner, inner, device=expert.gate.weight.device)
        # Sums of the weights of the streams, of the tokens that each total is made of.
        self._weights = {id(total): 0.0 for total in self.totals.values()}

    @contextmanager
    def watching(self, watch: Watch, token_weights: Callable[[], Tensor | None]) -> Iterator[None]:
        """Inside, the block's hooks note what the experts see.

        Args:
            watch: where.
            token_weights: gives further weights of the tokens that this thread runs, ``[tokens]``, or None.
        """
        with ExitStack() as stack:
            if self._calibration.every_token:
                see_all = partial(self._see_all, watch, token_weights)
                stack.callback(self._experts.register_forward_pre_hook(see_all).remove)
            for number, layers in self._layers.items():
                expert: Any = self._experts[number]
                see = partial(self._see, watch, number, token_weights)
                stack.callback(expert.register_forward_pre_hook(see).remove)
                if layers.down is not None and not self._calibration.every_token:
                    see_inner = partial(self._see_inner, watch, layers.down)
                    stack.callback(expert.down.register_forward_pre_hook(see_inner).remove)
            yield

    def _see_all(
        self, watch: Watch, token_weights: Callable[[], Tensor | None], _: nn.Module, given: tuple[Tensor, ...]
    ) -> None:
        hidden, rows = given[0], token_weights()
        if self._common is not None:
            watch.notes.sightings.append(Sighting(self._common, hidden, len(hidden), rows))
        for number, layers in self._layers.items():
            if layers.down is not None:
                expert: Any = self._experts[number]
                # Made when it is added: of all experts together it would be the largest of all that is in memory.
                inner = partial(_inner, expert, hidden)
                watch.notes.sightings.append(Sighting(layers.down, inner, len(hidden), rows))

    def _see(
        self, watch: Watch, number: int, token_weights: Callable[[], Tensor | None],
        _: nn.Module, given: tuple[Tensor, Tensor, Tensor],
    ) -> None:  # fmt: skip
        hidden, tokens, routed = given
        watch.notes.expert_tokens[number] = len(tokens)
        if self._calibration.every_token:
            return
        rows = token_weights()
        if rows is not None:
            rows = rows.reshape(-1)[tokens.to(rows.device)].to(routed.device)
        if self._calibration.saliency:
            factors = routed.detach().float() ** self._calibration.saliency
            rows = factors if rows is None else rows * factors
        watch.row_weights = rows  # its down projection comes next
        name = self._layers[number].inner
        if name is not None:
            watch.notes.sightings.append(Sighting(name, hidden, len(hidden), rows))

    def _see_inner(self, watch: Watch, name: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        """Note what the down projection sees of the expert whose tokens came last."""
        watch.notes.sightings.append(Sighting(name, given[0], len(given[0]), watch.row_weights))

    def count(self, notes: Notes, weight: float, *, counts: bool) -> None:
        """Take up how many tokens there were.

        Args:
            notes: of some windows.
            weight: of each token.
            counts: these are the windows whose tokens are counted.
        """
        for each in notes.sightings:
            if each.total in self.totals:
                self._weights[id(self.totals[each.total])] += weight * each.count
        if counts:
            for number, tokens in notes.expert_tokens.items():
                self.tokens[number] += tokens

    def starved(self) -> list[int]:
        """Numbers of the experts that have seen too few tokens for Hessians of their own."""
        if self._calibration.every_token:
            return []
        return [number for number, count in self.tokens.items() if count < max(1, self._calibration.min_tokens)]

    def finish(self, processes: Processes) -> None:
        """Turn sums into Hessians, twice the weighted mean of ``x x^T`` over the tokens of all processes."""
        unique = {id(total): total for total in self.totals.values()}
        weights = torch.tensor([self._weights[key] for key in unique], dtype=torch.float64)
        tokens = torch.tensor([*self.tokens.values()])
        processes.add([*unique.values(), weights, tokens])
        self.tokens = dict(zip(self.tokens, tokens.tolist(), strict=True))
        for total, weight in zip(unique.values(), weights.tolist(), strict=True):
            mirror(total)
            if weight:
                total.mul_(2 / weight)


def _inner(expert: Any, hidden: Tensor) -> Tensor:
    """What enters the down projection of an expert, as the block computes it."""
    with fast_products(hidden.device):
        inner: Tensor = expert.inner(hidden)
    return inner
