"""Experts of a compressed-tensors checkpoint on any CPU: vLLM's kernel for them there takes AMX.

vLLM reads, stacks and dequantizes the weights as on a GPU without a kernel for them (its backend EMULATION); only the
products are put in place of those of Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.experts.int4_emulation_moe import Int4EmulationTritonExperts
from vllm.model_executor.layers.fused_moe.oracle import int_wna16


def install() -> None:
    """From now on experts of 4 bits are dequantized and run by PyTorch."""
    int_wna16._get_priority_backends = lambda: [int_wna16.WNA16MoEBackend.EMULATION]
    Int4EmulationTritonExperts.is_supported_config = staticmethod(lambda *_: (True, None))
    Int4EmulationTritonExperts.apply = _apply


def _apply(
    self: Any,
    output: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *_: Any,
    **__: Any,
) -> None:
    """``w1 [experts, 2 inner, hidden]`` holds gate and up, ``w2 [experts, hidden, inner]`` down."""
    assert w1.dtype == w2.dtype == hidden_states.dtype
    result = torch.zeros_like(hidden_states, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        tokens, places = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = (hidden_states[tokens] @ w1[expert].T).float().chunk(2, -1)
        inner = (torch.nn.functional.silu(gate) * up).to(hidden_states.dtype)
        result.index_add_(0, tokens, topk_weights[tokens, places, None].float() * (inner @ w2[expert].T).float())
    output.copy_(result)
