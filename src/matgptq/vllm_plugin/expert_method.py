"""How vLLM's experts hold and multiply slices: the matrices of all experts of a block are one layer of vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from matgptq.checkpoints.format import GUARD, Settings
from matgptq.checkpoints.tensor_parallel import shard_obstacle
from matgptq.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from matgptq.native import Activations
from matgptq.vllm_plugin.choice import ServedLayer
from matgptq.vllm_plugin.fused_experts import ExpertParts, FusedExperts
from matgptq.vllm_plugin.fused_linear import Part
from matgptq.vllm_plugin.stored_parts import all_scales, check_guard, check_scales, codes_name, scales_of, unpack_slice

_log = init_logger("vllm.matgptq")

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
}
_INNER, _DOWN = "w13", "w2"  # vLLM's names: gate and up projection in one tensor, the down projection


class ServedExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The experts of one of vLLM's blocks.

    Args:
        prefix: their name in vLLM's model.
        experts: vLLM's layer, which knows what the projections are called in files.
        layers: the checkpoint's layers, by vLLM's names.
        settings: of the checkpoint.
        activations: as in ``matgptq.load``.

    Raises:
        UnsupportedModelError: a way of running experts that is not served.
        CheckpointError: an expert's matrix that is not quantized beside others that are.
    """

    def __init__(
        self,
        prefix: str,
        experts: Any,
        layers: Mapping[str, ServedLayer],
        settings: Settings,
        activations: Activations,
    ) -> None:
        super().__init__(experts.moe_config)
        parallel = experts.moe_config.moe_parallel_config
        if parallel.use_ep or parallel.enable_eplb:
            raise UnsupportedModelError(
                f"{prefix}: the plugin does not spread experts over ranks; leave out --enable-expert-parallel, "
                "--tensor-parallel-size splits each of them"
            )
        activation = getattr(experts.activation, "value", str(experts.activation))
        if activation not in _ACTIVATIONS or experts.apply_router_weight_on_input or experts.moe_config.has_bias:
            raise UnsupportedModelError(
                f"{prefix}: experts with activation {activation!r}, biases or router weights on their input are not "
                "served by the plugin; use matgptq export --format compressed-tensors instead"
            )
        self.prefix = prefix
        self.settings = settings
        self.activations: Activations = activations
        self._activation = _ACTIVATIONS[activation]
        names = (experts.ckpt_gate_proj_name, experts.ckpt_up_proj_name, experts.ckpt_down_proj_name)
        self._served = [
            tuple(self._find(layers, f"{prefix}.{number}.{name}") for name in names)
            for number in range(experts.global_num_experts)
        ]
        widths = {each.bits for of_expert in self._served for each in of_expert}
        self._sources = {bits: scales_of(settings, bits) for bits in widths}
        self._rank = experts.moe_config.tp_rank
        self._width = 0  # this rank's share of the intermediate size
        self._dtype = torch.bfloat16
        self._weight: FusedExperts

    @staticmethod
    def _find(layers: Mapping[str, ServedLayer], name: str) -> ServedLayer:
        if name not in layers:
            raise CheckpointError(f"layer {name}: vLLM runs it with other experts, but it is not quantized")
        return layers[name]

    def _group_size(self, *projections: int) -> int:
        sizes = {of_expert[number].group_size for of_expert in self._served for number in projections}
        if len(sizes) > 1:
            raise UnsupportedModelError(
                f"{self.prefix}: vLLM runs these experts as one layer, but their group sizes differ: {sorted(sizes)}"
            )
        return sizes.pop()

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make room for this rank's codes and for the scales that the chosen widths read.

        Raises:
            ConfigurationError: tensor parallelism would split a group.
            UnsupportedModelError: the experts have groups of several sizes.
        """
        self._dtype, self._width = params_dtype, intermediate_size_per_partition
        inner_group, down_group = self._group_size(0, 1), self._group_size(2)
        ranks = self.moe.moe_parallel_config.tp_size
        if ranks > 1:
            obstacle = shard_obstacle(intermediate_size_per_partition * ranks, down_group, ranks)
            if obstacle is not None:
                raise ConfigurationError(f"--tensor-parallel-size {ranks}: {self.prefix}: {obstacle}")
        shapes = {
            _INNER: (num_experts, 2 * intermediate_size_per_partition, hidden_size, inner_group),
            _DOWN: (num_experts, hidden_size, intermediate_size_per_partition, down_group),
        }
        for stem, (count, rows, columns, group_size) in shapes.items():
            codes = torch.empty(count, rows, columns, dtype=torch.uint8)
            self._register(layer, f"{stem}_{codes_name(self.settings)}", codes, self._load_codes)
            for name in all_scales(self.settings):
                if name in self._sources.values():
                    scales = torch.full((count, rows, columns // group_size), torch.nan, dtype=torch.float16)
                    self._register(layer, f"{stem}_{name}", scales, self._load_scales)
                else:
                    self._register(layer, f"{stem}_{name}", torch.empty(0, dtype=torch.float16), self._forget)
            self._register(layer, f"{stem}_{GUARD}", torch.empty(0, dtype=params_dtype), self._check_guard)

    @staticmethod
    def _register(layer: Any, name: str, data: Tensor, load: Callable[..., bool]) -> None:
        parameter = nn.Parameter(data, requires_grad=False)
        parameter.weight_loader = load  # type: ignore[attr-defined]
        layer.register_parameter(name, parameter)

    def _load_codes(
        self, param: Tensor, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int, **_: Any
    ) -> bool:
        if self.settings.is_slice:
            # Unpacked before this rank's part is cut out, because a part need not begin at a byte.
            columns = param.shape[2] * (self.moe.moe_parallel_config.tp_size if shard_id == _DOWN else 1)
            loaded_weight = unpack_slice(loaded_weight, columns)
        return self._copy(param.data[expert_id], loaded_weight, weight_name, shard_id)

    def _load_scales(
        self, param: Tensor, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int, **_: Any
    ) -> bool:
        return self._copy(param.data[expert_id], loaded_weight, weight_name, shard_id)

    def _copy(self, target: Tensor, stored: Tensor, name: str, shard: str) -> bool:
        """This rank's part of an expert's tensor: rows of gate and up projection, columns of the down projection."""
        if shard == _DOWN:
            width = target.shape[1]
            part = stored[:, self._rank * width : (self._rank + 1) * width]
        else:
            first = 0 if shard == "w1" else self._width
            target = target[first : first + self._width]
            part = stored[self._rank * self._width : (self._rank + 1) * self._width]
        if part.shape != target.shape:
            raise CheckpointError(f"{name}: {list(stored.shape)} does not fit vLLM's {list(target.shape)}")
        target.copy_(part)
        return True

    @staticmethod
    def _forget(param: Tensor, loaded_weight: Tensor, **_: Any) -> bool:
        return True  # scales of widths that are not served

    @staticmethod
    def _check_guard(param: Tensor, loaded_weight: Tensor, weight_name: str, **_: Any) -> bool:
        check_guard(weight_name, loaded_weight)
        return True

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the chosen slices for the kernels of the device and let go of the parent.

        Raises:
            CheckpointError: scales that are not finite, or were not in the files.
        """
        experts = []
        for number, (gate, up, down) in enumerate(self._served):
            first, second = slice(0, self._width), slice(self._width, 2 * self._width)
            experts.append(
                ExpertParts(
                    self._part(layer, _INNER, number, first, gate),
                    self._part(layer, _INNER, number, second, up),
                    self._part(layer, _DOWN, number, slice(None), down),
                )
            )
        self._weight = FusedExperts(self.prefix, experts, self._activation, self._dtype, self.activations)
        if self._weight.obstacle is not None:
            _log.warning_once("matgptq: slices are dequantized for every product: %s", self._weight.obstacle)
        for name in [name for name, _ in layer.named_parameters(recurse=False) if not name.endswith(f"_{GUARD}")]:
            delattr(layer, name)

    def _part(self, layer: Any, stem: str, number: int, rows: slice, served: ServedLayer) -> Part:
        source = self._sources[served.bits]
        scales = getattr(layer, f"{stem}_{source}").data[number, rows]
        check_scales(f"{self.prefix}.{number}: {stem}_{source}", scales)
        codes = getattr(layer, f"{stem}_{codes_name(self.settings)}").data[number, rows]
        return Part(codes, scales, served.bits)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: vLLM's own kernels are not used."""
        return

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Weighted sum of what each token's experts make of it; shared experts are vLLM's to add."""
        return self._weight.product(x, topk_weights, topk_ids)
