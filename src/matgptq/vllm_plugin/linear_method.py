"""How vLLM's Linear layers hold and multiply slices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import GroupQuantScaleParameter, ModelWeightParameter

from matgptq.checkpoints.format import CODES, GUARD, SLICED_CODES, Settings
from matgptq.checkpoints.tensor_parallel import shard_obstacle
from matgptq.errors import ConfigurationError, UnsupportedModelError
from matgptq.native import Activations
from matgptq.vllm_plugin.choice import ServedLayer
from matgptq.vllm_plugin.fused_linear import FusedLinear, Part
from matgptq.vllm_plugin.parameters import SlicedCodes, guard, unread
from matgptq.vllm_plugin.stored_parts import all_scales, check_scales, codes_name, scales_of

_log = init_logger("vllm.matgptq")


@register_weight_loader_v2_supported_method
class ServedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """One of vLLM's Linear layers; each has a method of its own.

    Args:
        prefix: its name in vLLM's model.
        layers: the checkpoint's layers that are stacked in it, in order.
        settings: of the checkpoint.
        activations: as in ``matgptq.load``.
        sizes: tensor-parallel sizes that fit, or None if that is not known; for the error only.
    """

    def __init__(
        self,
        prefix: str,
        layers: Mapping[str, ServedLayer],
        settings: Settings,
        activations: Activations,
        sizes: list[int] | None,
    ) -> None:
        self.prefix = prefix
        self.layers = dict(layers)
        self.settings = settings
        self.activations: Activations = activations
        self.sizes = sizes
        self._rows: list[int] = []
        self._dtype = torch.bfloat16
        self._weight: FusedLinear
        self.scale_names = [scales_of(settings, bits) for bits, _ in layers.values()]

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make room for this rank's codes and for the scales that the chosen widths read.

        Raises:
            ConfigurationError: tensor parallelism would split a group.
            UnsupportedModelError: the layers stacked here have groups of several sizes, or vLLM stacks others than
                the checkpoint's.
        """
        sizes = {served.group_size for served in self.layers.values()}
        if len(sizes) > 1:
            raise UnsupportedModelError(
                f"{self.prefix}: vLLM stacks {', '.join(self.layers)}, whose group sizes differ: {sorted(sizes)}"
            )
        if len(self.layers) not in (1, len(output_partition_sizes)):
            raise UnsupportedModelError(
                f"{self.prefix}: vLLM stacks {len(output_partition_sizes)} layers, the checkpoint has "
                f"{', '.join(self.layers)}"
            )
        group_size = sizes.pop()
        ranks = input_size // input_size_per_partition
        obstacle = shard_obstacle(input_size, group_size, ranks) if ranks > 1 else None
        if obstacle is not None:
            fitting = f"; sizes that fit this checkpoint: {', '.join(map(str, self.sizes))}" if self.sizes else ""
            raise ConfigurationError(
                f"--tensor-parallel-size {ranks}: layer {next(iter(self.layers))}: {obstacle}{fitting}"
            )
        self._dtype = params_dtype
        self._rows = [sum(output_partition_sizes)] if len(self.layers) == 1 else list(output_partition_sizes)
        shape = sum(self._rows), input_size_per_partition
        common = {"input_dim": 1, "output_dim": 0, "weight_loader": extra_weight_attrs["weight_loader"]}
        codes = torch.empty(shape, dtype=torch.uint8)
        if self.settings.is_slice:
            layer.register_parameter(SLICED_CODES, SlicedCodes(in_features=input_size, data=codes, **common))
        else:
            layer.register_parameter(CODES, ModelWeightParameter(data=codes, **common))
        for name in all_scales(self.settings):
            if name in self.scale_names:
                scales = torch.full((shape[0], shape[1] // group_size), torch.nan, dtype=torch.float16)
                layer.register_parameter(name, GroupQuantScaleParameter(data=scales, **common))
            else:
                layer.register_parameter(name, unread(torch.float16))
        layer.register_parameter(GUARD, guard(params_dtype))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack the chosen slices for the kernels of the device and let go of the parent.

        Raises:
            CheckpointError: scales that are not finite, or were not in the files.
        """
        codes = getattr(layer, codes_name(self.settings))
        parts = []
        start = 0
        for (name, served), source, rows in zip(self.layers.items(), self.scale_names, self._rows, strict=True):
            scales = getattr(layer, source).data[start : start + rows]
            check_scales(f"layer {name}: {source}", scales)
            parts.append(Part(codes.data[start : start + rows], scales, served.bits))
            start += rows
        self._weight = FusedLinear(self.prefix, parts, self._dtype, self.activations)
        if self._weight.obstacle is not None:
            _log.warning_once("matgptq: slices are dequantized for every product: %s", self._weight.obstacle)
        for name in [name for name, _ in layer.named_parameters(recurse=False) if name not in (GUARD, "bias")]:
            delattr(layer, name)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ w^T + bias``."""
        return self._weight.product(x, bias)
