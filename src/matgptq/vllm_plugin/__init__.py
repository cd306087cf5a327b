"""Serve a checkpoint, at any width, with vLLM.

vLLM calls ``register`` in each of its processes (entry point ``vllm.general_plugins`` in ``pyproject.toml``). Nothing
else in the package imports this one, and importing it imports no vLLM.
"""

from __future__ import annotations


def register() -> None:
    """Make vLLM know our quantization methods; harmless when called again."""
    from vllm.model_executor.layers import quantization

    from matgptq.checkpoints.format import QUANT_METHOD, SLICE_METHOD
    from matgptq.vllm_plugin.config import ServedConfig

    for method in (QUANT_METHOD, SLICE_METHOD):
        quantization.register_quantization_config(method)(ServedConfig)
