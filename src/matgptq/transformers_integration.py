"""Teach transformers' ``from_pretrained`` to load matgptq checkpoints.

``register()`` adds our quantizer to transformers' tables. ``import matgptq`` arranges for it to be called as soon as
transformers itself is imported (see ``matgptq.registration``).
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from matgptq.errors import CheckpointError, SourceError
from matgptq.format import CODES, QUANT_METHOD, Settings, check_layer, parse_settings, scales_name
from matgptq.nested_linear import NestedLinear, nested_layers, set_bits
from matgptq.slicing import check_bits
from matgptq.source import TensorInfo, read_header


class MatGPTQConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of a checkpoint, or the wish ``MatGPTQConfig(bits=3)`` when loading one.

    Passed to ``from_pretrained(path, quantization_config=MatGPTQConfig(bits=3))`` only ``bits`` is read; everything
    else comes from the checkpoint.
    """

    def __init__(self, bits: int | None = None, **record: Any) -> None:
        self.quant_method = QUANT_METHOD
        if bits is not None:
            self.bits = check_bits(bits)
        record.pop("quant_method", None)
        for key, value in record.items():
            setattr(self, key, value)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What an argument of ``from_pretrained`` may override."""
        return {"bits": self.bits} if hasattr(self, "bits") else {}

    def settings(self, where: str) -> Settings:
        """Validated settings; raises ``CheckpointError``."""
        return parse_settings(self.to_dict(), where)


class MatGPTQQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces the quantized Linear layers by ``NestedLinear`` before the weights are loaded by name."""

    requires_calibration = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Any device that PyTorch runs on will do."""
        if not self.pre_quantized:
            raise CheckpointError("from_pretrained does not quantize; use matgptq.quantize, then load its output")

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        files = [Path(file) for file in checkpoint_files or ()]
        where = str(files[0].parent / "config.json") if files else "quantization_config"
        settings = self.quantization_config.settings(where)
        try:
            headers: dict[str, TensorInfo] = {}
            for file in files:
                headers.update(read_header(file))
        except SourceError as error:
            raise CheckpointError(str(error)) from error
        replace_linears(model, settings, headers)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, layer in nested_layers(model).items():
            for bits in layer.scale_bits:
                scales = getattr(layer, scales_name(bits))
                if not scales.is_meta and not bool(torch.isfinite(scales).all()):
                    raise CheckpointError(f"layer {name}: {scales_name(bits)} holds NaN or Inf")
        model.set_bits = types.MethodType(_set_bits, model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """``save_pretrained`` writes the same format again."""
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _set_bits(model: Any, bits: int | Mapping[str, int]) -> None:
    """``model.set_bits(3)`` or ``model.set_bits({layer: width})``; see ``matgptq.nested_linear.set_bits``."""
    set_bits(model, bits)


def replace_linears(model: Any, settings: Settings, headers: Mapping[str, TensorInfo]) -> None:
    """Put a ``NestedLinear`` in the place of every Linear that the settings do not ignore.

    Args:
        model: on the meta device, as transformers hands it over.
        settings: of the checkpoint.
        headers: stored tensors; empty skips the check against them (a state dict in memory).

    Raises:
        CheckpointError: architecture, settings and stored tensors do not agree. transformers itself would only warn
            of a missing tensor and fill it with random numbers.
    """
    prefix = f"{model.base_model_prefix}."
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    stored_layers: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for key, info in headers.items():
        layer, _, leaf = key.rpartition(".")
        stored_layers.setdefault(layer, {})[leaf] = (info.dtype, info.shape)
    replaced = set()
    for name, linear in linears.items():
        # A base model loaded from a causal one's checkpoint has names without the prefix.
        stored = name if not headers or f"{name}.{CODES}" in headers else prefix + name
        if name in settings.ignore or prefix + name in settings.ignore:
            continue
        if headers:
            check_layer(settings, stored, stored_layers.get(stored, {}), (linear.out_features, linear.in_features))
        model.set_submodule(
            name,
            NestedLinear(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                settings.group_size_of(stored, linear.in_features),
                settings.scale_bits,
                settings.bits,
                device=linear.weight.device,
                dtype=linear.weight.dtype,
            ),
        )
        replaced.add(stored)
    left_over = sorted(layer for layer, found in stored_layers.items() if CODES in found and layer not in replaced)
    if left_over:
        raise CheckpointError(
            f"layer {left_over[0]}: the checkpoint has codes for it, the architecture has no such layer"
        )


def register() -> None:
    """Make ``from_pretrained`` know ``quant_method: matgptq``; harmless when called again."""
    # Not `from transformers.quantizers import auto`: the package may still be halfway through its own import.
    quantizers_auto: Any = importlib.import_module("transformers.quantizers.auto")
    quantizers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = MatGPTQConfig
    quantizers_auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = MatGPTQQuantizer
    # transformers takes loading options only from the classes in this tuple; without it, asking for a width through
    # quantization_config=MatGPTQConfig(bits=3) would be ignored with a warning.
    known = quantizers_auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    if MatGPTQConfig not in known:
        quantizers_auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*known, MatGPTQConfig)
