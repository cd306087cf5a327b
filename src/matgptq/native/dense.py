"""Products of a few rows with a dense weight, at the speed of its bytes (``csrc/dense.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from matgptq.errors import ConfigurationError
from matgptq.native.library import DTYPES, check_status, expect_tensor, require_library, thread_count

_WEIGHT_DTYPES = {**DTYPES, torch.float16: 2}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, num_threads: int | None = None) -> Tensor:
    """``x @ weight.T + bias`` with float32 sums; a weight of 16 bits enters as it is, whatever the dtype of x.

    PyTorch's product of one row reaches a third to a half of the bandwidth of memory, and needs both in one dtype.

    Args:
        x: float32 or bfloat16 ``[..., in]`` on the CPU; made for up to about 16 rows.
        weight: float32, bfloat16 or float16 ``[out, in]`` with adjacent columns.
        bias: ``[out]``, or None.
        num_threads: default ``torch.get_num_threads()``.

    Returns:
        ``[..., out]`` in the dtype of x. Non-finite values propagate.

    Raises:
        ConfigurationError: dtypes, shapes or devices that it does not take.
    """
    if x.device.type != "cpu" or weight.device.type != "cpu":
        raise ConfigurationError(f"x and weight must be on the CPU, not on {x.device} and {weight.device}")
    if x.dtype not in DTYPES or weight.dtype not in _WEIGHT_DTYPES:
        raise ConfigurationError(
            f"x must be float32 or bfloat16 and weight one of these or float16, not {x.dtype} and {weight.dtype}"
        )
    if x.ndim == 0 or weight.ndim != 2 or x.shape[-1] != weight.shape[1] or (weight.numel() and weight.stride(1) != 1):
        raise ConfigurationError(f"{list(x.shape)} and {list(weight.shape)} do not fit, or columns are not adjacent")
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = rows.new_empty((rows.shape[0], weight.shape[0]))
    if bias is not None:
        bias = expect_tensor(bias.float(), "bias", torch.float32, (weight.shape[0],))
    status = require_library().matgptq_dense(
        rows.data_ptr(), DTYPES[rows.dtype], rows.stride(0), rows.shape[0], rows.shape[1],
        weight.data_ptr(), _WEIGHT_DTYPES[weight.dtype], weight.stride(0), weight.shape[0],
        None if bias is None else bias.data_ptr(), out.data_ptr(), DTYPES[out.dtype], out.stride(0),
        thread_count(num_threads),
    )  # fmt: skip
    check_status(status)
    return out.view(*x.shape[:-1], out.shape[1])
