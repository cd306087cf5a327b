"""Turn checkpoints of the published MatGPTQ code (``reference_formats``) into ours, or say why that cannot be.

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

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matgptq.checkpoints.format import REPORT_NAME, Settings, group_size_exceptions
from matgptq.checkpoints.writer import DEFAULT_SHARD_BYTES, CheckpointWriter, check_destination
from matgptq.core.finiteness import all_finite
from matgptq.core.grid import storable_scales
from matgptq.errors import SourceError
from matgptq.files.json_files import read_json
from matgptq.files.stored_tensors import read_tensor
from matgptq.models.source import ModelSource, open_source
from matgptq.nested_weight import NestedWeight
from matgptq.progress import Progress, Silent
from matgptq.recipe import PER_CHANNEL
from matgptq.reference_formats.folders import open_folders
from matgptq.reference_formats.opened import Reference, ReferenceLayer
from matgptq.reference_formats.packed import open_packed
from matgptq.slicing import PARENT_BITS, ZERO_POINT, check_bits, slice_levels

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


def _open(directory: Path, model: str | Path | None, trust_remote_code: bool) -> Reference:
    if not directory.is_dir():
        raise SourceError(f"{directory}: no such directory")
    source = None if model is None else open_source(model, trust_remote_code=trust_remote_code)
    if source is not None and source.gguf_file:
        raise SourceError(f"{source.name}: give the safetensors model that was quantized, not a GGUF file")
    if (directory / "config.json").is_file() and "quantization_config" in read_json(directory / "config.json"):
        return open_packed(directory, source, trust_remote_code)
    return open_folders(directory, source)


# Conversion of one layer


def _convert(reference: Reference, name: str, exact: bool) -> tuple[NestedWeight, ImportedLayer]:
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
        if values is not None and not all_finite(values):
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
    tensor = read_tensor(source.tensors[name])
    if tensor.is_floating_point() and not all_finite(tensor.to(torch.float32)):
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


def _settings(reference: Reference, layers: list[ImportedLayer], bits: int) -> Settings:
    whole_rows = all(layer.group_size == layer.shape[1] for layer in layers)
    [(common, _)] = Counter(layer.group_size for layer in layers).most_common(1)
    group_size = PER_CHANNEL if whole_rows else common
    sizes = {layer.name: (layer.shape[1], layer.group_size) for layer in layers}
    return Settings(
        bits=bits,
        # Neither format records what the solver aimed at; the parent is always among it.
        target_bits=(PARENT_BITS,),
        scale_bits=(PARENT_BITS,),
        group_size=group_size,
        layer_group_sizes=group_size_exceptions(sizes, group_size),
        ignore=reference.ignore,
        recipe=reference.recipe,
        source=None if reference.model is None else reference.model.recorded_name,
    )


def _copy_side_files(writer: CheckpointWriter, reference: Reference) -> None:
    """Side files of the packed model; those that packing lost come from the full-precision one."""
    lost = reference.model.side_files() if reference.model is not None else {}
    for name, file in {**lost, **reference.base.side_files()}.items():
        writer.copy_file(name, file)
