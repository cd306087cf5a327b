"""Our checkpoints as one of vLLM's quantization methods.

vLLM makes the configuration in the process that parses the command line and sends it, pickled, to those that run the
model. Everything that can be refused is refused here, from headers alone, before any of them starts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from matgptq.checkpoints.checkpoint import Checkpoint, open_checkpoint
from matgptq.checkpoints.format import QUANT_METHOD, Settings
from matgptq.checkpoints.tensor_parallel import fitting_sizes
from matgptq.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from matgptq.vllm_plugin.choice import Choice, ServedLayer, chosen_layers, held_layers, read_choice
from matgptq.vllm_plugin.vllm_version import check_version

_log = init_logger("vllm.matgptq")


class ServedConfig(QuantizationConfig):  # type: ignore[misc]
    """What is served: the widths chosen at start, and the settings of the checkpoint.

    Args:
        choice: what was asked for.

    Attributes:
        layers: what is served of each layer, by vLLM's names; empty until ``maybe_update_config`` has seen the
            checkpoint.
        settings: of the checkpoint.
        ignore: Linear layers that the checkpoint leaves at full precision.
        plain: whatever has a matrix at full precision, routers among them.
        sizes: tensor-parallel sizes that fit; None for an architecture that ``matgptq.models.families`` does not know.
    """

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.choice = choice
        self.layers: dict[str, ServedLayer] = {}
        self.settings: Settings | None = None
        self.ignore: list[str] = []
        self.plain: list[str] = []
        self.sizes: list[int] | None = None

    def __repr__(self) -> str:
        return f"matgptq({self.choice})"

    def get_name(self) -> str:
        """As ``quant_method`` in ``config.json``."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Fastest first; the native CPU kernels do not compute in float16."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any device: where no kernel runs, PyTorch multiplies."""
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ServedConfig:
        """From ``quantization_config``, or from what ``--hf-overrides`` put in its place, and the environment.

        Raises:
            ConfigurationError: vLLM is too old, or a wish makes no sense.
        """
        check_version()
        return cls(read_choice(config, os.environ))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Open the checkpoint and settle the width of every layer.

        Raises:
            CheckpointError: damaged files, or tensors that are not those of the architecture.
            AllocationError: a width or allocation that it does not hold.
        """
        checkpoint = open_checkpoint(_directory(model_name, revision), slices=True)
        self.settings = checkpoint.settings
        self.ignore = list(checkpoint.settings.ignore)
        self.layers = chosen_layers(self.choice, checkpoint)
        self.plain = [
            name.removesuffix(".weight")
            for name, info in checkpoint.tensors.items()
            if name.endswith(".weight") and len(info.shape) == 2
        ]
        _check_architecture(checkpoint)
        _log.info(
            "matgptq: serving %s at %s", checkpoint.path, describe([layer.bits for layer in self.layers.values()])
        )
        try:
            self.sizes = fitting_sizes(checkpoint.config, checkpoint.layers)
        except UnsupportedModelError:
            self.sizes = None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take over the names of a model that vLLM builds differently."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)
        self.ignore = hf_to_vllm_mapper.apply_list(self.ignore)
        self.plain = hf_to_vllm_mapper.apply_list(self.plain)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """How a layer is computed; None for vLLM's own way.

        Raises:
            UnsupportedModelError: a layer that the checkpoint quantizes, and we cannot serve in vLLM.
            CheckpointError: a Linear layer that the checkpoint neither holds nor leaves out on purpose.
        """
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from matgptq.vllm_plugin.linear_method import ServedLinearMethod

        if self.settings is None:
            raise ConfigurationError(
                "vLLM did not show the checkpoint to the plugin; this release of vLLM is not known"
            )
        layers = held_layers(prefix, self.packed_modules_mapping, self.layers, {*self.ignore, *self.plain})
        if not isinstance(layer, LinearBase):
            kind = type(layer).__name__
            inside = any(name.startswith(f"{prefix}.") for name in self.layers) and "Attention" not in kind
            if inside and kind == "RoutedExperts":
                from matgptq.vllm_plugin.expert_method import ServedExpertsMethod

                return ServedExpertsMethod(prefix, layer, self.layers, self.settings, self.choice.activations)
            if layers or inside:
                raise UnsupportedModelError(f"{prefix}: vLLM builds it as {kind}, which the plugin cannot serve")
            return None
        if layers is None:
            raise CheckpointError(
                f"layer {prefix}: vLLM's model has it, the checkpoint has no codes for it and does not list it under "
                "ignore"
            )
        if not layers:
            return UnquantizedLinearMethod()
        return ServedLinearMethod(prefix, layers, self.settings, self.choice.activations, self.sizes)


def _directory(model: str, revision: str | None) -> Path:
    """Where the files of a model are, downloaded if it is on the hub and was not yet."""
    if Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, allow_patterns=["*.json", "*.safetensors"]))


def _check_architecture(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose tensors are not those of its architecture.

    vLLM leaves a tensor of a quantized model as it was allocated if the files lack it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from matgptq.inference.transformers_integration import replace_linears

    config = AutoConfig.from_pretrained(checkpoint.path)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return  # vLLM's own architecture; it has no other description that we could compare with
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    try:
        replace_linears(model, checkpoint.settings, checkpoint.tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def describe(widths: Sequence[int]) -> str:
    """``3 bits``, or how many layers have which width."""
    counts = {bits: widths.count(bits) for bits in sorted(set(widths))}
    if len(counts) == 1:
        return f"{next(iter(counts))} bits"
    return "an allocation: " + ", ".join(f"{count} layers at {bits} bits" for bits, count in counts.items())
