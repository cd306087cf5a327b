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

from matgptq.distributed import Processes
from matgptq.experts import Experts
from matgptq.hessian import accumulate_hessian


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


@dataclass(frozen=True)
class ExpertLayers:
    """Quantizable layers of one expert: the full name of the first of each group, None for one that is left alone."""

    inner: str | None
    down: str | None


class ExpertTotals:
    """Running sums of the Hessians of some experts of one block.

    Args:
        experts: of the block, at full precision.
        layers: of the experts to watch, by number.
        calibration: how.

    Attributes:
        totals: float32 ``[in, in]`` by the full name of the first layer of each group; experts that are calibrated on
            the same tokens hold one tensor.
        weights: sum of the weights of the streams, of the tokens that each total is made of.
        tokens: of each expert, by number, in streams that count.
    """

    def __init__(self, experts: Experts, layers: Mapping[int, ExpertLayers], calibration: ExpertCalibration) -> None:
        self._experts = experts
        self._layers = layers
        self._calibration = calibration
        self.totals: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}
        self.tokens = dict.fromkeys(layers, 0)
        self._rows: Tensor | None = None  # weights of the tokens of the expert that is running
        together: Tensor | None = None
        for number, each in layers.items():
            expert: Any = experts[number]
            hidden, inner = expert.gate.in_features, expert.down.in_features
            if each.inner is not None:
                if together is None or not calibration.every_token:
                    together = torch.zeros(hidden, hidden, device=expert.gate.weight.device)
                self.totals[each.inner] = together
            if each.down is not None:
                self.totals[each.down] = torch.zeros(inner, inner, device=expert.gate.weight.device)
        self.weights = dict.fromkeys(self.totals, 0.0)

    @contextmanager
    def watching(self, weight: float, token_weights: Callable[[], Tensor | None], *, counts: bool) -> Iterator[None]:
        """Inside, add what the experts see whenever the block is run.

        Args:
            weight: of each token.
            token_weights: gives further weights of the tokens that are being run, ``[tokens]``, or None.
            counts: these are the windows whose tokens are counted.
        """
        with ExitStack() as stack:
            show: Callable[..., None]
            if self._calibration.every_token:
                show = partial(self._see_all, weight, token_weights)
                stack.callback(self._experts.register_forward_pre_hook(show).remove)
            for number, layers in self._layers.items():
                expert: Any = self._experts[number]
                show = partial(self._see, number, weight, token_weights, counts)
                stack.callback(expert.register_forward_pre_hook(show).remove)
                if layers.down is not None and not self._calibration.every_token:
                    show = partial(self._add, layers.down, weight)
                    stack.callback(expert.down.register_forward_pre_hook(show).remove)
            yield

    def _see_all(
        self, weight: float, token_weights: Callable[[], Tensor | None], _: nn.Module, given: tuple[Tensor, ...]
    ) -> None:
        hidden, rows = given[0], token_weights()
        seen: set[int] = set()
        for number, layers in self._layers.items():
            if layers.inner is not None:
                total = self.totals[layers.inner]
                if id(total) not in seen:
                    accumulate_hessian(total, hidden, weight, rows)
                    seen.add(id(total))
                self.weights[layers.inner] += weight * len(hidden)
            if layers.down is not None:
                expert: Any = self._experts[number]
                accumulate_hessian(self.totals[layers.down], expert.inner(hidden), weight, rows)
                self.weights[layers.down] += weight * len(hidden)

    def _see(
        self, number: int, weight: float, token_weights: Callable[[], Tensor | None], counts: bool,
        expert: nn.Module, given: tuple[Tensor, Tensor, Tensor],
    ) -> None:  # fmt: skip
        _, tokens, routed = given
        if counts:
            self.tokens[number] += len(tokens)
        if self._calibration.every_token:
            return
        rows = token_weights()
        if rows is not None:
            rows = rows.reshape(-1)[tokens.to(rows.device)].to(routed.device)
        if self._calibration.saliency:
            factors = routed.detach().float() ** self._calibration.saliency
            rows = factors if rows is None else rows * factors
        self._rows = rows
        name = self._layers[number].inner
        if name is not None:
            self._add(name, weight, expert, given)

    def _add(self, name: str, weight: float, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        """Add what one layer of the expert sees whose tokens came last."""
        accumulate_hessian(self.totals[name], given[0], weight, self._rows)
        self.weights[name] += weight * len(given[0])

    def starved(self) -> list[int]:
        """Numbers of the experts that have seen too few tokens for Hessians of their own."""
        if self._calibration.every_token:
            return []
        return [number for number, count in self.tokens.items() if count < max(1, self._calibration.min_tokens)]

    def finish(self, processes: Processes) -> None:
        """Turn sums into Hessians, twice the weighted mean of ``x x^T`` over the tokens of all processes."""
        unique = [*{id(total): total for total in self.totals.values()}.values()]
        weights = torch.tensor([*self.weights.values()], dtype=torch.float64)
        tokens = torch.tensor([*self.tokens.values()])
        processes.add([*unique, weights, tokens])
        self.weights = dict(zip(self.weights, weights.tolist(), strict=True))
        self.tokens = dict(zip(self.tokens, tokens.tolist(), strict=True))
        of_total = {id(self.totals[name]): weight for name, weight in self.weights.items()}
        for total in unique:
            if of_total[id(total)]:
                total.mul_(2 / of_total[id(total)])
