"""A mixture of experts as Linear layers, one by one, in the place of transformers' fused three-dimensional tensors.

transformers keeps the experts of a block in two tensors, ``gate_up_proj [experts, 2 * intermediate, hidden]`` and
``down_proj [experts, hidden, intermediate]``. Files on the hub, and every engine that reads quantized weights, have a
matrix for each expert and projection. ``unfuse_experts`` gives a model that form, and its layers the names of the
files; what it computes stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from matgptq.errors import UnsupportedModelError
from matgptq.files.stored_tensors import TensorInfo
from matgptq.models.families import ExpertSites, Family

_FUSED = ("gate_up_proj", "down_proj")
# How transformers' decorator of fused experts describes the one layout that is understood here.
_UNDERSTOOD = {
    "has_gate": True,
    "is_concatenated": True,
    "has_bias": False,
    "is_transposed": False,
    "has_post_expert_norm": False,
}


@dataclass(frozen=True)
class ExpertLayers:
    """Quantizable layers of one expert: the full name of the first of each group, None for one that is left alone."""

    inner: str | None
    down: str | None


class Expert(nn.Module):
    """One expert: ``down(act(gate(x)) * up(x))``, its Linears under the names of its family.

    Args:
        sites: names.
        gate, up: ``[intermediate, hidden]``.
        down: ``[hidden, intermediate]``.
        activation: of the gate.
    """

    def __init__(self, sites: ExpertSites, gate: Tensor, up: Tensor, down: Tensor, activation: Any) -> None:
        super().__init__()
        self._sites = sites
        for name, weight in ((sites.gate, gate), (sites.up, up), (sites.down, down)):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
            self.add_module(name, linear)
        self.act_fn = activation

    @property
    def gate(self) -> Any:
        """The gate projection, quantized or not, whatever it is called."""
        return self.get_submodule(self._sites.gate)

    @property
    def up(self) -> Any:
        """The up projection."""
        return self.get_submodule(self._sites.up)

    @property
    def down(self) -> Any:
        """The down projection."""
        return self.get_submodule(self._sites.down)

    def inner(self, hidden: Tensor) -> Tensor:
        """What enters the down projection, ``[tokens, intermediate]``."""
        inner: Tensor = self.act_fn(self.gate(hidden)) * self.up(hidden)
        return inner

    def forward(self, hidden: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
        """What the expert makes of its tokens.

        Args:
            hidden: ``[n, hidden]``, the tokens that were given to it.
            tokens: int64 ``[n]``, which those are.
            weights: ``[n]``, the router's, with which the output will be multiplied. Neither this nor ``tokens``
                changes the output; they are there for those who watch (``matgptq.calibration.expert_hessians``).
        """
        output: Tensor = self.down(self.inner(hidden))
        return output


class Experts(nn.ModuleList):
    """All experts of a block, with the interface of transformers' fused ones."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of what each token's experts make of it.

        Args:
            hidden_states: ``[tokens, hidden]``.
            top_k_index: int64 ``[tokens, k]``, experts of each token.
            top_k_weights: ``[tokens, k]``.
        """
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            tokens, choice = torch.where(top_k_index == number)
            if len(tokens):
                weights = top_k_weights[tokens, choice]
                output = expert(hidden_states[tokens], tokens, weights) * weights.unsqueeze(1)
                total.index_add_(0, tokens, output.to(total.dtype))
        return total


def unfuse_experts(model: Any, family: Family) -> bool:
    """Give a model's experts Linear layers under the names that they have in files; in place.

    Weights are views of the fused ones, so that nothing is in memory twice; a model on the meta device will do.

    Returns:
        Whether the model has experts in any block, unfused now or before.

    Raises:
        UnsupportedModelError: fused tensors of a layout that is not understood; names the tensor and its shape.
    """
    sites = family.experts
    if sites is None:
        return False
    found = False
    for name, block in _blocks(model, family):
        layer = getattr(block, sites.module, None)
        fused = getattr(layer, "experts", None)
        if layer is None or fused is None:  # a block without experts
            continue
        found = True
        if isinstance(fused, Experts):
            continue
        layer.experts = _split(fused, sites, f"{name}.{sites.module}.experts")
        if sites.name != sites.module:
            # One module, registered under the name of the files; the block's own code finds it under the other.
            del block._modules[sites.module]
            block.add_module(sites.name, layer)
            block.__dict__[sites.module] = layer
    return found


def check_expert_tensors(tensors: Mapping[str, TensorInfo], family: Family) -> None:
    """Refuse files that keep experts in another form than a matrix for each of them and each projection.

    Raises:
        UnsupportedModelError: names the tensor and its shape.
    """
    sites = family.experts
    if sites is None:
        return
    expected = {f"{projection}.weight" for projection in (sites.gate, sites.up, sites.down)}
    for name, info in tensors.items():
        if f".{sites.module}.experts." not in name and f".{sites.path}." not in name:
            continue
        number, _, rest = name.partition(f".{sites.path}.")[2].partition(".")
        if not number.isdecimal() or rest not in expected or len(info.shape) != 2:
            raise UnsupportedModelError(
                f"{info.file.name}: tensor {name} {list(info.shape)} is not one of the matrices "
                f"{sites.path}.N.{{{sites.gate},{sites.up},{sites.down}}}.weight of this architecture's experts; "
                "load the model in transformers and save it with save_pretrained, which writes these"
            )


def _blocks(model: Any, family: Family) -> list[tuple[str, nn.Module]]:
    """Blocks by name, in a causal language model or in the base model alone."""
    for path in (family.blocks, family.blocks.removeprefix(f"{model.base_model_prefix}.")):
        try:
            blocks = model.get_submodule(path)
        except AttributeError:
            continue
        return [(f"{path}.{index}", block) for index, block in blocks.named_children()]
    return []


def _split(fused: Any, sites: ExpertSites, name: str) -> Experts:
    parameters = dict(fused.named_parameters())
    shapes = ", ".join(f"{key} {list(parameter.shape)}" for key, parameter in parameters.items()) or "none"
    layout = {key: getattr(fused, key, value) for key, value in _UNDERSTOOD.items()}
    if set(parameters) != set(_FUSED) or layout != _UNDERSTOOD:
        raise UnsupportedModelError(
            f"{name}: experts with the tensors {shapes} are of a layout that is not understood; "
            f"{' and '.join(_FUSED)} without biases are"
        )
    gate_up, down = (parameters[key] for key in _FUSED)
    count, hidden, inner = down.shape if down.dim() == 3 else (0, 0, 0)
    if tuple(gate_up.shape) != (count, 2 * inner, hidden) or not count:
        raise UnsupportedModelError(
            f"{name}: experts with the tensors {shapes} are of a layout that is not understood; "
            "[experts, 2 * intermediate, hidden] and [experts, hidden, intermediate] are"
        )
    return Experts(
        Expert(sites, gate_up[number, :inner], gate_up[number, inner:], down[number], fused.act_fn)
        for number in range(count)
    )
