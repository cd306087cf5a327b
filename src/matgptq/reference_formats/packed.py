"""The packed format: one model directory, codes one a byte, without zero points and column orders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matgptq.checkpoints.format import QUANT_METHOD
from matgptq.errors import ConfigurationError, SourceError
from matgptq.files.json_files import read_json
from matgptq.files.stored_tensors import read_headers, read_tensor
from matgptq.files.tensor_names import match_names
from matgptq.models.source import ModelSource
from matgptq.recipe import PER_CHANNEL
from matgptq.reference_formats.opened import (
    Reference,
    ReferenceLayer,
    build_architecture,
    check_untied,
    full_weights,
    linear_shapes,
    place_kept,
)
from matgptq.slicing import PARENT_BITS, WIDTHS

REFERENCE_METHOD = "matgptq_quant"
_CONFIG_FIELDS = {
    "quant_method",
    "group_size",
    "master_bitwidth",
    "inference_bitwidth",
    "modules_to_not_convert",
    "quant_dtype",
}


def open_packed(directory: Path, model: ModelSource | None, trust_remote_code: bool) -> Reference:
    """Read the configuration and the headers of a packed model and match them with its architecture."""
    config = read_json(directory / "config.json")
    where = str(directory / "config.json")
    record = config.pop("quantization_config", None)
    if not isinstance(record, dict):
        raise SourceError(f"{where}: quantization_config is no object")
    group_size, default_bits, excluded = _packed_settings(record, where)
    if group_size == PER_CHANNEL and model is None:
        raise ConfigurationError(
            f"{directory}: one scale per output row; the published code stores uninitialized memory in their place, "
            "so give --model, the full-precision model, to check them against"
        )
    base = ModelSource(str(directory), directory, None, config, read_headers(directory), trust_remote_code)
    network = build_architecture(base)
    stored_layers = [name.removesuffix(".qweight") for name in base.tensors if name.endswith(".qweight")]
    linears = linear_shapes(network)
    stored: dict[str, str] = {}
    matched = match_names(network, [f"{layer}.weight" for layer in stored_layers])
    for layer in stored_layers:
        weight = matched.get(f"{layer}.weight")
        if weight is None or weight.removesuffix(".weight") not in linears:
            raise SourceError(
                f"layer {layer}: has codes in {directory}, but {type(network).__name__} has no such Linear"
            )
        name = weight.removesuffix(".weight")
        if any(name.endswith(suffix) for suffix in excluded):
            raise SourceError(f"layer {name}: has codes, but modules_to_not_convert of {where} excludes it")
        _check_headers(base, layer, linears[name], group_size)
        stored[name] = layer
    if not stored:
        raise SourceError(f"{directory}: config.json says {REFERENCE_METHOD}, but no tensor in it is a .qweight")
    own = {f"{layer}.{leaf}" for layer in stored_layers for leaf in ("qweight", "scales")}
    notes = []
    unlisted = [
        name for name in linears if name not in stored and not any(name.endswith(suffix) for suffix in excluded)
    ]
    if unlisted:
        notes.append(
            f"{len(unlisted)} Linear layers such as {unlisted[0]} have no codes and stay at full precision, "
            "although modules_to_not_convert does not list them"
        )
    if model is None:
        notes.append(
            "scales are not compared with the full-precision weights (--model): zero points or a column order "
            "that packing left out would go unseen"
        )

    def read(name: str) -> ReferenceLayer:
        codes, scales = (f"{stored[name]}.{leaf}" for leaf in ("qweight", "scales"))
        return ReferenceLayer(read_tensor(base.tensors[codes]), read_tensor(base.tensors[scales]))

    layers = {name: linears[name] for name in stored}
    check_untied(network, layers)
    return Reference(
        base=base,
        model=model,
        recipe={"method": "reference", "format": "packed", "quantization_config": record},
        layers=layers,
        ignore=tuple(name for name in linears if name not in layers),
        kept=place_kept(base, network, layers, own),
        weights=full_weights(model, network, layers),
        default_bits=default_bits,
        packed=True,
        read=read,
        notes=tuple(notes),
    )


def _packed_settings(record: Mapping[str, Any], where: str) -> tuple[int, int, tuple[str, ...]]:
    """Group size (-1 for a whole row), default width and excluded name endings, validated."""
    method = record.get("quant_method")
    if method == QUANT_METHOD:
        raise SourceError(f"{where}: is a matgptq checkpoint already, there is nothing to import")
    if method != REFERENCE_METHOD:
        raise SourceError(f"{where}: quant_method is {method!r}, not {REFERENCE_METHOD!r}")
    unknown = sorted(set(record) - _CONFIG_FIELDS)
    if unknown:
        raise SourceError(
            f"{where}: quantization_config holds {unknown[0]}, whose meaning is not known here; "
            "remove it if the weights do not depend on it"
        )
    master = record.get("master_bitwidth", PARENT_BITS)
    if master != PARENT_BITS:
        raise SourceError(
            f"{where}: master_bitwidth is {master!r}; only {PARENT_BITS} is supported "
            "(the published code slices every model as if it were 8, so another one is wrong at all widths)"
        )
    bits = record.get("inference_bitwidth", PARENT_BITS)
    if bits not in WIDTHS:
        raise SourceError(f"{where}: inference_bitwidth must be one of {WIDTHS}, not {bits!r}")
    group_size = record.get("group_size")
    if group_size is None:
        group_size = PER_CHANNEL
    if isinstance(group_size, bool) or not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise SourceError(f"{where}: group_size must be a positive integer, -1 or null, not {group_size!r}")
    excluded = record.get("modules_to_not_convert") or []
    if not isinstance(excluded, list) or not all(isinstance(name, str) and name for name in excluded):
        raise SourceError(f"{where}: modules_to_not_convert must be a list of names, not {excluded!r}")
    return group_size, int(bits), tuple(excluded)


def _check_headers(base: ModelSource, layer: str, shape: tuple[int, int], group_size: int) -> None:
    """Check dtype and shape of a packed layer against the architecture and the configured group size."""
    codes = base.tensors[f"{layer}.qweight"]
    if codes.dtype != "U8" or codes.shape != shape:
        raise SourceError(f"layer {layer}: qweight is {codes.dtype} {list(codes.shape)}, must be U8 {list(shape)}")
    scales = base.tensors.get(f"{layer}.scales")
    if scales is None:
        raise SourceError(f"layer {layer}: has a qweight, but no scales")
    size = shape[1] if group_size == PER_CHANNEL else group_size
    if shape[1] % size:
        raise SourceError(f"layer {layer}: group_size {size} does not divide its {shape[1]} input features")
    wanted = (shape[0], shape[1] // size)
    if scales.dtype not in ("F16", "BF16", "F32") or scales.shape != wanted:
        raise SourceError(
            f"layer {layer}: scales are {scales.dtype} {list(scales.shape)}, must be floating {list(wanted)} "
            f"for group_size {group_size} of config.json"
        )
    if f"{layer}.weight" in base.tensors:
        raise SourceError(f"layer {layer}: has a qweight and a weight; which one counts is not known")
