"""What happens to a decoded row between its products, each as one call (``csrc/row_steps.cpp``).

Every function takes contiguous tensors of one dtype, float32 or bfloat16, on the CPU, and rounds where transformers
rounds. They are called dozens of times for a token, and check their arguments no more than the library does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from matgptq.native.library import DTYPES, check_status, require_library

ATTEND_UNIT = 32


class RowSteps:
    """The calls for one dtype.

    Args:
        dtype: of all tensors.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        library = require_library()
        self._dtype = DTYPES[dtype]
        self._rms_norm = library.matgptq_rms_norm
        self._rotate = library.matgptq_rotate
        self._silu_product = library.matgptq_silu_product
        self._add = library.matgptq_add
        self._attend = library.matgptq_attend

    def __deepcopy__(self, _: object) -> RowSteps:
        """Itself: functions of a library are not copied with a model."""
        return self

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, update: Tensor | None = None) -> Tensor:
        """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, after ``x += update`` in place."""
        out = torch.empty_like(x)
        size = weight.shape[0]
        status = self._rms_norm(
            x.data_ptr(), None if update is None else update.data_ptr(), weight.data_ptr(), eps, out.data_ptr(),
            x.numel() // size, size, self._dtype,
        )  # fmt: skip
        if status:
            check_status(status)
        return out

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor) -> None:
        """Rotary position embedding of vectors as long as ``cosine``, one after the other, in place."""
        size = cosine.shape[-1]
        status = self._rotate(
            x.data_ptr(), cosine.data_ptr(), sine.data_ptr(), x.numel() // size, size, self._dtype
        )  # fmt: skip
        if status:
            check_status(status)

    def silu_product(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) * up`` of ``[1, 2 * size]``, gate before up; ``[1, size]``."""
        size = gate_up.shape[1] // 2
        out = gate_up.new_empty((1, size))
        gate = gate_up.data_ptr()
        status = self._silu_product(
            gate, gate + size * gate_up.element_size(), out.data_ptr(), size, self._dtype
        )  # fmt: skip
        if status:
            check_status(status)
        return out

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor | None:
        """Attention of a token, ``[1, heads * size]`` as the query is.

        Args:
            query: ``[1, heads * size]``, contiguous.
            keys, values: ``[1, key heads, positions, size]``, any distances between rows of adjacent elements.
            scale: of the scores.

        Returns:
            None where the library does not compute it: sizes that are no multiple of ``ATTEND_UNIT``, other dtypes.
        """
        _, key_heads, length, size = keys.shape
        if size % ATTEND_UNIT or any(
            not each.is_cpu or each.dtype != query.dtype or each.stride(3) != 1 for each in (keys, values)
        ):
            return None
        out = torch.empty_like(query)
        status = self._attend(
            query.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(), query.shape[1] // size, key_heads,
            size, length, keys.stride(1), keys.stride(2), values.stride(1), values.stride(2), scale, self._dtype,
            torch.get_num_threads(),
        )  # fmt: skip
        if status:
            check_status(status)
        return out

    def add(self, x: Tensor, update: Tensor) -> None:
        """``x += update`` in place."""
        status = self._add(x.data_ptr(), update.data_ptr(), x.numel(), self._dtype)
        if status:
            check_status(status)
