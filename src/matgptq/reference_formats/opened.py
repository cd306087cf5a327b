"""What both formats are opened as, and how their tensors are matched with an architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from matgptq.errors import SourceError
from matgptq.files.tensor_names import is_derived, match_names
from matgptq.models.source import ModelSource
from matgptq.slicing import ZERO_POINT


@dataclass(frozen=True)
class ReferenceLayer:
    """One layer as the reference stores it.

    Attributes:
        codes: ``torch.uint8`` ``[out, in]``, one parent code per byte, columns in the order of ``order``.
        scales: floating ``[out, groups]``; group g serves the stored columns ``g * group_size`` and following.
        zeros: floating ``[out, groups]`` in units of codes, or None where the format has none (128 is meant).
        order: int64 ``[in]``, the model's column that each stored column belongs to, or None for the model's order.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    order: Tensor | None = None

    @property
    def group_size(self) -> int:
        """Stored columns that share a scale."""
        return int(self.codes.shape[1]) // int(self.scales.shape[1])

    def offset_zeros(self) -> bool:
        """Whether any zero point is another than the middle of the codes."""
        return self.zeros is not None and bool((self.zeros != ZERO_POINT).any())


@dataclass(frozen=True)
class Reference:
    """An opened model of the reference: names and shapes are checked, tensors are still on disk.

    Attributes:
        base: where configuration, side files and the tensors that are not quantized come from.
        model: the full-precision model, if given.
        recipe: record for the checkpoint.
        layers: ``(out_features, in_features)`` of the quantized layers.
        ignore: all other Linear layers.
        kept: ``{name in the model: name in base}`` of every tensor that is not quantized.
        weights: ``{layer: name in model}`` of the full-precision weights; empty without a model.
        default_bits: width that the reference serves.
        packed: whether this is the packed format, which stores neither zero points nor column orders.
        read: loads one layer.
        notes: for the user.
    """

    base: ModelSource
    model: ModelSource | None
    recipe: Mapping[str, Any]
    layers: Mapping[str, tuple[int, int]]
    ignore: tuple[str, ...]
    kept: Mapping[str, str]
    weights: Mapping[str, str]
    default_bits: int
    packed: bool
    read: Callable[[str], ReferenceLayer]
    notes: tuple[str, ...] = ()


def build_architecture(source: ModelSource) -> Any:
    """The model that a configuration describes, without memory for its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # what a configuration class makes of values that make no sense
        raise SourceError(f"{source.name}: transformers cannot build it: {error}") from error


def linear_shapes(network: Any) -> dict[str, tuple[int, int]]:
    """``(out_features, in_features)`` of every Linear, in the order of the model."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    }


def is_head(network: Any, name: str) -> bool:
    return network.get_submodule(name) is network.get_output_embeddings()


def check_untied(network: Any, layers: Iterable[str]) -> None:
    for name in layers:
        if f"{name}.weight" in network.all_tied_weights_keys:
            raise SourceError(f"layer {name}: is quantized, but config.json ties its weight to the embeddings")


def place_kept(source: ModelSource, network: Any, layers: Iterable[str], own: Iterable[str]) -> dict[str, str]:
    """Where in the model each stored tensor that is not quantized belongs.

    Args:
        source: of those tensors.
        network: the architecture.
        layers: quantized layers; a full-precision weight of theirs is not kept.
        own: tensors of the quantized layers.

    Raises:
        SourceError: a stored tensor has no place or another shape, or a tensor of the model is not stored.
    """
    state = network.state_dict()
    quantized = {f"{layer}.weight" for layer in layers}
    codes = set(own)
    kept: dict[str, str] = {}
    matched = match_names(network, source.tensors)
    for name, info in source.tensors.items():
        if name in codes:
            continue
        known = matched.get(name)
        if known is None and is_derived(name):
            continue
        if known is None or known in kept:
            raise SourceError(f"{source.name}: tensor {name} has no place in {type(network).__name__}")
        if info.shape != tuple(state[known].shape):
            raise SourceError(f"{source.name}: tensor {name} is {list(info.shape)}, must be {list(state[known].shape)}")
        kept[known] = name
    tied = set(network.all_tied_weights_keys)
    lost = [name for name in state if name not in kept and name not in quantized and name not in tied]
    if lost:
        raise SourceError(f"{source.name}: the files hold no {lost[0]} ({len(lost)} tensors are missing)")
    return {known: name for known, name in kept.items() if known not in quantized}


def full_weights(model: ModelSource | None, network: Any, layers: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Names of the full-precision weights of the quantized layers, checked for shape."""
    if model is None:
        return {}
    stored = {known: name for name, known in match_names(network, model.tensors).items()}
    weights = {}
    for layer, shape in layers.items():
        name = stored.get(f"{layer}.weight")
        if name is None:
            raise SourceError(f"layer {layer}: {model.name} has no {layer}.weight, so it is another model")
        if model.tensors[name].shape != shape:
            raise SourceError(f"layer {layer}: is {list(shape)}, but {list(model.tensors[name].shape)} in {model.name}")
        weights[layer] = name
    return weights
