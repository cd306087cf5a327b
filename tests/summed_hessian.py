"""A Hessian summed in one go by the tiles that calibration sums it in, for tests that compare to the last bit."""

from __future__ import annotations

from torch import Tensor

from matgptq.core.hessian import add_to_tile, hessian_rows, hessian_tiles, mirror


def accumulate_hessian(total: Tensor, inputs: Tensor, weight: float = 1.0) -> None:
    """Add ``weight * X^T X`` of ``[..., in]`` inputs to a symmetric total in place."""
    rows = hessian_rows(inputs, dtype=total.dtype)
    for tile in hessian_tiles(total):
        add_to_tile(total, tile, rows, weight)
    mirror(total)
