"""Read the checkpoints of the published MatGPTQ code: its packed models and its folders of ``data.pt``.

A weight of theirs is ``w_r = scale * (v_r(q) - zero)`` with our slice ``v_r``. What ours cannot hold is refused:

    codes                          kept byte for byte, columns put back into the model's own order
    scales                         rounded to 8 significant bits where they have more; noted, or refused when ``exact``
    zero points other than 128     refused (``docs/reference.md`` says why no shift of the codes replaces one)
    column orders                  undone if every group is still one block of columns afterwards, otherwise refused
    master bit widths below 8      refused
    scales that cannot be right    refused: not finite, not positive, or far from the full-precision weight
    all other tensors, side files  kept bit for bit
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matgptq.checkpoint import DEFAULT_SHARD_BYTES, REPORT_NAME, CheckpointWriter, check_destination
from matgptq.errors import ConfigurationError, SourceError
from matgptq.format import QUANT_METHOD, Settings
from matgptq.grid import storable_scales
from matgptq.nested_weight import NestedWeight
from matgptq.progress import Progress, Silent
from matgptq.recipe import PER_CHANNEL
from matgptq.slicing import PARENT_BITS, WIDTHS, ZERO_POINT, check_bits, slice_levels
from matgptq.source import ModelSource, open_source, read_headers, read_json, read_tensor
from matgptq.tensor_names import is_derived, match_names

REFERENCE_METHOD = "matgptq_quant"
DATA_NAME = "data.pt"
_CONFIG_FIELDS = {
    "quant_method",
    "group_size",
    "master_bitwidth",
    "inference_bitwidth",
    "modules_to_not_convert",
    "quant_dtype",
}
_DATA_FIELDS = {"qweight", "scale", "zero", "perm"}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# A row of the 8-bit slice against the same row at full precision, as the factor <w, w_8> / <w, w>. Compensation moves
# single weights a lot (distances up to 0.56 for targets 2 and 8) but hardly along w: sound rows have 0.88 to 1.06.
# Scales that were never written are off by any factor; columns in another order and other models give 0.
_FACTORS = (0.7, 1.4)
_ODD_ROWS = 0.01  # rows that may lie outside
_UNRELATED = 1.0  # relative distance of the whole layer; zeros would do as well
# Share of that distance that one offset per group explains: 1 / group_size by chance, nearly all of it when the zero
# points of an asymmetric grid were left out. Distances below 1 % are too small for an offset of one step.
_OFFSET_SHARE = 0.5
_OFFSET_DISTANCE = 0.01
# A scale in float16's normal range changes by at most 2^-9 when it is rounded, and so does a layer of such scales.
_ROUNDING = 2.0**-8


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
class ImportedLayer:
    """What became of one layer.

    Attributes:
        name: full module name.
        shape: ``(out_features, in_features)``.
        group_size: columns per scale.
        scale_change: largest relative change that rounding made to a scale.
        weight_error: ``||W - W_8|| / ||W||``, or None without the full-precision model.
    """

    name: str
    shape: tuple[int, int]
    group_size: int
    scale_change: float
    weight_error: float | None


@dataclass
class ImportReport:
    """A whole import; ``report.json`` of the checkpoint.

    Attributes:
        output: the checkpoint's directory.
        recipe: as recorded in the checkpoint.
        layers: in the order of the files.
        notes: everything that is not exactly as the reference had it, and what could not be checked.
        seconds: wall time.
    """

    output: str
    recipe: Mapping[str, Any]
    layers: list[ImportedLayer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class _Reference:
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


def import_reference(
    directory: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    bits: int | None = None,
    exact: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> ImportReport:
    """Turn a model that the published MatGPTQ code quantized into a matgptq checkpoint.

    Args:
        directory: its packed model (``quant_method: matgptq_quant``), or the folder with one ``<layer>/data.pt`` per
            layer, directly or inside one folder named after the model.
        out: directory to create; appears whole or not at all.
        model: the full-precision model it was made from: a local safetensors directory or a hub id. Needed for
            folders, which hold nothing else; with a packed model it lets the scales be checked.
        bits: width that loaders of the checkpoint serve when nothing else is asked for; default: the
            ``inference_bitwidth`` of a packed model, 8 for folders.
        exact: refuse scales that have to be rounded to fit the format.
        force: replace a checkpoint that stands at ``out``.
        trust_remote_code: allow code in the model's directory to run.
        shard_bytes: size of one output file.
        progress: receives stages and notes.

    Returns:
        What was done to each layer; the same record lies in the checkpoint as ``report.json``.

    Raises:
        SourceError: files are missing or damaged, or hold what the format cannot keep; names the layer.
        ConfigurationError: ``model`` is needed and not given, or ``bits`` is out of range.
    """
    progress = progress or Silent()
    started = time.monotonic()
    if bits is not None:
        check_bits(bits)
    check_destination(Path(out), force=force)
    reference = _open(Path(directory).expanduser(), model, trust_remote_code)
    report = ImportReport(str(out), reference.recipe)
    with CheckpointWriter(Path(out), force=force, shard_bytes=shard_bytes) as writer:
        progress.start("import layers", len(reference.layers))
        for name in reference.layers:
            weight, imported = _convert(reference, name, exact)
            writer.add_layer(name, weight)
            report.layers.append(imported)
            progress.advance()
        for known, stored in reference.kept.items():
            writer.add(known, _read_finite(reference.base, stored))
        report.notes += [*reference.notes, *_scale_notes(report.layers)]
        for note in report.notes:
            progress.note(note)
        settings = _settings(reference, report.layers, reference.default_bits if bits is None else bits)
        _copy_side_files(writer, reference)
        writer.write_json("config.json", {**reference.base.config, "quantization_config": settings.to_dict()})
        report.seconds = round(time.monotonic() - started, 3)
        writer.write_json(REPORT_NAME, report.to_dict())
        writer.commit()
    return report


def _open(directory: Path, model: str | Path | None, trust_remote_code: bool) -> _Reference:
    if not directory.is_dir():
        raise SourceError(f"{directory}: no such directory")
    source = None if model is None else open_source(model, trust_remote_code=trust_remote_code)
    if source is not None and source.gguf_file:
        raise SourceError(f"{source.name}: give the safetensors model that was quantized, not a GGUF file")
    if (directory / "config.json").is_file() and "quantization_config" in read_json(directory / "config.json"):
        return _open_packed(directory, source, trust_remote_code)
    return _open_folders(directory, source)


# The packed format


def _open_packed(directory: Path, model: ModelSource | None, trust_remote_code: bool) -> _Reference:
    """Read the configuration and the headers of a packed model and match them with its architecture."""
    config = read_json(directory / "config.json")
    where = str(directory / "config.json")
    record = config.pop("quantization_config", None) or {}
    group_size, default_bits, excluded = _packed_settings(record, where)
    if group_size == PER_CHANNEL and model is None:
        raise ConfigurationError(
            f"{directory}: one scale per output row; the published code stores uninitialized memory in their place, "
            "so give --model, the full-precision model, to check them against"
        )
    base = ModelSource(str(directory), directory, None, config, read_headers(directory), trust_remote_code)
    network = _architecture(base)
    stored_layers = [name.removesuffix(".qweight") for name in base.tensors if name.endswith(".qweight")]
    linears = _linears(network)
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
        return ReferenceLayer(read_tensor(codes, base.tensors[codes]), read_tensor(scales, base.tensors[scales]))

    layers = {name: linears[name] for name in stored}
    _check_untied(network, layers)
    return _Reference(
        base=base,
        model=model,
        recipe={"method": "reference", "format": "packed", "quantization_config": record},
        layers=layers,
        ignore=tuple(name for name in linears if name not in layers),
        kept=_place(base, network, layers, own),
        weights=_full_weights(model, network, layers),
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


# Folders of data.pt


def _open_folders(directory: Path, model: ModelSource | None) -> _Reference:
    """Find the ``data.pt`` files and match the layers that they name with the full-precision model."""
    root = _find_root(directory)
    if model is None:
        raise ConfigurationError(
            f"{directory}: folders of {DATA_NAME} hold the quantized layers alone; "
            "give --model, the full-precision model they were made from"
        )
    network = _architecture(model)
    linears = _linears(network)
    folders = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    found = [name for name in folders if (root / name / DATA_NAME).is_file()]
    unknown = [name for name in found if name not in linears]
    if unknown:
        raise SourceError(f"layer {unknown[0]}: is in {root}, but {model.name} has no such Linear")
    empty = [name for name in folders if name in linears and name not in found]
    if empty:
        raise SourceError(f"layer {empty[0]}: {root / empty[0]} holds no {DATA_NAME}; was the run interrupted?")
    layers = {name: shape for name, shape in linears.items() if name in found}
    _check_untied(network, layers)
    missing = _missing_siblings(layers, linears)
    if missing:
        raise SourceError(
            f"layer {missing[0]}: {root} has no {DATA_NAME} for it ({len(missing)} layers are missing), but has one "
            "for the same layer of other blocks; was the run interrupted?"
        )
    notes = []
    left_out = [name for name in linears if name not in layers and not _is_head(network, name)]
    if left_out:
        notes.append(f"{len(left_out)} Linear layers such as {left_out[0]} were not quantized, stay at full precision")
    return _Reference(
        base=model,
        model=model,
        recipe={"method": "reference", "format": "folders"},
        layers=layers,
        ignore=tuple(name for name in linears if name not in layers),
        kept=_place(model, network, layers, own=()),
        weights=_full_weights(model, network, layers),
        default_bits=PARENT_BITS,
        packed=False,
        read=lambda name: _read_data(root / name / DATA_NAME, name, layers[name]),
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


def _read_data(file: Path, layer: str, shape: tuple[int, int]) -> ReferenceLayer:
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
    if zeros.shape != scales.shape:
        raise SourceError(f"layer {layer}: zero is {list(zeros.shape)}, but scale is {list(scales.shape)}")
    if order is not None:
        in_features = torch.arange(shape[1])
        if order.dtype != torch.int64 or order.dim() != 1 or not torch.equal(order.sort().values, in_features):
            raise SourceError(f"layer {layer}: perm is not a permutation of its {shape[1]} input features")
    return ReferenceLayer(codes, scales, zeros, order)


def _is_plain(value: Any) -> bool:
    return type(value) is Tensor and value.layout == torch.strided and value.device.type == "cpu"


# The architecture


def _architecture(source: ModelSource) -> Any:
    """The model that a configuration describes, without memory for its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise SourceError(f"{source.name}: transformers cannot build it: {error}") from error


def _linears(network: Any) -> dict[str, tuple[int, int]]:
    """``(out_features, in_features)`` of every Linear, in the order of the model."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    }


def _is_head(network: Any, name: str) -> bool:
    return network.get_submodule(name) is network.get_output_embeddings()


def _check_untied(network: Any, layers: Iterable[str]) -> None:
    for name in layers:
        if f"{name}.weight" in network.all_tied_weights_keys:
            raise SourceError(f"layer {name}: is quantized, but config.json ties its weight to the embeddings")


def _place(source: ModelSource, network: Any, layers: Iterable[str], own: Iterable[str]) -> dict[str, str]:
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


def _full_weights(model: ModelSource | None, network: Any, layers: Mapping[str, tuple[int, int]]) -> dict[str, str]:
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


# Conversion of one layer


def _convert(reference: _Reference, name: str, exact: bool) -> tuple[NestedWeight, ImportedLayer]:
    """Check one layer and bring it into the format."""
    layer = reference.read(name)
    full = None
    if reference.model is not None:
        full = _read_finite(reference.model, reference.weights[name]).to(torch.float32)
    _check_master(name, layer)
    _check_values(name, layer)
    error = None if full is None else _check_distance(name, layer, full, zeros_dropped=reference.packed)
    if layer.offset_zeros():
        raise SourceError(
            f"layer {name}: has zero points other than {ZERO_POINT} (an asymmetric grid); this format is symmetric and "
            "no other codes give the same weights at every width. Quantize again with --sym"
        )
    codes, scales = restore_order(name, layer)
    weight, change = _store(name, codes, scales, exact)
    out_features, in_features = codes.shape
    return weight, ImportedLayer(name, (out_features, in_features), weight.group_size, change, error)


def _check_master(name: str, layer: ReferenceLayer) -> None:
    """A symmetric grid of m bits has its zero at 2^(m-1) and no code above 2^m - 1."""
    if layer.zeros is None:
        return
    for bits in range(1, PARENT_BITS):
        if bool((layer.zeros == 1 << (bits - 1)).all()) and int(layer.codes.max()) < 1 << bits:
            raise SourceError(
                f"layer {name}: was quantized with master bit width {bits}; only {PARENT_BITS} is supported "
                "(the published code slices every model as if it were 8, so another one is wrong at all widths)"
            )


def _check_values(name: str, layer: ReferenceLayer) -> None:
    for what, values in (("scales", layer.scales), ("zero points", layer.zeros)):
        if values is not None and not bool(torch.isfinite(values).all()):
            raise SourceError(f"layer {name}: {what} hold NaN or Inf{_hint(layer)}")
    if not bool((layer.scales > 0).all()):
        raise SourceError(f"layer {name}: holds a scale that is zero or negative{_hint(layer)}")


def _hint(layer: ReferenceLayer) -> str:
    if layer.scales.shape[1] > 1:
        return ""
    return "; without --group_size the published code stores uninitialized memory as scales. Quantize again with one"


def _check_distance(name: str, layer: ReferenceLayer, full: Tensor, *, zeros_dropped: bool) -> float:
    """``||W - W_8|| / ||W||``; refuses a layer that cannot come from this weight.

    Args:
        name: of the layer.
        layer: as stored.
        full: ``[out, in]`` float32 full-precision weight, in the model's column order.
        zeros_dropped: look for the trace of zero points that are not in the file.
    """
    if layer.order is not None:
        full = full[:, layer.order]
    rows, groups = layer.scales.shape
    scales = layer.scales.to(torch.float32)
    zeros = torch.full_like(scales, ZERO_POINT) if layer.zeros is None else layer.zeros.to(torch.float32)
    levels = layer.codes.to(torch.float32).view(rows, groups, -1) - zeros.unsqueeze(-1)
    full = full.reshape(rows, groups, -1)
    residual = full - levels * scales.unsqueeze(-1)
    distance, norm = float(residual.norm()), float(full.norm())
    error = distance / max(norm, torch.finfo(torch.float32).tiny)
    if zeros_dropped and error > _OFFSET_DISTANCE:
        offsets = residual.mean(-1).square().sum().mul(layer.group_size).sqrt()
        if float(offsets) ** 2 > _OFFSET_SHARE * distance**2:
            raise SourceError(
                f"layer {name}: its groups are shifted against the full-precision weights (relative distance "
                f"{error:.2g}): zero points were left out when it was packed. Import the folders it was packed from, "
                "or quantize again with --sym"
            )
    factors = 1 - (full * residual).sum((1, 2)) / full.square().sum((1, 2))
    # Rows that lie within a step of the grid are right whatever their factor: zeros, or much smaller than the others.
    off_grid = residual.square().mean((1, 2)) > scales.square().mean(1)
    odd = off_grid & ~((factors > _FACTORS[0]) & (factors < _FACTORS[1]))
    if not error <= _UNRELATED or int(odd.sum()) > _ODD_ROWS * rows:
        reason = _hint(layer) or "; damaged scales, a column order that packing left out, or another --model"
        raise SourceError(
            f"layer {name}: its 8-bit weights do not resemble the full-precision ones (relative distance {error:.2g}, "
            f"{int(odd.sum())} of {rows} rows differ in size){reason}"
        )
    return error


def restore_order(name: str, layer: ReferenceLayer) -> tuple[Tensor, Tensor]:
    """Codes ``[out, in]`` and scales ``[out, groups]`` with the columns in the model's order.

    Quantizing in another order forms the groups in that order, so afterwards neighbouring columns have different
    scales unless the order moved whole groups, or the scales are equal.

    Raises:
        SourceError: a block of ``group_size`` neighbouring columns has more than one scale.
    """
    if layer.order is None:
        return layer.codes, layer.scales
    size = layer.group_size
    position = layer.order.argsort()  # [in], where the model's column is stored
    groups = (position // size).view(-1, size)  # [groups, group_size], stored group of the model's columns
    scales = layer.scales[:, groups[:, 0]]
    if not all(torch.equal(layer.scales[:, column], scales) for column in groups.unbind(1)):
        raise SourceError(
            f"layer {name}: was quantized in another column order (--act_order) with group size {size}; in the "
            "model's own order neighbouring columns have different scales, which the format cannot hold. Quantize "
            "again without it"
        )
    return layer.codes[:, position].contiguous(), scales


def _store(name: str, codes: Tensor, scales: Tensor, exact: bool) -> tuple[NestedWeight, float]:
    """Scales in storage precision, and the largest relative change that made."""
    given = scales.to(torch.float64)  # squares of damaged scales would overflow float32
    stored = storable_scales(given).to(torch.float64)
    change = float(((stored - given) / given).abs().max())
    if exact and change:
        raise SourceError(
            f"layer {name}: its {str(scales.dtype).removeprefix('torch.')} scales have more than 8 significant bits "
            f"or leave the range of float16; storing changes them by up to {change:.2%}"
        )
    energy = slice_levels(codes, PARENT_BITS).view(*given.shape, -1).square().sum(-1)  # [out, groups]
    moved = float((energy * (stored - given).square()).sum().sqrt())
    if moved > _ROUNDING * float((energy * given.square()).sum().sqrt()):
        raise SourceError(
            f"layer {name}: its scales, {float(given.min()):.2g} to {float(given.max()):.2g}, leave the range that "
            "float16 can serve at every width"
        )
    return NestedWeight(codes, {PARENT_BITS: stored.to(torch.float16)}), change


def _read_finite(source: ModelSource, name: str) -> Tensor:
    tensor = read_tensor(name, source.tensors[name])
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.to(torch.float32)).all()):
        raise SourceError(f"{source.name}: tensor {name} holds NaN or Inf")
    return tensor


# What goes around the tensors


def _scale_notes(layers: list[ImportedLayer]) -> list[str]:
    rounded = [layer for layer in layers if layer.scale_change]
    if not rounded:
        return []
    worst = max(rounded, key=lambda layer: layer.scale_change)
    note = (
        f"scales of {len(rounded)} layers rounded to 8 significant bits: the largest relative change is "
        f"{worst.scale_change:.2%}, in {worst.name}"
    )
    if worst.scale_change > _ROUNDING:
        note += f"; some lie below float16's normal range, no layer moves by more than {_ROUNDING:.1%} as a whole"
    return [note]


def _settings(reference: _Reference, layers: list[ImportedLayer], bits: int) -> Settings:
    whole_rows = all(layer.group_size == layer.shape[1] for layer in layers)
    [(common, _)] = Counter(layer.group_size for layer in layers).most_common(1)
    group_size = PER_CHANNEL if whole_rows else common
    exceptions = {
        layer.name: layer.group_size
        for layer in layers
        if layer.group_size != (layer.shape[1] if group_size == PER_CHANNEL else group_size)
    }
    origin = None
    if reference.model is not None:
        path = Path(reference.model.name).expanduser()
        origin = str(path.resolve()) if path.exists() else reference.model.name
    return Settings(
        bits=bits,
        # Neither format records what the solver aimed at; the parent is always among it.
        target_bits=(PARENT_BITS,),
        scale_bits=(PARENT_BITS,),
        group_size=group_size,
        layer_group_sizes=exceptions,
        ignore=reference.ignore,
        recipe=reference.recipe,
        source=origin,
    )


def _copy_side_files(writer: CheckpointWriter, reference: _Reference) -> None:
    """Side files of the packed model; those that packing lost come from the full-precision one."""
    lost = reference.model.side_files() if reference.model is not None else {}
    for name, file in {**lost, **reference.base.side_files()}.items():
        writer.copy_file(name, file)
