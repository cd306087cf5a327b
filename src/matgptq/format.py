"""The checkpoint format as data: names of tensors, the ``quantization_config`` record and its validation.

``docs/format.md`` is the specification; this file is its only reading in code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from matgptq.errors import CheckpointError, ConfigurationError
from matgptq.nested_weight import scale_source
from matgptq.slicing import PARENT_BITS, check_bits, check_widths

QUANT_METHOD = "matgptq"
FORMAT_VERSION = 1
CODES = "codes"
GUARD = "weight"
SCALE_DTYPE = "F16"


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

    def group_size_of(self, layer: str, in_features: int) -> int:
        """Group size of a layer; -1 in the record stands for all its input features."""
        size = self.layer_group_sizes.get(layer, self.group_size)
        return in_features if size == -1 else size

    def to_dict(self) -> dict[str, Any]:
        """The record as ``config.json`` holds it."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "parent_bits": PARENT_BITS,
            "bits": self.bits,
            "target_bits": list(self.target_bits),
            "scale_bits": list(self.scale_bits),
            "scale_source": {str(bits): own for bits, own in scale_source(self.scale_bits).items()},
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
    if record.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{where}: quant_method is {record.get('quant_method')!r}, not {QUANT_METHOD!r}")
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version {version!r}; this release reads version {FORMAT_VERSION}. "
            "Install a matgptq release that knows it, or quantize the model again"
        )
    if record.get("parent_bits") != PARENT_BITS:
        raise CheckpointError(f"{where}: parent_bits must be {PARENT_BITS}, not {record.get('parent_bits')!r}")
    try:
        settings = Settings(
            bits=check_bits(record.get("bits", PARENT_BITS)),
            target_bits=check_widths(_integers(record, "target_bits")),
            scale_bits=check_widths(_integers(record, "scale_bits")),
            group_size=_group_size(record.get("group_size")),
            layer_group_sizes={
                str(layer): _group_size(size) for layer, size in _mapping(record, "layer_group_sizes").items()
            },
            ignore=tuple(str(name) for name in _list(record, "ignore")),
            recipe=_mapping(record, "recipe"),
            calibration=_mapping(record, "calibration"),
            source=_text(record, "source"),
            refinement=_mapping(record, "refinement"),
        )
        expected = {str(bits): own for bits, own in scale_source(settings.scale_bits).items()}
        if record.get("scale_source", expected) != expected:
            raise ConfigurationError(f"scale_source must be {expected} for scale_bits {list(settings.scale_bits)}")
    except ConfigurationError as error:
        raise CheckpointError(f"{where}: quantization_config: {error}") from error
    return settings


def with_bits(settings: Settings, bits: int) -> Settings:
    """The same checkpoint with another default width."""
    return dataclasses.replace(settings, bits=check_bits(bits))


def check_layer(
    settings: Settings, layer: str, found: Mapping[str, tuple[str, tuple[int, ...]]], expected: tuple[int, int] | None
) -> None:
    """Check the stored tensors of one layer against the settings.

    Args:
        settings: of the checkpoint.
        layer: its full module name.
        found: ``{name inside the layer: (safetensors dtype, shape)}`` of everything stored there.
        expected: ``(out_features, in_features)`` of the architecture, or None when it is not known.

    Raises:
        CheckpointError: a tensor is missing, or has another dtype or shape than the settings promise.
    """
    for name in (CODES, GUARD):
        if name not in found:
            raise CheckpointError(f"layer {layer}: the checkpoint has no {layer}.{name}")
    if layer in settings.ignore:
        raise CheckpointError(f"layer {layer}: config.json says that it is not quantized, but it has {CODES}")
    if found[GUARD][1] != (0,):
        raise CheckpointError(
            f"layer {layer}: it has {CODES} and a {GUARD} {list(found[GUARD][1])}; beside codes {GUARD} must be empty"
        )
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
    return leaf == CODES or leaf.startswith("scales_")


def _group_size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise ConfigurationError(f"group_size must be a positive integer or -1, not {value!r}")
    return value
