"""All experts of one of vLLM's blocks, each matrix at its own width. Knows nothing of vLLM."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from matgptq.native import Activations
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
        # The name by which graphs find them: as for each of their matrices, the same in the next process.
        self.key = self._experts[0][0].key
        _known[self.key] = self

    def product(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """``multiply``, which a compiled graph takes for one operation: what it does depends on who was chosen."""
        if torch.compiler.is_compiling():
            result: Tensor = torch.ops.matgptq.fused_experts(x, weights, chosen, self.key)
            return result
        return self.multiply(x, weights, chosen)

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


_known: weakref.WeakValueDictionary[str, FusedExperts] = weakref.WeakValueDictionary()


def _multiply(x: Tensor, weights: Tensor, chosen: Tensor, experts: str) -> Tensor:
    return _known[experts].multiply(x, weights, chosen)


def _fake(x: Tensor, weights: Tensor, chosen: Tensor, experts: str) -> Tensor:
    return torch.empty_like(x)


_library = torch.library.Library("matgptq", "FRAGMENT")  # type: ignore[no-untyped-call]
_SCHEMA = "fused_experts(Tensor x, Tensor weights, Tensor chosen, str experts) -> Tensor"
_library.define(_SCHEMA)  # type: ignore[no-untyped-call]
_library.impl("fused_experts", _multiply, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("matgptq::fused_experts", _fake)
