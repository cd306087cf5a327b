"""Cholesky factor and triangular inverse of large float64 matrices, in panels of a fixed size.

LAPACK sums in an order that depends on the number of threads. Here each panel is one thread's, the panels are shared
out, and nothing is copied that is as large as the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from matgptq.machine.workers import Workers

PANEL = 256


def panels(first: int, stop: int) -> list[slice]:
    """Consecutive stretches of at most ``PANEL`` numbers."""
    return [slice(start, min(start + PANEL, stop)) for start in range(first, stop, PANEL)]


def factorize_lower(matrix: Tensor, workers: Workers) -> bool:
    """Overwrite the lower triangle of a symmetric matrix by L with ``L L^T = matrix``; what is above it is left over.

    Args:
        matrix: float64 ``[n, n]`` on the CPU; only its lower triangle is read.
        workers: among which panels are shared out.

    Returns:
        Whether the matrix is positive definite; otherwise what it holds is of no use.
    """
    size = len(matrix)
    for panel in panels(0, size):
        corner, failed = torch.linalg.cholesky_ex(matrix[panel, panel])
        if int(failed):
            return False
        matrix[panel, panel] = corner
        below = panels(panel.stop, size)

        def divide(rows: slice, panel: slice = panel, corner: Tensor = corner) -> None:
            matrix[rows, panel] = torch.linalg.solve_triangular(corner.T, matrix[rows, panel], upper=True, left=False)

        def subtract(rows: slice, panel: slice = panel) -> None:
            rest = slice(panel.stop, rows.stop)
            matrix[rows, rest] -= matrix[rows, panel] @ matrix[rest, panel].T

        workers.run(divide, below)
        workers.run(subtract, reversed(below))  # the longest first
    return True


def invert_lower(lower: Tensor, workers: Workers) -> Tensor:
    """The inverse of a lower triangular matrix.

    Args:
        lower: float64 ``[n, n]`` on the CPU; only its lower triangle is read.
        workers: among which panels are shared out.

    Returns:
        float32 ``[n, n]``, zero above the diagonal; sums are float64.
    """
    size = len(lower)
    inverse = torch.zeros(size, size)
    blocks = panels(0, size)
    corners = [
        torch.linalg.solve_triangular(lower[block, block], torch.eye(_length(block), dtype=lower.dtype), upper=False)
        for block in blocks
    ]

    def column(number: int) -> None:
        first = blocks[number].start
        found = torch.empty(size - first, _length(blocks[number]), dtype=lower.dtype)
        found[: _length(blocks[number])] = corners[number]
        for block, corner in zip(blocks[number + 1 :], corners[number + 1 :], strict=True):
            known = slice(first, block.start)
            found[block.start - first : block.stop - first] = -corner @ (
                lower[block, known] @ found[: block.start - first]
            )
        inverse[first:, blocks[number]] = found

    workers.run(column, range(len(blocks)))
    return inverse


def _length(block: slice) -> int:
    return int(block.stop - block.start)
