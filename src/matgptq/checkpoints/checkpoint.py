"""Checkpoints are opened with every header checked; tensors stay on disk."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from matgptq.checkpoints.format import (
    CODES,
    QUANT_METHOD,
    SLICE_METHOD,
    SLICED_CODES,
    SLICED_SCALES,
    Settings,
    check_layer,
    is_own,
    parse_settings,
    scales_name,
)
from matgptq.checkpoints.stored_layers import parts_of_layers
from matgptq.errors import AllocationError, CheckpointError, SourceError
from matgptq.files.json_files import read_json
from matgptq.files.stored_tensors import TensorInfo, read_headers
from matgptq.models.model_config import stored_dtype
from matgptq.nested_weight import layer_bits, scale_source
from matgptq.slicing import PARENT_BITS, WIDTHS


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory's ``config.json`` claims to be one of ours."""
    try:
        config = read_json(directory / "config.json")
    except SourceError:
        return False
    record = config.get("quantization_config")
    return isinstance(record, dict) and record.get("quant_method") in (QUANT_METHOD, SLICE_METHOD)


@dataclass(frozen=True)
class LayerInfo:
    """Shape of a quantized layer in a checkpoint."""

    out_features: int
    in_features: int
    group_size: int


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; tensors stay on disk.

    Attributes:
        path: its directory.
        config: parsed ``config.json``.
        settings: its ``quantization_config``.
        tensors: headers of all stored tensors.
        layers: the quantized layers in the order of the files.
    """

    path: Path
    config: Mapping[str, Any]
    settings: Settings
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    layers: Mapping[str, LayerInfo] = field(repr=False)

    @property
    def widths_held(self) -> tuple[int | dict[str, int], ...]:
        """What can be served: every width of a parent, the one width or allocation of a slice."""
        if not self.settings.is_slice:
            return WIDTHS
        held = {layer: self.settings.bits_of(layer) for layer in self.layers}
        return (next(iter(held.values())) if len(set(held.values())) == 1 else held,)

    @property
    def stored_dtype(self) -> str | None:
        """The dtype that ``config.json`` names for what is not quantized, if it names one."""
        return stored_dtype(self.config)

    @property
    def quantized_weights(self) -> int:
        """Number of weights that have codes."""
        return sum(layer.out_features * layer.in_features for layer in self.layers.values())

    @property
    def other_bytes(self) -> int:
        """Bytes of everything that is not codes or scales: embeddings, norms, biases, head."""
        names = (CODES, SLICED_CODES, SLICED_SCALES, *map(scales_name, self.settings.scale_bits))
        own = {f"{layer}.{name}" for layer in self.layers for name in names}
        return sum(info.bytes for name, info in self.tensors.items() if name not in own)

    @functools.cached_property
    def identity(self) -> str:
        """16 hexadecimal digits that another quantization of the same model does not share.

        A hash of names, shapes and the first row of the codes and of every set of scales of each layer: a few
        megabytes to read at most. How the tensors are spread over files makes no difference, nor the default width.
        """
        names = (CODES, SLICED_CODES, SLICED_SCALES, *map(scales_name, self.settings.scale_bits))
        return self._digest(names, names)

    @functools.cached_property
    def codes_identity(self) -> str:
        """As ``identity``, of codes and group sizes alone: what widths are chosen for, however scales are tuned."""
        codes = (CODES, SLICED_CODES)
        return self._digest((*codes, scales_name(PARENT_BITS), SLICED_SCALES), codes)

    def width_identity(self, bits: int) -> str:
        """As ``identity``, of what serving a width reads: its codes and scales, however those of others are tuned."""
        if self.settings.is_slice:
            return self.identity
        names = (CODES, scales_name(scale_source(self.settings.scale_bits)[bits]))
        return self._digest(names, names)

    @property
    def allocation_identities(self) -> tuple[str, str]:
        """What allocations for this checkpoint may name: its codes, or, in those of earlier releases, all of it."""
        return self.codes_identity, self.identity

    def _digest(self, described: Iterable[str], read: Collection[str]) -> str:
        """16 hexadecimal digits of names and shapes of each layer's tensors, and of the first row of some of them."""
        own = sorted({f"{layer}.{name}" for layer in self.layers for name in described} & set(self.tensors))
        digest = hashlib.sha256()
        with ExitStack() as stack:
            files = {info.file for info in map(self.tensors.__getitem__, own)}
            handles = {file: stack.enter_context(safe_open(file, "pt")) for file in files}
            for name in own:
                info = self.tensors[name]
                digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
                if name.rpartition(".")[2] in read:
                    row = handles[info.file].get_slice(name)[:1].contiguous().view(torch.uint8)
                    digest.update(row.numpy().tobytes())
        return digest.hexdigest()[:16]

    def widths(self, bits: int | Mapping[str, int]) -> dict[str, int]:
        """Width of each layer for a uniform width or an allocation (which must name every layer).

        Raises:
            AllocationError: a layer is unknown, or has no width.
        """
        if isinstance(bits, int):
            return dict.fromkeys(self.layers, bits)
        unknown = sorted(set(bits) - set(self.layers))
        lost = [layer for layer in self.layers if layer not in bits]
        if unknown or lost:
            problem = f"unknown layer {unknown[0]}" if unknown else f"no width for layer {lost[0]}"
            raise AllocationError(f"allocation: {problem}")
        return dict(bits)

    def served_bits(self, bits: int | Mapping[str, int]) -> int:
        """Bits of codes and scales that serving reads at a width or an allocation."""
        return sum(
            layer_bits(layer.out_features, layer.in_features, layer.group_size, width)
            for layer, width in ((self.layers[name], width) for name, width in self.widths(bits).items())
        )

    def bits_per_weight(self, bits: int | Mapping[str, int]) -> float:
        """Average bits per quantized weight, all scales that are read included."""
        return self.served_bits(bits) / self.quantized_weights

    def average_bits(self, bits: int | Mapping[str, int]) -> float:
        """Width of the codes, for an allocation the average over the weights; an int if it is the same everywhere."""
        if isinstance(bits, int):
            return bits
        sizes = {name: layer.out_features * layer.in_features for name, layer in self.layers.items()}
        return sum(size * bits[name] for name, size in sizes.items()) / self.quantized_weights

    def served_bytes(self, bits: int | Mapping[str, int]) -> int:
        """Size of the whole model as served: codes at their width, their scales, and every other tensor."""
        return (self.served_bits(bits) + 7) // 8 + self.other_bytes


def open_checkpoint(path: str | Path, *, slices: bool = False) -> Checkpoint:
    """Open a checkpoint directory, reading and checking headers only.

    Args:
        path: the directory.
        slices: open a slice that was exported from a parent, too. Its layers have no parent codes.

    Raises:
        CheckpointError: not a matgptq checkpoint, a slice that was not asked for, another format version, damaged
            files, or tensors that do not match ``config.json``; the message names the file or the layer.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: not a checkpoint directory (no config.json)")
    try:
        config = read_json(path / "config.json")
        record = config.get("quantization_config")
        if not isinstance(record, dict):
            raise CheckpointError(f"{path / 'config.json'}: no quantization_config, so not a {QUANT_METHOD} checkpoint")
        settings = parse_settings(record, str(path / "config.json"))
        if settings.is_slice and not slices:
            raise CheckpointError(f"{path}: holds one slice only; this needs the checkpoint that it was exported from")
        tensors = read_headers(path, exact=True)
    except SourceError as error:
        raise CheckpointError(str(error)) from error
    blocks = config.get("num_hidden_layers")
    if isinstance(blocks, int) and blocks > len(tensors):  # it would take for ever to build them before this is seen
        raise CheckpointError(
            f"{path / 'config.json'}: num_hidden_layers is {blocks}, but the files hold only {len(tensors)} tensors"
        )
    found = {layer: parts for layer, parts in parts_of_layers(tensors).items() if any(map(is_own, parts))}
    if not found:
        raise CheckpointError(f"{path}: config.json says {QUANT_METHOD}, but no tensor in it holds codes")
    layers = {}
    for layer, parts in found.items():
        check_layer(settings, layer, parts, None)
        if settings.is_slice:
            out_features, groups = parts[SLICED_SCALES][1]
            in_features = groups * settings.group_size_of(layer, 0)
        else:
            out_features, in_features = parts[CODES][1]
        layers[layer] = LayerInfo(out_features, in_features, settings.group_size_of(layer, in_features))
    unknown = sorted(({*settings.layer_group_sizes, *(settings.layer_bits or {})}) - set(layers))
    if unknown:
        raise CheckpointError(f"{path}: config.json names layer {unknown[0]}, which has no codes")
    return Checkpoint(path, config, settings, tensors, layers)
