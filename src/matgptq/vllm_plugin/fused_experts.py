"""All experts of one of vLLM's blocks, each matrix at its own width. Knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from matgptq.kernels import Activations
from matgptq.vllm_plugin.fused_linear import FusedLinear, Part


@dataclass(frozen=True)
class ExpertParts:
    """The matrices of one expert.

    Attributes:
        gate, up: from the hidden size to this rank's share of the intermediate size.
        down: and back.
    """

    gate: Part
    up: Part
    down: Part


class FusedExperts:
    """Sends every token through its experts.

    Args:
        name: of the experts in the model that is served.
        experts: in the order of their numbers.
        activation: between the projections, of the gate's output.
        dtype: of the activations.
        activations: as in ``matgptq.load``.

    Attributes:
        obstacle: as of ``FusedLinear``.
    """

    def __init__(
        self,
        name: str,
        experts: Sequence[ExpertParts],
        activation: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
        activations: Activations = "exact",
    ) -> None:
        self._activation = activation
        self._experts = [
            (
                FusedLinear(f"{name}.{number}.inner", [each.gate, each.up], dtype, activations),
                FusedLinear(f"{name}.{number}.down", [each.down], dtype, activations),
            )
            for number, each in enumerate(experts)
        ]
        self.obstacle = self._experts[0][0].obstacle

    def multiply(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Weighted sum of what each token's experts make of it.

        Args:
            x: ``[tokens, hidden]``.
            weights: floating ``[tokens, k]``, the router's.
            chosen: integers ``[tokens, k]``, experts of each token.

        Returns:
            ``[tokens, hidden]`` in the dtype of ``x``; of this rank's share of the intermediate size.
        """
        total = torch.zeros_like(x)
        if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # A recorded graph cannot depend on which experts were chosen: every token goes through all of them.
            for number in range(len(self._experts)):
                share = (weights * (chosen == number)).sum(1, keepdim=True)
                total += self._run(number, x) * share.to(x.dtype)
            return total
        for number in torch.unique(chosen).tolist():
            tokens, choice = torch.where(chosen == number)
            output = self._run(number, x[tokens]) * weights[tokens, choice].unsqueeze(1)
            total.index_add_(0, tokens, output.to(total.dtype))
        return total

    def _run(self, number: int, x: Tensor) -> Tensor:
        inner, down = self._experts[number]
        gate, up = inner.multiply(x, None).chunk(2, -1)
        return down.multiply(self._activation(gate) * up, None)
