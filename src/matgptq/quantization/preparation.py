"""Everything about a run that can be decided or refused before the first calibration token."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from matgptq.calibration.channel_scaling import scaled_tensors
from matgptq.errors import CalibrationError
from matgptq.machine.memory import available_memory, gpu_memory
from matgptq.models.experts import check_expert_tensors, unfuse_experts
from matgptq.models.families import Family, check_parts, find_family
from matgptq.models.kept_tensors import SMALL_DTYPE, KeptTensors, find_kept
from matgptq.models.residency import Residency, Streamed, Whole, build_empty, can_stream, needs_conversion
from matgptq.models.rotated_model import rotated_tensors, rotation_sites
from matgptq.models.source import ModelSource
from matgptq.quantization.activations import Placement, check_placement
from matgptq.quantization.plan import CalibrationRequest, Plan, make_plan
from matgptq.quantization.requirements import Requirements, estimate_requirements
from matgptq.recipe import Recipe
from matgptq.text.windows import calibration_windows, check_texts, takes_self
from matgptq.tuning.text import HELD_OUT


@dataclass(frozen=True)
class Prepared:
    """A run in which everything that can be refused has been.

    Attributes:
        source: the files.
        recipe: what was asked for, less what a level of quality asks of models that allow it.
        family: the architecture.
        residency: the model, its blocks in memory or not.
        plan: what will be quantized and how.
        kept: everything else.
        needs: memory and disk.
        device: where blocks are run.
    """

    source: ModelSource
    recipe: Recipe
    family: Family
    residency: Residency
    plan: Plan
    kept: KeptTensors
    needs: Requirements
    device: torch.device


def prepare(
    source: ModelSource,
    recipe: Recipe,
    request: CalibrationRequest,
    *,
    ignore: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype,
    must_rotate: bool = True,
    activations: Placement = "auto",
) -> Prepared:
    """Check everything that can be refused without calibration.

    Of a model in safetensors files only headers and what stands around the blocks are read. A model that cannot be
    rotated is refused if it must be, and else quantized as it is.
    """
    check_placement(activations)
    free, gpu_free = available_memory(), gpu_memory(device)  # before the model takes any
    residency: Residency
    streamed, asked = can_stream(source), recipe
    if streamed:
        check_parts(source.config)
        family, recipe = _family_and_recipe(str(source.config.get("model_type")), recipe, must_rotate)
        check_expert_tensors(source.tensors, family)
        network = build_empty(source, dtype)
        unfuse_experts(network, family)
        streamed = not needs_conversion(network, source)
    if streamed:
        plan = make_plan(network, recipe, request, ignore, device)
    else:
        network = source.load_model(dtype, device)
        family, recipe = _family_and_recipe(network.config.model_type, recipe, must_rotate)
        unfuse_experts(network, family)
        plan = make_plan(network, recipe, request, ignore, device)
    if recipe.tuned_bits and isinstance(request.dataset, Tensor) and len(request.dataset) <= HELD_OUT:
        raise CalibrationError(
            f"{len(request.dataset)} windows are too few to tune scales on (--quality best): {HELD_OUT} are held out"
        )
    rotated = rotated_tensors(rotation_sites(family, network.config.model_type), plan.blocks) if recipe.rotate else ()
    if asked.rotate and not recipe.rotate:
        plan = dataclasses.replace(plan, notes=(*plan.notes, f"not rotated: {family.rotation}"))
    quantized = frozenset(f"{layer}.weight" for layer in plan.layers)
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    tied = embedding.weight is head.weight or network.config.tie_word_embeddings
    scaled = scaled_tensors(family.channels, plan.blocks) if recipe.channel_scaling and family.channels else ()
    kept = find_kept(source, network, plan.blocks, quantized, frozenset(rotated), frozenset(scaled))
    if recipe.rotate and tied:
        note = "rotated, the head and the embedding are no longer one tensor, and are stored in 16 bits each"
        plain = find_kept(source, network, plan.blocks, quantized, frozenset(), frozenset(scaled))
        growth = _kept_bytes(source, network, kept) - _kept_bytes(source, network, plain)
        if growth > 0:
            note += f": the checkpoint grows by {growth / 1e6:,.1f} MB"
        plan = dataclasses.replace(plan, notes=(*plan.notes, note))
    needs = estimate_requirements(
        network,
        plan,
        recipe,
        _kept_bytes(source, network, kept),
        streamed=streamed,
        activations=activations,
        device=device,
        stored_dtype=source.stored_dtype,
        whole_for_text=recipe.needs_calibration and takes_self(request.dataset),
        free=free,
        gpu_free=gpu_free,
    )
    residency = Streamed(network, source, family.blocks, device) if streamed else Whole(network)
    return Prepared(source, recipe, family, residency, plan, kept, needs, device)


def check_text(prepared: Prepared, request: CalibrationRequest, seed: int) -> None:
    """Refuse a calibration text that the run would refuse; it is read and cut, but for what the model has to write.

    Raises:
        CalibrationError: it cannot be read, or is too short.
        ConfigurationError: there are fewer windows than texts.
        SourceError: there is no tokenizer.
    """
    plan, dataset = prepared.plan, request.dataset
    if not plan.nsamples:
        return
    tokenizer = None if isinstance(dataset, Tensor) else prepared.source.load_tokenizer()
    check_texts(dataset, plan.nsamples)
    if not takes_self(dataset):
        network = prepared.residency.network
        calibration_windows(dataset, tokenizer, nsamples=plan.nsamples, seqlen=plan.seqlen, seed=seed, model=network)


def _kept_bytes(source: ModelSource, network: Any, kept: KeptTensors) -> int:
    total = 0
    for tensor in (*kept.ends, *(each for block in kept.by_block for each in block)):
        if tensor.stored is not None and not tensor.changed:
            total += source.tensors[tensor.stored].bytes
        else:
            parameter = network.get_parameter_or_buffer(tensor.known)
            total += parameter.numel() * (SMALL_DTYPE.itemsize if tensor.in_16_bits else parameter.element_size())
    return total


def _family_and_recipe(model_type: str, recipe: Recipe, must_rotate: bool) -> tuple[Family, Recipe]:
    """The architecture, and the recipe as it allows."""
    family = find_family(model_type)
    if recipe.rotate and (must_rotate or not isinstance(family.rotation, str)):
        rotation_sites(family, model_type)
        return family, recipe
    return family, dataclasses.replace(recipe, rotate=False)
