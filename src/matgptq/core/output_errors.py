"""How far a quantized layer's outputs move, row by row and width by width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from matgptq.core.hessian import quadratic_forms
from matgptq.nested_weight import NestedWeight
from matgptq.slicing import WIDTHS


@dataclass(frozen=True)
class OutputErrors:
    """How far the layer's outputs move, row by row.

    Attributes:
        energy: ``[rows]``, ``w H w^T``: the squared outputs of full precision.
        errors: ``{width: [rows]}``, ``(w - w_r) H (w - w_r)^T``, all widths.
    """

    energy: Tensor
    errors: Mapping[int, Tensor]

    def relative(self, rows: slice = slice(None)) -> dict[int, float]:
        """``||(W - W_r) X||^2 / ||W X||^2`` of some rows, for every width; 0 where nothing comes out."""
        energy = float(self.energy[rows].sum())
        return {bits: float(self.errors[bits][rows].sum()) / energy if energy > 0 else 0.0 for bits in WIDTHS}


def output_errors(
    weight: Tensor, nested: NestedWeight, hessian: Tensor, known: Mapping[int, Tensor] | None = None
) -> OutputErrors:
    """What each width of a quantized matrix does to the layer's outputs.

    Args:
        weight: ``[rows, in]`` full precision.
        nested: its quantized form.
        hessian: ``[in, in]``.
        known: errors of widths ``[rows]`` that need not be computed again.
    """
    weight = weight.to(torch.float32)
    hessian = hessian.to(torch.float32)
    of_widths = dict(known or {})
    for bits in WIDTHS:
        if bits not in of_widths:
            of_widths[bits] = quadratic_forms(weight - nested.dequantize(bits), hessian)
    return OutputErrors(quadratic_forms(weight, hessian), of_widths)
