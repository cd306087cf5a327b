"""How the checkpoint's tensors are loaded into vLLM's layers, each rank its part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.parameter import ModelWeightParameter

from matgptq.vllm_plugin.stored_parts import check_guard, unpack_slice


class SlicedCodes(ModelWeightParameter):  # type: ignore[misc]
    """Codes of an exported slice: packed rows in the file, parent codes with zeros below the slice in memory.

    Unpacked before vLLM cuts a rank's part out, because a part need not begin at a byte.

    Args:
        in_features: of the whole layer.
    """

    def __init__(self, *, in_features: int, **kwargs: Any) -> None:
        self._in_features = in_features
        super().__init__(**kwargs)

    def _unpack(self, packed: Tensor) -> Tensor:
        return unpack_slice(packed, self._in_features)

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Rows of this rank."""
        super().load_column_parallel_weight(self._unpack(loaded_weight))

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """Columns of this rank."""
        super().load_row_parallel_weight(self._unpack(loaded_weight))

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        """Rows of this rank, of one of several stacked layers."""
        super().load_merged_column_weight(self._unpack(loaded_weight), **kwargs)

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        """Rows of this rank, of q, k or v."""
        super().load_qkv_weight(self._unpack(loaded_weight), **kwargs)


def unread(dtype: torch.dtype) -> torch.nn.Parameter:
    """An empty parameter that takes a stored tensor and forgets it: scales of widths that are not served."""
    parameter = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    parameter.weight_loader = _forget  # type: ignore[attr-defined]
    return parameter


def guard(dtype: torch.dtype) -> torch.nn.Parameter:
    """The empty ``weight`` beside the codes; anything else stored there is refused."""
    parameter = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    parameter.weight_loader = _check_guard  # type: ignore[attr-defined]
    return parameter


def _forget(parameter: Tensor, loaded_weight: Tensor, *shard: object) -> None:
    return


def _check_guard(parameter: Tensor, loaded_weight: Tensor, *shard: object) -> None:
    check_guard("a weight", loaded_weight)
