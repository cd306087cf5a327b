"""What is exported, and what every format does with it."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from matgptq.checkpoints.checkpoint import Checkpoint
from matgptq.checkpoints.format import CODES, GUARD, scales_name
from matgptq.checkpoints.stored_layers import read_layer
from matgptq.checkpoints.writer import CheckpointWriter
from matgptq.core.finiteness import all_finite
from matgptq.errors import ExportError
from matgptq.files.stored_tensors import read_tensor
from matgptq.models.families import Family, known_family
from matgptq.nested_weight import NestedWeight
from matgptq.sliced_weight import SlicedWeight, cut

# What Marlin takes, the kernel that stock vLLM runs 4- and 8-bit weights with; whole rows besides.
KERNEL_GROUP_SIZES = (32, 64, 128)
WHOLE_ROW = -1


@dataclass(frozen=True)
class Target:
    """One slice of a checkpoint.

    Attributes:
        checkpoint: the parent.
        widths: of every quantized layer.
        dtype: of dense weights, and the one that ``config.json`` of the export names.
        own_scales: ``{layer: [out, groups]}`` of an allocation that has scales of its own.
    """

    checkpoint: Checkpoint
    widths: Mapping[str, int]
    dtype: torch.dtype
    own_scales: Mapping[str, Tensor] | None = None

    @property
    def uniform_bits(self) -> int | None:
        """The width of all layers, or None if there are several."""
        widths = set(self.widths.values())
        return widths.pop() if len(widths) == 1 else None

    @cached_property
    def model_config(self) -> Any:
        """The architecture's configuration, with the defaults that ``config.json`` leaves out."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.checkpoint.path)
        del config.quantization_config
        return config

    @property
    def config(self) -> dict[str, Any]:
        """``config.json`` of the export, still without ``quantization_config``."""
        config = copy.deepcopy(dict(self.checkpoint.config))
        config.pop("quantization_config")
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        return config | {key: str(self.dtype).removeprefix("torch.")}

    @cached_property
    def family(self) -> Family | None:
        """The architecture, unless it is unknown."""
        return known_family(self.checkpoint.config.get("model_type"))

    @property
    def fused(self) -> list[tuple[str, ...]]:
        """Groups of layers that engines fuse into one matrix: those that share an input."""
        return [] if self.family is None else self.family.shared_inputs(self._linears)

    @property
    def expert_groups(self) -> list[tuple[str, ...]]:
        """The layers of all experts of each block, which engines run with one kernel."""
        return [] if self.family is None else [*self.family.expert_groups(self._linears).values()]

    @property
    def kept_layers(self) -> list[str]:
        """Layers that engines could take for quantized ones: Linears at full precision, and routers."""
        routers = [] if self.family is None else self.family.routers(self._linears)
        return [*self.checkpoint.settings.ignore, *routers]

    @property
    def _linears(self) -> list[str]:
        return [*self.checkpoint.layers, *self.checkpoint.settings.ignore]

    def read(self, layer: str) -> SlicedWeight:
        """The slice of one layer."""
        weight = read_layer(layer, self.checkpoint.tensors, self.checkpoint.settings.scale_bits)
        bits = self.widths[layer]
        if self.own_scales is not None:
            weight = NestedWeight(weight.codes, {**weight.scales, bits: self.own_scales[layer]})
        sliced = cut(weight, bits)
        if not all_finite(sliced.scales) or bool((sliced.scales == 0).any()):
            raise ExportError(f"layer {layer}: a scale is zero, NaN or Inf; the checkpoint is damaged")
        return sliced

    def parts(self) -> Iterator[tuple[str, bool]]:
        """The checkpoint in the order of its files: ``(layer, True)``, ``(name of another tensor, False)``."""
        own = {CODES, GUARD, *map(scales_name, self.checkpoint.settings.scale_bits)}
        for name in self.checkpoint.tensors:
            layer, _, leaf = name.rpartition(".")
            if layer not in self.checkpoint.layers or leaf not in own:
                yield name, False
            elif leaf == CODES:
                yield layer, True

    def read_kept(self, name: str) -> Tensor:
        """A tensor that is not quantized, as stored."""
        return read_tensor(self.checkpoint.tensors[name])


class Export(ABC):
    """A format with a target that it can hold: what it cannot hold, ``__init__`` refuses.

    Attributes:
        target: what is exported.
        notes: what the user should know about the output.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.notes: list[str] = []

    @abstractmethod
    def write(self, writer: CheckpointWriter, advance: Callable[[], None]) -> None:
        """Write everything but the side files into a directory.

        Args:
            writer: of that directory.
            advance: is called after each quantized layer.
        """


class SafetensorsExport(Export):
    """A Hugging Face model directory whose quantized layers are tensors of another kind."""

    def write(self, writer: CheckpointWriter, advance: Callable[[], None]) -> None:
        for name, quantized in self.target.parts():
            if quantized:
                for leaf, tensor in self.layer_tensors(name, self.target.read(name)).items():
                    writer.add(f"{name}.{leaf}", tensor)
                advance()
            else:
                writer.add(name, self.target.read_kept(name))
        record = self.quantization_config()
        writer.write_json("config.json", self.target.config | ({"quantization_config": record} if record else {}))

    @abstractmethod
    def layer_tensors(self, layer: str, weight: SlicedWeight) -> dict[str, Tensor]:
        """What stands for a layer's weight: ``{name inside the layer: tensor}``."""

    @abstractmethod
    def quantization_config(self) -> dict[str, Any] | None:
        """The record in ``config.json`` that tells engines how to read it."""


def check_fused(target: Target) -> None:
    """Refuse layers that engines fuse into one matrix but that differ in width or group size.

    Raises:
        ExportError: names the layers and the formats that hold them.
    """
    layers = target.checkpoint.layers
    for group in target.fused:
        kinds = {name: (target.widths[name], layers[name].group_size) if name in layers else None for name in group}
        if len(set(kinds.values())) > 1:
            shown = ", ".join(
                f"{name} {'is not quantized' if kind is None else f'has {kind[0]} bits in groups of {kind[1]}'}"
                for name, kind in kinds.items()
            )
            raise ExportError(
                f"engines fuse these layers and need them alike: {shown}. Give them one width "
                "(search with its default --fuse), or export gguf, matgptq-slice or dense, which hold any mixture"
            )
    for group in target.expert_groups:
        widths = {target.widths.get(name) for name in group}
        if len(widths) > 1:
            first = {width: name for name, width in ((name, target.widths.get(name)) for name in reversed(group))}
            shown = ", ".join(
                f"{name} {'is not quantized' if width is None else f'has {width} bits'}"
                for width, name in first.items()
            )
            raise ExportError(
                f"engines run all experts of a block with one kernel and need them at one width: {shown}. Give them "
                "one (search with its default --fuse), or export matgptq-slice or dense, which hold any mixture"
            )


def kernel_group_size(layer: str, sizes: Iterable[int]) -> int:
    """The largest group size that engines have kernels for and that divides all of ``sizes``.

    Groups are cut by repeating their scales, which changes no weight.

    Raises:
        ExportError: none does; ``layer`` is named.
    """
    common = math.gcd(*sizes)
    for size in reversed(KERNEL_GROUP_SIZES):
        if common % size == 0:
            return size
    raise ExportError(
        f"{layer}: groups of {common} columns; engines have kernels for {', '.join(map(str, KERNEL_GROUP_SIZES))} and "
        "whole rows. Quantize with such a --group-size, or export matgptq-slice or dense"
    )


def check_packable(target: Target, *, rows: bool = False) -> None:
    """Refuse layers whose columns (or rows) do not fill 32-bit words.

    Raises:
        ExportError: names the layer.
    """
    for name, info in target.checkpoint.layers.items():
        for what, count in (("input", info.in_features), ("output", info.out_features if rows else 0)):
            if count % 32:
                raise ExportError(
                    f"layer {name}: {count} {what} features are not a multiple of 32, which this format packs "
                    "together; export matgptq-slice or dense"
                )


def check_untied(target: Target) -> None:
    """Refuse an output head that is quantized while the model ties it to the embedding, which would replace it.

    Raises:
        ExportError: names the head.
    """
    if "lm_head" in target.checkpoint.layers and target.model_config.tie_word_embeddings:
        raise ExportError(
            "lm_head is quantized, but config.json ties it to the embedding, which engines would then use; "
            "set tie_word_embeddings to false there"
        )
