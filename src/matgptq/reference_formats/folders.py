"""The folders of the quantizer: one ``<layer>/data.pt`` for each layer, a pickle that is read as tensors only."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matgptq.errors import ConfigurationError, SourceError
from matgptq.models.source import ModelSource
from matgptq.reference_formats.opened import (
    Reference,
    ReferenceLayer,
    build_architecture,
    check_untied,
    full_weights,
    is_head,
    linear_shapes,
    place_kept,
)
from matgptq.reference_formats.packed import REFERENCE_METHOD
from matgptq.slicing import PARENT_BITS

DATA_NAME = "data.pt"
_DATA_FIELDS = {"qweight", "scale", "zero", "perm"}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_NUMBERS = (*_FLOATS, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def open_folders(directory: Path, model: ModelSource | None) -> Reference:
    """Find the ``data.pt`` files and match the layers that they name with the full-precision model."""
    root = _find_root(directory)
    if model is None:
        raise ConfigurationError(
            f"{directory}: folders of {DATA_NAME} hold the quantized layers alone; "
            "give --model, the full-precision model they were made from"
        )
    network = build_architecture(model)
    linears = linear_shapes(network)
    folders = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    found = [name for name in folders if (root / name / DATA_NAME).is_file()]
    unknown = [name for name in found if name not in linears]
    if unknown:
        raise SourceError(f"layer {unknown[0]}: is in {root}, but {model.name} has no such Linear")
    empty = [name for name in folders if name in linears and name not in found]
    if empty:
        raise SourceError(f"layer {empty[0]}: {root / empty[0]} holds no {DATA_NAME}; was the run interrupted?")
    layers = {name: shape for name, shape in linears.items() if name in found}
    check_untied(network, layers)
    missing = _missing_siblings(layers, linears)
    if missing:
        raise SourceError(
            f"layer {missing[0]}: {root} has no {DATA_NAME} for it ({len(missing)} layers are missing), but has one "
            "for the same layer of other blocks; was the run interrupted?"
        )
    notes = []
    left_out = [name for name in linears if name not in layers and not is_head(network, name)]
    if left_out:
        notes.append(f"{len(left_out)} Linear layers such as {left_out[0]} were not quantized, stay at full precision")
    return Reference(
        base=model,
        model=model,
        recipe={"method": "reference", "format": "folders"},
        layers=layers,
        ignore=tuple(name for name in linears if name not in layers),
        kept=place_kept(model, network, layers, own=()),
        weights=full_weights(model, network, layers),
        default_bits=PARENT_BITS,
        packed=False,
        read=lambda name: read_data(root / name / DATA_NAME, name, layers[name]),
        notes=tuple(notes),
    )


def _find_root(directory: Path) -> Path:
    """The folder whose subfolders are layers: the given one, or the only such folder in it."""
    if any(directory.glob(f"*/{DATA_NAME}")):
        return directory
    roots = sorted({file.parent.parent for file in directory.glob(f"*/*/{DATA_NAME}")})
    if len(roots) > 1:
        names = ", ".join(root.name for root in roots)
        raise SourceError(f"{directory}: holds several models, name the folder of one of them: {names}")
    if not roots:
        plain = [file for depth in ("*", "*/*") for file in directory.glob(f"{depth}/[2-8].pt")]
        if plain:
            raise SourceError(
                f"{plain[0]}: the plain GPTQ output of the published code holds no codes, only weights that were "
                "multiplied out; it cannot be imported"
            )
        raise SourceError(
            f"{directory}: neither a packed model (config.json with quant_method {REFERENCE_METHOD}) "
            f"nor folders of {DATA_NAME}"
        )
    return roots[0]


def _missing_siblings(layers: Iterable[str], linears: Iterable[str]) -> list[str]:
    """Layers without data although the layer of the same name in another block has some."""

    def kind(name: str) -> str:
        return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)

    present = set(layers)
    kinds = {kind(name) for name in present}
    return [name for name in linears if name not in present and kind(name) in kinds]


def read_data(file: Path, layer: str, shape: tuple[int, int]) -> ReferenceLayer:
    """Load one ``data.pt`` as tensors only and check what it holds."""
    try:
        data = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle fails in any way, none of which may run its code
        raise SourceError(
            f"layer {layer}: {file} is damaged, or holds more than plain tensors and was not unpickled "
            f"({type(error).__name__})"
        ) from None
    if not isinstance(data, dict):
        raise SourceError(f"layer {layer}: {file} holds a {type(data).__name__}, not a dict of tensors")
    missing = sorted(_DATA_FIELDS - set(data))
    unknown = sorted(str(key) for key in set(data) - _DATA_FIELDS)
    if missing or unknown:
        problem = f"lacks {missing[0]}" if missing else f"holds {unknown[0]}, whose meaning is not known here"
        raise SourceError(f"layer {layer}: {file} {problem}")
    for key, value in data.items():
        if not (key == "perm" and value is None) and not _is_plain(value):
            raise SourceError(f"layer {layer}: {key} in {file} is not a plain tensor")
    codes, scales, zeros, order = (data[key] for key in ("qweight", "scale", "zero", "perm"))
    if codes.dtype != torch.uint8 or tuple(codes.shape) != shape:
        raise SourceError(
            f"layer {layer}: qweight is {codes.dtype} {list(codes.shape)}, must be torch.uint8 {list(shape)}"
        )
    if scales.dtype not in _FLOATS or scales.dim() != 2 or len(scales) != shape[0] or scales.shape[1] == 0:
        raise SourceError(
            f"layer {layer}: scale is {scales.dtype} {list(scales.shape)}, must be floating [{shape[0]}, groups]"
        )
    if shape[1] % scales.shape[1]:
        raise SourceError(f"layer {layer}: {shape[1]} input features do not split into {scales.shape[1]} groups")
    if zeros.dtype not in _NUMBERS or zeros.shape != scales.shape:
        raise SourceError(
            f"layer {layer}: zero is {zeros.dtype} {list(zeros.shape)}, must be numbers {list(scales.shape)} as scale"
        )
    if order is not None:
        in_features = torch.arange(shape[1])
        if order.dtype != torch.int64 or order.dim() != 1 or not torch.equal(order.sort().values, in_features):
            raise SourceError(f"layer {layer}: perm is not a permutation of its {shape[1]} input features")
    return ReferenceLayer(codes, scales, zeros, order)


def _is_plain(value: Any) -> bool:
    return type(value) is Tensor and value.layout == torch.strided and value.device.type == "cpu"
