"""The output head at a few bits: the largest matrix of a small model, read whole for every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from matgptq import kernels
from matgptq.errors import ConfigurationError
from matgptq.grid import resolve_group_size
from matgptq.nested_weight import NestedWeight
from matgptq.recipe import make_recipe
from matgptq.slicing import PARENT_BITS, check_bits
from matgptq.solver import solve

GROUP_SIZE = 64
_ROWS = 8192  # rounded at a time, to bound the temporaries


class OutputHead(nn.Linear):
    """The model's own head, whose products run on a packed copy rounded to nearest.

    The full-precision weight stays: it may be the embedding table as well, and saving the model writes it.

    Args:
        head: the head it takes the place of; weight and bias are shared with it.
        bits: width of the packed copy, 2..8.
        activations: of the products, as in ``matgptq.load``.

    Raises:
        UnsupportedModelError: the hidden size is a multiple of none of the group sizes.
    """

    def __init__(self, head: nn.Linear, bits: int, activations: kernels.Activations = "exact") -> None:
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight, self.bias = head.weight, head.bias
        self.bits = check_bits(bits)
        self.activations: kernels.Activations = activations
        group_size = resolve_group_size("lm_head", head.in_features, GROUP_SIZE)
        recipe = make_recipe("gptq", [bits], grid="absmax", signed_scales=True, compensation="none")
        weight = head.weight.detach()
        starts = range(0, len(weight), _ROWS)
        pieces = [solve(weight[start : start + _ROWS], None, recipe, group_size).weight for start in starts]
        codes = torch.cat([piece.codes for piece in pieces])
        scales = torch.cat([piece.scales_for(bits) for piece in pieces])
        rounded = NestedWeight(codes, {PARENT_BITS: scales})
        self.packed = kernels.pack(rounded, bits, arena=kernels.new_arena(codes.device))

    def forward(self, input: Tensor) -> Tensor:
        """Logits, in the dtype of ``input``."""
        return kernels.matmul(input, self.packed, self.bits, self.bias, activations=self.activations)


def pack_head(model: Any, bits: int, activations: kernels.Activations = "exact") -> None:
    """Serve the model's output head at ``bits`` bits from now on.

    Raises:
        ConfigurationError: the model has no Linear head, or its output is not a plain product.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigurationError(f"head_bits: {type(model).__name__} has no Linear output head")
    model.set_output_embeddings(OutputHead(head, bits, activations))
