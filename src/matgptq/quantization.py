"""From a full-precision model to a checkpoint: check, calibrate, solve block by block, write."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matgptq.blocks import BlockInputs, capture_inputs, collect_hessians, propagate
from matgptq.calibration import SELF, first_tokens, load_windows
from matgptq.checkpoint import DEFAULT_SHARD_BYTES, REPORT_NAME, CheckpointWriter, check_destination
from matgptq.devices import resolve_device, resolve_dtype
from matgptq.errors import SourceError
from matgptq.families import RotationSites, find_family
from matgptq.format import Settings
from matgptq.plan import CalibrationRequest, Plan, make_plan
from matgptq.progress import Progress, Silent
from matgptq.recipe import Recipe, make_recipe
from matgptq.refinement import refine
from matgptq.report import LayerReport, Report
from matgptq.rotated_model import rotate_model, rotated_tensors, rotation_sites
from matgptq.run_log import LOG_NAME, RunLog, check_wandb
from matgptq.saliency import token_saliency, token_weights
from matgptq.slicing import check_bits
from matgptq.solver import solve
from matgptq.source import ModelSource, open_source, read_tensor
from matgptq.tensor_names import is_derived, match_names

# One-token sequences for the weight of first positions; as one batch they cost half as much as one window.
_FIRST_TOKENS = 1024
# Of rotated embeddings and heads. On SmolLM2-135M it costs a KL of 4e-7; bfloat16 costs 2e-5 and is no smaller.
_ROTATED_DTYPE = torch.float16


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    method: str = "matgptq",
    bits: Iterable[int] | None = None,
    bit_weights: Mapping[int, float] | Iterable[float] | None = None,
    quality: str | None = None,
    group_size: int = 128,
    dataset: str | Path | Tensor = SELF,
    nsamples: int | None = None,
    seqlen: int | None = None,
    ignore: Iterable[str] = ("lm_head",),
    damping: float = 0.01,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    default_bits: int | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    wandb_project: str | None = None,
    progress: Progress | None = None,
    **ingredients: Any,
) -> Report:
    """Quantize a causal language model once, for all widths, and write one checkpoint.

    Args:
        model: a local Hugging Face directory, a ``.gguf`` file or a hub id.
        out: directory to create; appears whole or not at all.
        method: ``matgptq``, ``paper``, ``gptq`` (one width) or ``rtn``.
        bits: target widths, default 2,3,4,8.
        bit_weights: lambda, ``{width: weight}`` or in the order of ``bits``; default 2^width.
        quality: ``fast``, ``balanced`` (default) or ``best``: how much time the method matgptq takes.
        group_size: input columns per scale, -1 for a whole row.
        dataset: calibration text: a ``.txt``, ``.jsonl`` or ``.parquet`` file, a hub data set, ``self`` (the model
            writes its own), or int64 token ids ``[n, seqlen]``.
        nsamples, seqlen: calibration windows and tokens in each; defaults 128 and 2048, fewer on a CPU.
        ignore: names or ``*`` patterns of Linear layers to keep at full precision. The output head always is.
        damping: fraction of the mean Hessian diagonal.
        seed: of the choice of windows, and of the rotation.
        device, dtype: where and in what precision the model runs; see ``matgptq.devices``.
        default_bits: width that loaders of the checkpoint serve when nothing else is asked for; default: the
            largest target.
        force: replace a checkpoint that stands at ``out``.
        trust_remote_code: allow code in the model's directory to run.
        shard_bytes: size of one output file.
        wandb_project: log to Weights & Biases, too, not only to ``log.jsonl`` in the checkpoint.
        progress: receives stages and notes.
        ingredients: any other field of ``matgptq.recipe.Recipe``, e.g. ``coordinate_passes=2`` or ``rotate=True``.

    Returns:
        What was done to each layer; the same record lies in the checkpoint as ``report.json``.

    Raises:
        MatGPTQError: a subclass that says what is wrong; nothing is left at ``out``.
    """
    progress = progress or Silent()
    recipe = make_recipe(
        method, bits, bit_weights, quality, group_size=group_size, damping=damping, seed=seed, **ingredients
    )
    default_bits = check_bits(recipe.target_bits[-1] if default_bits is None else default_bits)
    run_device = resolve_device(device)
    check_destination(Path(out), force=force)
    check_wandb(wandb_project)
    clock = _Clock()
    source, network, plan = prepare(
        model,
        recipe,
        CalibrationRequest(dataset, nsamples, seqlen),
        ignore=tuple(ignore),
        device=run_device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    kept = _kept_tensors(source, network, plan, recipe)
    for note in plan.notes:
        progress.note(note)
    clock.lap("load")
    with CheckpointWriter(Path(out), force=force, shard_bytes=shard_bytes) as writer:
        _copy_side_files(writer, source, network)  # before the long part: what cannot be read is better known now
        windows, calibration = _calibration_windows(source, network, recipe, plan, dataset, progress)
        clock.lap("calibration text")
        if recipe.rotate:
            progress.start("rotate", 1)
            change = rotate_model(network, find_family(network.config.model_type), plan.blocks, recipe.seed)
            progress.note(f"rotated; rounding changes the full model's logits by {change:.1e}")
            clock.lap("rotate")
        report = Report(str(out), recipe.to_dict(), calibration)
        described = {"model": source.name, "recipe": report.recipe, "calibration": calibration}
        with RunLog(writer.staging / LOG_NAME, described, wandb_project=wandb_project) as log:
            for layer_report in _quantize_blocks(network, plan, recipe, windows, writer, progress):
                report.layers.append(layer_report)
                log.write("layer", **asdict(layer_report))
        clock.lap("blocks")
        for name, tensor in kept:
            writer.add(name, tensor)
        _write_config(writer, source, network, recipe, _settings(source, plan, recipe, calibration, default_bits))
        clock.lap("write")
        report.seconds = clock.laps
        writer.write_json(REPORT_NAME, report.to_dict())
        writer.commit()
    if recipe.tuned_bits:
        del network
        # The checkpoint stands already: if this is interrupted, `matgptq refine` goes on.
        tuned = refine(
            out,
            recipe.tuned_bits,
            steps=recipe.tuning_steps,
            dataset=dataset if isinstance(dataset, Tensor) else None,
            seed=seed,
            reference=model,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        report.refinement = {str(result.bits): result for result in tuned}
        clock.lap("tune")
    return report


def prepare(
    model: str | Path,
    recipe: Recipe,
    request: CalibrationRequest,
    *,
    ignore: tuple[str, ...],
    device: torch.device,
    dtype: str | torch.dtype,
    trust_remote_code: bool = False,
) -> tuple[ModelSource, Any, Plan]:
    """Load the model and check everything that can be refused without calibration; ``--dry-run`` ends here."""
    source = open_source(model, trust_remote_code=trust_remote_code)
    if source.config:  # before gigabytes of an unknown architecture are read
        _check_family(str(source.config.get("model_type")), recipe)
    network = source.load_model(resolve_dtype(dtype, device, source.stored_dtype), device)
    _check_family(network.config.model_type, recipe)
    plan = make_plan(network, recipe, request, ignore)
    head, embedding = network.get_output_embeddings().weight, network.get_input_embeddings().weight
    if recipe.rotate and head is embedding:
        size = f"{head.numel() * _ROTATED_DTYPE.itemsize / 1e6:,.1f} MB"
        note = f"rotated, the head and the embedding are no longer one tensor: the checkpoint grows by {size}"
        plan = dataclasses.replace(plan, notes=(*plan.notes, note))
    return source, network, plan


def _check_family(model_type: str, recipe: Recipe) -> None:
    family = find_family(model_type)
    if recipe.rotate:
        rotation_sites(family, model_type)


def _rotation_sites(network: Any) -> RotationSites:
    model_type = network.config.model_type
    return rotation_sites(find_family(model_type), model_type)


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 3)
        self._last = now


def _calibration_windows(
    source: ModelSource, network: Any, recipe: Recipe, plan: Plan, dataset: str | Path | Tensor, progress: Progress
) -> tuple[Tensor | None, dict[str, Any]]:
    """Token windows (None if the recipe needs none) and the record of them."""
    if not recipe.needs_calibration:
        return None, {}
    from_tokens = isinstance(dataset, Tensor)
    progress.start("calibration text", plan.nsamples)
    done = 0

    def report(count: int, total: int) -> None:
        nonlocal done
        if total:
            reached = count * plan.nsamples // total
            progress.advance(reached - done)
            done = reached

    windows = load_windows(
        dataset,
        None if from_tokens else source.load_tokenizer(),
        nsamples=plan.nsamples,
        seqlen=plan.seqlen,
        seed=recipe.seed,
        model=network,
        progress=report,
    )
    return windows.tokens, {
        "dataset": "token ids" if from_tokens else str(dataset),
        "nsamples": plan.nsamples,
        "seqlen": plan.seqlen,
        "protocol": windows.protocol,
    }


def _quantize_blocks(
    network: Any,
    plan: Plan,
    recipe: Recipe,
    windows: Tensor | None,
    writer: CheckpointWriter,
    progress: Progress,
) -> Iterator[LayerReport]:
    """Solve block after block, feeding each with the outputs of the quantized ones before it."""
    inputs = [] if windows is None else _block_inputs(network, plan, recipe, windows, progress)
    batches = sum(len(stream.hidden) for stream in inputs)
    steps = 3 * batches or 1  # of one block: see all windows, solve, see all windows again
    progress.start("quantize blocks", steps * len(plan.blocks))
    for index, block in enumerate(plan.blocks):
        hessians: list[Tensor | None] = [None] * len(block.inputs)
        if inputs:
            hessians = [*collect_hessians(block, inputs, index, progress.advance)]
        for group, hessian in zip(block.inputs, hessians, strict=True):
            layers = [(f"{block.name}.{path}", layer) for path, layer in group]
            yield from _quantize_layers(layers, hessian, plan, recipe, writer, progress)
        progress.advance(batches or 1)
        last = index == len(plan.blocks) - 1
        if inputs and not last:
            propagate(block, inputs, index, progress.advance)
        elif last:
            progress.advance(batches)


def _block_inputs(network: Any, plan: Plan, recipe: Recipe, windows: Tensor, progress: Progress) -> list[BlockInputs]:
    """Calibration windows, and one-token sequences that give first positions the recipe's weight."""
    weights: dict[str, Tensor] = {}
    if recipe.saliency:
        progress.start("saliency of tokens", len(windows))
        saliency = token_saliency(network, plan.blocks, windows, recipe.seed, progress.advance)
        weights = token_weights(saliency, plan.blocks, recipe.saliency)
    inputs = [capture_inputs(network, plan.blocks, windows, token_weights=weights)]
    if recipe.sink_weight > 1:
        bos = getattr(network.config, "bos_token_id", None)
        first = first_tokens(windows, _FIRST_TOKENS, bos, recipe.seed)
        # Each window has its first position in it once already.
        weight = (recipe.sink_weight - 1) * len(windows) / len(first)
        inputs.append(capture_inputs(network, plan.blocks, first, batch=len(first), weight=weight))
    return inputs


def _quantize_layers(
    layers: list[tuple[str, nn.Linear]],
    hessian: Tensor | None,
    plan: Plan,
    recipe: Recipe,
    writer: CheckpointWriter,
    progress: Progress,
) -> Iterator[LayerReport]:
    """Solve layers that share an input as one stack, write them, and leave the quantized weights in the model."""
    started = time.monotonic()
    sizes = [layer.out_features for _, layer in layers]
    group_size = plan.layers[layers[0][0]].group_size
    solution = solve(torch.cat([layer.weight for _, layer in layers]), hessian, recipe, group_size)
    seconds = time.monotonic() - started
    first = 0
    for (name, layer), weight in zip(layers, solution.weight.split_rows(sizes), strict=True):
        rows = slice(first, first + layer.out_features)
        first = rows.stop
        writer.add_layer(name, weight)
        layer.weight.data = weight.dequantize(recipe.propagated_bits, layer.weight.dtype)
        if solution.rounded_to_nearest:
            progress.note(f"{name}: the Hessian could not be factored, rounded to nearest")
        elif solution.damping_steps:
            progress.note(f"{name}: damping raised to {solution.damping:g}")
        yield LayerReport(
            name=name,
            shape=(layer.out_features, layer.in_features),
            group_size=group_size,
            errors=solution.errors.relative(rows) if solution.errors is not None else {},
            seconds=round(seconds * layer.out_features / sum(sizes), 3),
            fallback_group_size=group_size != plan.group_size and plan.group_size > 0,
            dead_columns=solution.dead_columns,
            damping_steps=solution.damping_steps,
            rounded_to_nearest=solution.rounded_to_nearest,
        )


def _kept_tensors(source: ModelSource, network: Any, plan: Plan, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that is not quantized, under its stored name with the base model's prefix.

    A tensor that a rotation changes comes from the model, every other one exactly as stored. The check that all of the
    model's state is accounted for runs at the call, before any work; the tensors are read when the iterator is.

    Raises:
        SourceError: the files lack a tensor of the model, or hold one that the model does not know.
    """
    quantized = {f"{layer}.weight" for layer in plan.layers}
    state = network.state_dict().keys()
    rotated = rotated_tensors(_rotation_sites(network), plan.blocks) & state if recipe.rotate else frozenset()
    kept: list[tuple[str, str, str | None]] = []  # name to write, name in the model, name in the files
    if source.gguf_file:
        tied = set(getattr(network, "all_tied_weights_keys", ())) - rotated
        kept = [(name, name, None) for name in state if name not in quantized and name not in tied]
    else:
        kept = _matched_tensors(source, network, quantized)
        found = {known for _, known, _ in kept} | quantized
        kept += [(name, name, None) for name in sorted(rotated - found)]  # a head that was tied

    def read(known: str, stored: str | None) -> Tensor:
        if known in rotated:
            return _storable(network.get_parameter(known))
        if stored is None:
            tensor: Tensor = network.get_parameter_or_buffer(known)
            return tensor
        return read_tensor(stored, source.tensors[stored])

    return ((name, read(known, stored)) for name, known, stored in kept)


def _storable(tensor: Tensor) -> Tensor:
    """A rotated tensor in 16 bits, or in 32 where a value is out of their range."""
    small = tensor.to(_ROTATED_DTYPE)
    return small if bool(torch.isfinite(small).all()) else tensor.to(torch.float32)


def _matched_tensors(source: ModelSource, network: Any, quantized: set[str]) -> list[tuple[str, str, str | None]]:
    """The tensors of safetensors files that are kept: name to write, name in the model, name in the files."""
    prefix = f"{network.base_model_prefix}."
    matched = match_names(network, source.tensors)
    kept: list[tuple[str, str, str | None]] = []
    found: set[str] = set()
    for name in source.tensors:
        known = matched.get(name)
        if known is None and is_derived(name):
            continue
        if known is None or known in found:
            raise SourceError(f"{source.name}: tensor {name} has no place in {type(network).__name__}")
        found.add(known)
        if known not in quantized:
            # Layers are named by their module, and the files of a model must agree on the prefix. Other renamings
            # are transformers' own: the stored name is the one that other programs look for.
            only_prefix = name.removeprefix(prefix) == known.removeprefix(prefix)
            kept.append((known if only_prefix else name, known, name))
    lost = sorted(quantized - found)
    if lost:
        raise SourceError(f"{source.name}: {lost[0]} is stored in pieces or another layout, which is not supported")
    return kept


def _settings(
    source: ModelSource, plan: Plan, recipe: Recipe, calibration: Mapping[str, Any], default_bits: int
) -> Settings:
    exceptions = {
        name: layer.group_size
        for name, layer in plan.layers.items()
        if layer.group_size != (layer.in_features if plan.group_size == -1 else plan.group_size)
    }
    origin = Path(source.name).expanduser()
    return Settings(
        bits=default_bits,
        target_bits=recipe.target_bits,
        scale_bits=recipe.scale_bits,
        group_size=plan.group_size,
        layer_group_sizes=exceptions,
        ignore=plan.kept,
        recipe=recipe.to_dict(),
        calibration=dict(calibration),
        source=str(origin.resolve()) if origin.exists() else source.name,
    )


def _copy_side_files(writer: CheckpointWriter, source: ModelSource, network: Any) -> None:
    """Tokenizer, chat template, generation config and whatever else lies beside the weights."""
    if source.gguf_file:
        source.load_tokenizer().save_pretrained(writer.staging)
        if network.generation_config is not None:
            network.generation_config.save_pretrained(writer.staging)
    for name, file in source.side_files().items():
        writer.copy_file(name, file)


def _write_config(
    writer: CheckpointWriter, source: ModelSource, network: Any, recipe: Recipe, settings: Settings
) -> None:
    """``config.json``: the model's own, and ours in it."""
    if source.gguf_file:
        config = copy.deepcopy(network.config)
        config.dtype = network.dtype
        record = config.to_dict()
        record["architectures"] = [type(network).__name__]
        record.pop("_name_or_path", None)
    else:
        record = dict(source.config)
    if recipe.rotate:
        record["tie_word_embeddings"] = False
    record["quantization_config"] = settings.to_dict()
    writer.write_json("config.json", record)
