"""The checkpoint format as data: names of tensors, the ``quantization_config`` record and its validation.

``docs/format.md`` is the specification; this file is its only reading in code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from matgptq.bit_stream import row_bytes
from matgptq.errors import CheckpointError, ConfigurationError
from matgptq.nested_weight import scale_source
from matgptq.slicing import PARENT_BITS, check_bits, check_widths

QUANT_METHOD = "matgptq"
SLICE_METHOD = "matgptq-slice"
FORMAT_VERSION = 1
CODES = "codes"
GUARD = "weight"
SCALE_DTYPE = "F16"
SLICED_CODES = "sliced_codes"
SLICED_SCALES = "sliced_scales"

# Files of a checkpoint's directory, or of an export's.
REPORT_NAME = "report.json"
RECORD_NAME = "evaluation.json"
CARD_NAME = "README.md"
CARD_MARK = "<!-- matgptq: "  # of the part of the card that is ours
EXPORT_NAME = "matgptq_export.json"  # in the directory of an export: what it is

# What is stored of one layer: {name inside the layer: (safetensors dtype, shape)}.
Parts = Mapping[str, tuple[str, tuple[int, ...]]]


def scales_name(bits: int) -> str:
    """Name of the scales tensor of a width, inside its layer."""
    return f"scales_{bits}"


@dataclass(frozen=True)
class Settings:
    """The ``quantization_config`` of a checkpoint.

    Attributes:
        bits: width that loaders serve when nothing else is asked for. The only place that names it.
        target_bits: widths that the solver optimised.
        scale_bits: widths that have scales of their own in the file, 8 among them.
        group_size: input columns per scale.
        layer_group_sizes: layers with another one.
        ignore: Linear layers of the model that are not quantized; every other Linear is.
        recipe: how the checkpoint was made; a record, read by nothing.
        calibration: with what text; a record.
        source: the full-precision model it was made from; ``eval`` compares with it unless told otherwise.
        refinement: ``{width: how its scales were tuned afterwards}``; a record.
        layer_bits: of a slice, which holds one width of each layer: the layers whose width is not ``bits``. None for
            a parent, which holds them all. A slice has neither ``target_bits`` nor ``scale_bits``.
    """

    bits: int
    target_bits: tuple[int, ...]
    scale_bits: tuple[int, ...]
    group_size: int
    layer_group_sizes: Mapping[str, int] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    refinement: Mapping[str, Any] = field(default_factory=dict)
    layer_bits: Mapping[str, int] | None = None

    @property
    def is_slice(self) -> bool:
        """Whether the files hold one slice instead of a parent."""
        return self.layer_bits is not None

    def bits_of(self, layer: str) -> int:
        """The width of a layer that is served when nothing else is asked for; of a slice, the only one."""
        return (self.layer_bits or {}).get(layer, self.bits)

    def group_size_of(self, layer: str, in_features: int) -> int:
        """Group size of a layer; -1 in the record stands for all its input features."""
        size = self.layer_group_sizes.get(layer, self.group_size)
        return in_features if size == -1 else size

    def to_dict(self) -> dict[str, Any]:
        """The record as ``config.json`` holds it."""
        kind: dict[str, Any]
        if self.layer_bits is not None:
            kind = {
                "quant_method": SLICE_METHOD,
                "format_version": FORMAT_VERSION,
                "bits": self.bits,
                "layer_bits": dict(self.layer_bits),
            }
        else:
            kind = {
                "quant_method": QUANT_METHOD,
                "format_version": FORMAT_VERSION,
                "parent_bits": PARENT_BITS,
                "bits": self.bits,
                "target_bits": list(self.target_bits),
                "scale_bits": list(self.scale_bits),
                "scale_source": {str(bits): own for bits, own in scale_source(self.scale_bits).items()},
            }
        return kind | {
            "group_size": self.group_size,
            "layer_group_sizes": dict(self.layer_group_sizes),
            "ignore": list(self.ignore),
            "recipe": dict(self.recipe),
            "calibration": dict(self.calibration),
            "source": self.source,
            "refinement": dict(self.refinement),
        }


def parse_settings(record: Mapping[str, Any], where: str) -> Settings:
    """Validate a ``quantization_config`` record.

    Args:
        record: parsed JSON.
        where: named in errors, usually the path of ``config.json``.

    Raises:
        CheckpointError: another method or format version, or a field that is missing or makes no sense.
    """
    method = record.get("quant_method")
    if method not in (QUANT_METHOD, SLICE_METHOD):
        raise CheckpointError(f"{where}: quant_method is {method!r}, not {QUANT_METHOD!r}")
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version {version!r}; this release reads version {FORMAT_VERSION}. "
            "Install a matgptq release that knows it, or quantize the model again"
        )
    is_slice = method == SLICE_METHOD
    if not is_slice and record.get("parent_bits") != PARENT_BITS:
        raise CheckpointError(f"{where}: parent_bits must be {PARENT_BITS}, not {record.get('parent_bits')!r}")
    try:
        settings = Settings(
            bits=check_bits(record.get("bits", None if is_slice else PARENT_BITS)),
            target_bits=() if is_slice else check_widths(_integers(record, "target_bits")),
            scale_bits=() if is_slice else check_widths(_integers(record, "scale_bits")),
            group_size=_group_size(record.get("group_size")),
            layer_group_sizes={
                str(layer): _group_size(size) for layer, size in _mapping(record, "layer_group_sizes").items()
            },
            ignore=tuple(str(name) for name in _list(record, "ignore")),
            recipe=_mapping(record, "recipe"),
            calibration=_mapping(record, "calibration"),
            source=_text(record, "source"),
            refinement=_mapping(record, "refinement"),
            layer_bits={str(layer): check_bits(bits) for layer, bits in _mapping(record, "layer_bits").items()}
            if is_slice
            else None,
        )
        if is_slice:
            # The packed codes do not tell how many columns a layer has; its groups do.
            if -1 in (settings.group_size, *settings.layer_group_sizes.values()):
                raise ConfigurationError("group_size must be a number of columns in a slice, not -1")
            return settings
        expected = {str(bits): own for bits, own in scale_source(settings.scale_bits).items()}
        if record.get("scale_source", expected) != expected:
            raise ConfigurationError(f"scale_source must be {expected} for scale_bits {list(settings.scale_bits)}")
    except ConfigurationError as error:
        raise CheckpointError(f"{where}: quantization_config: {error}") from error
    return settings


def group_size_exceptions(layers: Mapping[str, tuple[int, int]], group_size: int) -> dict[str, int]:
    """``layer_group_sizes``: of layers ``{name: (in_features, group size)}``, those that the common one does not fit.

    Args:
        layers: all of them.
        group_size: of most; -1 for all input features of a layer.
    """
    return {
        name: size
        for name, (in_features, size) in layers.items()
        if size != (in_features if group_size == -1 else group_size)
    }


def slice_settings(settings: Settings, widths: Mapping[str, int], group_sizes: Mapping[str, int]) -> Settings:
    """Settings of a slice of a parent.

    Args:
        settings: of the parent.
        widths: of every quantized layer.
        group_sizes: of every quantized layer, in columns.
    """
    bits, group_size = (max(values, key=values.count) for values in (list(widths.values()), list(group_sizes.values())))
    return dataclasses.replace(
        settings,
        bits=bits,
        target_bits=(),
        scale_bits=(),
        group_size=group_size,
        layer_bits={layer: width for layer, width in widths.items() if width != bits},
        layer_group_sizes={layer: size for layer, size in group_sizes.items() if size != group_size},
    )


def check_layer(settings: Settings, layer: str, found: Parts, expected: tuple[int, int] | None) -> None:
    """Check the stored tensors of one layer against the settings.

    Args:
        settings: of the checkpoint.
        layer: its full module name.
        found: everything that is stored there.
        expected: ``(out_features, in_features)`` of the architecture, or None when it is not known.

    Raises:
        CheckpointError: a tensor is missing, or has another dtype or shape than the settings promise.
    """
    stored = SLICED_CODES if settings.is_slice else CODES
    for name in (stored, GUARD):
        if name not in found:
            raise CheckpointError(f"layer {layer}: the checkpoint has no {layer}.{name}")
    if layer in settings.ignore:
        raise CheckpointError(f"layer {layer}: config.json says that it is not quantized, but it has {stored}")
    if found[GUARD][1] != (0,):
        raise CheckpointError(
            f"layer {layer}: it has {stored} and a {GUARD} {list(found[GUARD][1])}; beside codes {GUARD} must be empty"
        )
    if settings.is_slice:
        _check_sliced_layer(settings, layer, found, expected)
        return
    dtype, shape = found[CODES]
    if dtype != "U8" or len(shape) != 2 or (expected is not None and shape != expected):
        wanted = "[out, in]" if expected is None else str(list(expected))
        raise CheckpointError(f"layer {layer}: {CODES} is {dtype} {list(shape)}, must be U8 {wanted}")
    group_size = settings.group_size_of(layer, shape[1])
    if shape[1] % group_size:
        raise CheckpointError(f"layer {layer}: group size {group_size} does not divide its {shape[1]} input features")
    for bits in settings.scale_bits:
        name = scales_name(bits)
        if name not in found:
            raise CheckpointError(f"layer {layer}: the checkpoint has no {layer}.{name}, but config.json promises it")
        wanted_shape = (shape[0], shape[1] // group_size)
        if found[name] != (SCALE_DTYPE, wanted_shape):
            got_dtype, got_shape = found[name]
            raise CheckpointError(
                f"layer {layer}: {name} is {got_dtype} {list(got_shape)}, must be {SCALE_DTYPE} {list(wanted_shape)} "
                f"(group size {group_size})"
            )
    stray = sorted(
        name for name in found if name.startswith("scales_") and name not in map(scales_name, settings.scale_bits)
    )
    if stray:
        raise CheckpointError(f"layer {layer}: {stray[0]} is in the files but not among scale_bits of config.json")


def _check_sliced_layer(settings: Settings, layer: str, found: Parts, expected: tuple[int, int] | None) -> None:
    if SLICED_SCALES not in found:
        raise CheckpointError(f"layer {layer}: the checkpoint has no {layer}.{SLICED_SCALES}")
    dtype, shape = found[SLICED_SCALES]
    if expected is None and len(shape) == 2:
        expected = (shape[0], shape[1] * settings.layer_group_sizes.get(layer, settings.group_size))
    out_features, in_features = expected or (0, 0)
    group_size = settings.group_size_of(layer, in_features)
    if in_features % group_size:
        raise CheckpointError(
            f"layer {layer}: group size {group_size} does not divide its {in_features} input features"
        )
    wanted = [out_features, in_features // group_size]
    if dtype != SCALE_DTYPE or list(shape) != wanted:
        raise CheckpointError(
            f"layer {layer}: {SLICED_SCALES} is {dtype} {list(shape)}, must be {SCALE_DTYPE} {wanted} "
            f"(group size {group_size})"
        )
    dtype, shape = found[SLICED_CODES]
    bits = settings.bits_of(layer)
    wanted = [out_features, row_bytes(in_features, bits)]
    if dtype != "U8" or list(shape) != wanted:
        raise CheckpointError(
            f"layer {layer}: {SLICED_CODES} is {dtype} {list(shape)}, must be U8 {wanted} for a slice of {bits} bits; "
            "a slice serves the width that it was exported at and no other"
        )
    stray = sorted(name for name in found if name == CODES or name.startswith("scales_"))
    if stray:
        raise CheckpointError(f"layer {layer}: a slice has no {stray[0]}")


def _integers(record: Mapping[str, Any], key: str) -> Iterable[int]:
    value = record.get(key)
    if not isinstance(value, list | tuple) or not value:
        raise ConfigurationError(f"{key} must be a list of widths, not {value!r}")
    return value


def _list(record: Mapping[str, Any], key: str) -> list[Any]:
    value = record.get(key, [])
    if not isinstance(value, list | tuple):
        raise ConfigurationError(f"{key} must be a list, not {value!r}")
    return list(value)


def _mapping(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = record.get(key, {})
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{key} must be an object, not {value!r}")
    return dict(value)


def _text(record: Mapping[str, Any], key: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigurationError(f"{key} must be text, not {value!r}")
    return value


def is_own(leaf: str) -> bool:
    """Whether a tensor of this name inside a layer belongs to the format: its layer is then a quantized one."""
    return leaf in (CODES, SLICED_CODES, SLICED_SCALES) or leaf.startswith("scales_")


def is_scales(leaf: str) -> bool:
    """Whether a tensor of this name inside a layer holds group scales."""
    return leaf == SLICED_SCALES or leaf.startswith("scales_")


def _group_size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise ConfigurationError(f"group_size must be a positive integer or -1, not {value!r}")
    return value
