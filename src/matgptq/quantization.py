"""From a full-precision model to a checkpoint: check, calibrate, solve block by block, write.

No more of the model is in memory than one block and what stands around the blocks; every finished block is kept in a
work directory, from which the same command goes on after whatever stopped it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matgptq.activations import Boundaries, Placement, check_placement
from matgptq.block_hessians import collect_hessians
from matgptq.blocks import Block, BlockInputs, capture_inputs, propagate
from matgptq.calibration import SELF, Windows, first_tokens, load_windows, takes_self
from matgptq.channel_scaling import scale_channels, scaled_tensors
from matgptq.checkpoint_writer import DEFAULT_SHARD_BYTES, CheckpointWriter, check_destination
from matgptq.devices import resolve_device, resolve_dtype
from matgptq.distributed import Processes, assign, local_device, processes
from matgptq.expert_hessians import Coverage, ExpertCalibration
from matgptq.experts import check_expert_tensors, unfuse_experts
from matgptq.families import Family, check_parts, find_family
from matgptq.fingerprint import fingerprint_data, fingerprint_model, fingerprint_software
from matgptq.format import REPORT_NAME, Settings
from matgptq.kept_tensors import ROTATED_DTYPE, KeptTensors, find_kept, read_kept
from matgptq.nested_weight import NestedWeight
from matgptq.plan import CalibrationRequest, Plan, make_plan
from matgptq.progress import Progress, Silent, counting_steps
from matgptq.recipe import Recipe, make_recipe
from matgptq.refinement import refine
from matgptq.report import LayerReport, Report
from matgptq.requirements import Requirements, check_requirements, estimate_requirements
from matgptq.residency import Residency, Streamed, Whole, build_empty, can_stream, needs_conversion, return_freed_memory
from matgptq.rotated_model import rotate_model, rotated_tensors, rotation_sites
from matgptq.run_log import LOG_NAME, RunLog, check_wandb
from matgptq.saliency import token_saliency, token_weights
from matgptq.slicing import check_bits
from matgptq.solver import solve
from matgptq.source import ModelSource, open_source, read_header, read_tensor
from matgptq.stage_clock import StageClock
from matgptq.stored_layers import layer_tensors, read_layer
from matgptq.work_directory import WorkDirectory
from matgptq.workers import INLINE, one_thread_each

# One-token sequences for the weight of first positions; as one batch they cost half as much as one window.
_FIRST_TOKENS = 1024
# Activations that are kept in memory are also written for a later run to go on from, but not after every short block.
_SECONDS_BETWEEN_STATES = 20.0


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
    activations: Placement = "auto",
    resume: bool = True,
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
        bit_weights: lambda, ``{width: weight}`` or in the order of ``bits``; default by ``quality``.
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
        activations: where calibration activations are kept between blocks: ``memory``, ``disk``, or ``auto``: in memory
            up to a quarter of it.
        resume: go on with what an interrupted run of the same inputs left beside ``out``; otherwise throw it away.
        wandb_project: log to Weights & Biases, too, not only to ``log.jsonl`` in the checkpoint.
        progress: receives stages and notes.
        ingredients: any other field of ``matgptq.recipe.Recipe``, e.g. ``coordinate_passes=2`` or ``rotate=True``.

    Returns:
        What was done to each layer; the same record lies in the checkpoint as ``report.json``.

    Raises:
        MatGPTQError: a subclass that says what is wrong; nothing is left at ``out``. Finished blocks are kept in
            ``.OUT.unfinished`` beside it.
    """
    progress = progress or Silent()
    recipe = make_recipe(
        method, bits, bit_weights, quality, group_size=group_size, damping=damping, seed=seed, **ingredients
    )
    default_bits = check_bits(recipe.target_bits[-1] if default_bits is None else default_bits)
    run_device = local_device(resolve_device(device))
    destination = Path(out)
    committed = resume and WorkDirectory.is_committed(destination)
    if not committed:
        check_destination(destination, force=force)
    check_wandb(wandb_project)
    clock = StageClock()
    source = open_source(model, trust_remote_code=trust_remote_code)
    request = CalibrationRequest(dataset, nsamples, seqlen)
    run_dtype = resolve_dtype(dtype, run_device, source.stored_dtype)
    identity = {
        "model": fingerprint_model(source),
        "text": fingerprint_data(dataset),
        "nsamples": nsamples,
        "seqlen": seqlen,
        "recipe": recipe.to_dict(),
        "ignore": [*ignore],
        "dtype": str(run_dtype),
        "default_bits": default_bits,
        "shard_bytes": shard_bytes,
        "software": fingerprint_software(run_device),
    }
    with (
        processes(run_device) as together,
        WorkDirectory(destination, identity, resume=resume, processes=together) as work,
    ):
        if not together.is_first:
            progress = Silent()
        try:
            if together.send_text("done" if committed and work.is_same else "", 0):
                report = Report.from_dict(json.loads((destination / REPORT_NAME).read_text(encoding="utf-8")))
            else:
                if together.is_first:
                    check_destination(destination, force=force)
                prepared = prepare(
                    source, recipe, request, ignore=tuple(ignore), device=run_device, dtype=run_dtype,
                    activations=activations,
                )  # fmt: skip
                check_requirements(prepared.needs, destination, work.kept_bytes)
                clock.lap("load")
                run = _Run(prepared, recipe, request, work, together, clock, progress)
                report = run.quantize(destination, default_bits, wandb_project, force=force, shard_bytes=shard_bytes)
                del run, prepared
            if recipe.tuned_bits and together.is_first:
                # The checkpoint stands already: if this is interrupted, `matgptq refine` goes on, too.
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
            together.wait()
        except (KeyboardInterrupt, SystemExit):
            progress.note(work.kept)
            raise
    report.seconds = {**report.seconds, **clock.laps}
    return report


@dataclass(frozen=True)
class Prepared:
    """A run in which everything that can be refused has been.

    Attributes:
        source: the files.
        residency: the model, its blocks in memory or not.
        plan: what will be quantized and how.
        kept: everything else.
        needs: memory, disk and time.
        device: where blocks are run.
    """

    source: ModelSource
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
    activations: Placement = "auto",
) -> Prepared:
    """Check everything that can be refused without calibration; ``--dry-run`` ends here.

    Of a model in safetensors files only headers and what stands around the blocks are read.
    """
    check_placement(activations)
    residency: Residency
    streamed = can_stream(source)
    if streamed:
        check_parts(source.config)
        family = _check_family(str(source.config.get("model_type")), recipe)
        check_expert_tensors(source.tensors, family)
        network = build_empty(source, dtype)
        unfuse_experts(network, family)
        streamed = not needs_conversion(network, source)
    if streamed:
        plan = make_plan(network, recipe, request, ignore, device)
    else:
        network = source.load_model(dtype, device)
        family = _check_family(network.config.model_type, recipe)
        unfuse_experts(network, family)
        plan = make_plan(network, recipe, request, ignore, device)
    rotated = rotated_tensors(rotation_sites(family, network.config.model_type), plan.blocks) if recipe.rotate else ()
    quantized = frozenset(f"{layer}.weight" for layer in plan.layers)
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    tied = embedding.weight is head.weight or network.config.tie_word_embeddings
    scaled = scaled_tensors(family.channels, plan.blocks) if recipe.channel_scaling and family.channels else ()
    kept = find_kept(source, network, plan.blocks, quantized, frozenset(rotated), frozenset(scaled))
    if recipe.rotate and tied:
        size = f"{head.weight.numel() * ROTATED_DTYPE.itemsize / 1e6:,.1f} MB"
        note = f"rotated, the head and the embedding are no longer one tensor: the checkpoint grows by {size}"
        plan = dataclasses.replace(plan, notes=(*plan.notes, note))
    needs = estimate_requirements(
        network,
        plan,
        recipe,
        _kept_bytes(source, network, kept),
        streamed=streamed,
        activations=activations,
        device=device,
        whole_for_text=recipe.needs_calibration and takes_self(request.dataset),
    )
    residency = Streamed(network, source, family.blocks, device) if streamed else Whole(network)
    return Prepared(source, residency, plan, kept, needs, device)


def _kept_bytes(source: ModelSource, network: Any, kept: KeptTensors) -> int:
    total = 0
    for tensor in (*kept.ends, *(each for block in kept.by_block for each in block)):
        if tensor.stored is not None and not tensor.changed:
            total += source.tensors[tensor.stored].bytes
        else:
            parameter = network.get_parameter_or_buffer(tensor.known)
            total += parameter.numel() * (ROTATED_DTYPE.itemsize if tensor.rotated else parameter.element_size())
    return total


def _check_family(model_type: str, recipe: Recipe) -> Family:
    family = find_family(model_type)
    if recipe.rotate:
        rotation_sites(family, model_type)
    return family


class _Run:
    """The long part of a quantization, which can be interrupted anywhere."""

    def __init__(
        self,
        prepared: Prepared,
        recipe: Recipe,
        request: CalibrationRequest,
        work: WorkDirectory,
        together: Processes,
        clock: StageClock,
        progress: Progress,
    ) -> None:
        self.device = prepared.device
        self.together = together
        self.source = prepared.source
        self.workers = INLINE
        self.residency = prepared.residency
        self.network = prepared.residency.network
        self.plan = prepared.plan
        self.kept = prepared.kept
        self.on_disk = prepared.needs.activations == "disk"
        self.recipe = recipe
        self.request = request
        self.work = work
        self.clock = clock
        self.progress = progress

    def quantize(
        self, destination: Path, default_bits: int, wandb_project: str | None, *, force: bool, shard_bytes: int
    ) -> Report:
        """Do all blocks that are not done, and put the checkpoint together."""
        for note in self.plan.notes:
            self.progress.note(note)
        if self.work.finished_blocks:
            self.progress.note(f"going on after {self.work.finished_blocks} finished blocks in {self.work.path}")
        work, recipe = self.work, self.recipe
        if not self.together.is_first:
            windows, calibration = self._calibration_windows()
            with one_thread_each(self.device) as self.workers:
                self._rotate()
                return Report(str(destination), recipe.to_dict(), calibration, [*self._quantize_blocks(windows)])
        with CheckpointWriter(destination, force=force, shard_bytes=shard_bytes, staging=work.staging) as writer:
            # before the long part: what cannot be read is better known now
            self._copy_side_files(writer)
            windows, calibration = self._calibration_windows()
            self.clock.lap("calibration text")
            report = Report(str(destination), recipe.to_dict(), calibration)
            described = {"model": self.source.name, "recipe": report.recipe, "calibration": calibration}
            with (
                one_thread_each(self.device) as self.workers,
                RunLog(work.path / LOG_NAME, described, wandb_project=wandb_project) as log,
            ):
                self._rotate()
                for layer_report in self._quantize_blocks(windows):
                    report.layers.append(layer_report)
                    log.write("layer", **asdict(layer_report))
            self.clock.lap("blocks")
            self._put_together(writer)
            settings = _settings(self.source, self.plan, recipe, calibration, default_bits)
            _write_config(writer, self.source, self.network, recipe, settings)
            writer.copy_file(LOG_NAME, work.path / LOG_NAME)
            self.clock.lap("write")
            report.seconds = dict(self.clock.laps)
            writer.write_json(REPORT_NAME, report.to_dict())
            work.mark_commit()
            writer.commit()
        work.drop_blocks()
        return report

    def _rotate(self) -> None:
        if self.recipe.rotate:
            self.progress.start("rotate", 1)
            family = find_family(self.network.config.model_type)
            change = rotate_model(self.residency, family, self.plan.blocks, self.recipe.seed)
            self.progress.note(f"rotated; rounding changes the full model's logits by {change:.1e}")
            self.clock.lap("rotate")

    def _calibration_windows(self) -> tuple[Tensor | None, dict[str, Any]]:
        """Token windows (None if the recipe needs none) and the record of them."""
        if not self.recipe.needs_calibration:
            return None, {}
        plan, dataset = self.plan, self.request.dataset

        def make() -> dict[str, Tensor]:
            windows = self._load_windows(dataset)
            # One file, so that there are both or neither.
            return {"tokens": windows.tokens, "protocol": torch.tensor([*windows.protocol.encode()], dtype=torch.uint8)}

        kept = self.work.kept_or_made("windows.safetensors", make)
        record = {
            "dataset": "token ids" if isinstance(dataset, Tensor) else str(dataset),
            "nsamples": plan.nsamples,
            "seqlen": plan.seqlen,
            "protocol": bytes(kept["protocol"].tolist()).decode(),
        }
        return kept["tokens"], record

    @functools.cached_property
    def _tokenizer(self) -> Any:
        """The source's; from a GGUF file it takes seconds, so it is loaded once."""
        return self.source.load_tokenizer()

    def _copy_side_files(self, writer: CheckpointWriter) -> None:
        """Tokenizer, chat template, generation config and whatever else lies beside the weights."""
        if self.source.gguf_file:
            self._tokenizer.save_pretrained(writer.staging)
            if self.network.generation_config is not None:
                self.network.generation_config.save_pretrained(writer.staging)
        for name, file in self.source.side_files().items():
            writer.copy_file(name, file)

    def _load_windows(self, dataset: str | Path | Tensor) -> Windows:
        plan = self.plan
        self.progress.start("calibration text", plan.nsamples)
        network = self.network
        if takes_self(dataset) and isinstance(self.residency, Streamed):
            network = self.source.load_model(network.dtype, network.device)  # writing text takes the whole model
        return load_windows(
            dataset,
            None if isinstance(dataset, Tensor) else self._tokenizer,
            nsamples=plan.nsamples,
            seqlen=plan.seqlen,
            seed=self.recipe.seed,
            model=network,
            progress=counting_steps(self.progress, plan.nsamples),
        )

    def _quantize_blocks(self, windows: Tensor | None) -> Iterator[LayerReport]:
        """Solve block after block, feeding each with the outputs of the quantized ones before it."""
        plan, work, progress = self.plan, self.work, self.progress
        inputs = [] if windows is None else self._block_inputs(windows)
        finished = work.finished_blocks
        # Each process has the states of its own windows; with another number of processes they are of no use.
        of_processes = f"states-{self.together.rank + 1}-of-{self.together.count}"
        boundaries = Boundaries(work.path / of_processes)
        restored = self._restore(inputs, boundaries, finished)
        batches = sum(len(stream.hidden) for stream in inputs)
        progress.start("quantize blocks", (3 * batches or 1) * len(plan.blocks))
        last = len(plan.blocks) - 1
        saved = time.monotonic()
        for index, block in enumerate(plan.blocks):
            if index < finished:
                yield from self._finished_reports(index)
                if inputs and index >= restored and index != last:
                    with self.residency.present(block):
                        self._install(block, index)
                        self._propagate(block, inputs, index, boundaries)
                progress.advance(3 * batches or 1)
                continue
            return_freed_memory()
            with self.residency.present(block):
                yield from self._quantize_block(block, index, inputs)
                progress.advance(batches or 1)
                if not inputs:
                    continue
                if index == last:
                    progress.advance(batches)
                    continue
                self._propagate(block, inputs, index, boundaries)
            if not self.on_disk and time.monotonic() - saved > _SECONDS_BETWEEN_STATES:
                boundaries.keep(index + 1, [stream.hidden for stream in inputs])
                saved = time.monotonic()

    def _block_inputs(self, windows: Tensor) -> list[BlockInputs]:
        """Calibration windows, and one-token sequences that give first positions the recipe's weight."""
        recipe, blocks, network, together = self.recipe, self.plan.blocks, self.network, self.together
        mine = together.share(len(windows))
        weights: dict[str, Tensor] = {}
        if recipe.saliency:

            def make() -> dict[str, Tensor]:
                own = windows[mine]
                self.progress.start("saliency of tokens", 2 * len(own) * len(blocks))
                saliency = token_saliency(
                    self.residency, blocks, own, recipe.seed, tick=self.progress.advance, first_window=mine.start,
                    workers=self.workers,
                )  # fmt: skip
                saliency = {name: together.join_rows(rows, len(windows)) for name, rows in saliency.items()}
                return token_weights(saliency, blocks, recipe.saliency)

            weights = self.work.kept_or_made("token_weights.safetensors", make, together=True)
            weights = {name: rows[mine] for name, rows in weights.items()}
            self.clock.lap("saliency")
        inputs = [capture_inputs(network, blocks, windows[mine], token_weights=weights)]
        if recipe.sink_weight > 1:
            bos = getattr(network.config.get_text_config(), "bos_token_id", None)
            if not isinstance(bos, int) or not 0 <= bos < len(network.get_input_embeddings().weight):
                bos = None
            first = first_tokens(windows, _FIRST_TOKENS, bos, recipe.seed)
            # Each window has its first position in it once already.
            weight = (recipe.sink_weight - 1) * len(windows) / len(first)
            first = first[together.share(len(first))]
            inputs.append(capture_inputs(network, blocks, first, batch=len(first), weight=weight))
        return inputs

    def _restore(self, inputs: list[BlockInputs], boundaries: Boundaries, finished: int) -> int:
        """Give the inputs the last states that were kept; returns the block that they enter."""
        if not inputs:
            return 0
        kept = boundaries.latest(finished)
        if kept is None:
            kept = 0, boundaries.keep(0, [stream.hidden for stream in inputs]) if self.on_disk else []
        index, states = kept
        for stream, hidden in zip(inputs, states, strict=False):
            stream.hidden = hidden if self.on_disk else [each.to(stream.device) for each in hidden]
        return index

    def _propagate(self, block: Block, inputs: list[BlockInputs], index: int, boundaries: Boundaries) -> None:
        into = boundaries.begin(index + 1, len(inputs)) if self.on_disk else None
        propagate(block, inputs, index, self.progress.advance, into, self.workers)
        if self.on_disk:
            boundaries.finish(index + 1)

    def _quantize_block(self, block: Block, index: int, inputs: list[BlockInputs]) -> list[LayerReport]:
        """Solve one block, keep it for good, and leave the quantized weights in the model."""
        hessians: list[Tensor | None] = [None] * len(block.inputs)
        coverage: Mapping[str, Coverage] = {}
        if inputs:
            recipe = self.recipe
            how = ExpertCalibration(recipe.min_expert_tokens, recipe.all_experts, recipe.saliency)
            seen = collect_hessians(block, inputs, index, self.progress.advance, self.together, how, self.workers)
            hessians, coverage = [*seen.matrices], seen.coverage
            self._note_starved(block, coverage)
            self._scale_channels(block, seen.matrices)
        tensors: dict[str, Tensor] = {}
        reports: list[LayerReport] = []
        costs = [sum(layer.weight.numel() for _, layer in group) for group in block.inputs]
        owners = assign(costs, self.together.count)
        solved: dict[int, tuple[list[NestedWeight], list[LayerReport]]] = {}
        named = [[(f"{block.name}.{path}", layer) for path, layer in group] for group in block.inputs]
        for number, (layers, hessian, owner) in enumerate(zip(named, hessians, owners, strict=True)):
            if owner == self.together.rank:
                solved[number] = self._solve_layers(layers, hessian, coverage.get(layers[0][0]))
        for number, (layers, owner) in enumerate(zip(named, owners, strict=True)):
            weights, group_reports = self._exchange(layers, solved.get(number), owner)
            for (name, layer), weight in zip(layers, weights, strict=True):
                tensors.update(layer_tensors(name, weight))
                layer.weight.data = weight.dequantize(self.recipe.propagated_bits, layer.weight.dtype)
            reports += group_reports
        tensors.update(read_kept(self.source, self.network, self.kept.by_block[index]))
        self._set_scaled(index, tensors.__getitem__)
        self.work.finish_block(index, tensors, {"layers": [asdict(report) for report in reports]})
        return reports

    def _scale_channels(self, block: Block, hessians: Sequence[Tensor]) -> None:
        config = self.network.config.get_text_config()
        sites = find_family(self.network.config.model_type).channels
        if self.recipe.channel_scaling and sites is not None:
            scale_channels(block, sites, hessians, config, self.recipe.channel_scaling)

    def _note_starved(self, block: Block, coverage: Mapping[str, Coverage]) -> None:
        """Say which experts were calibrated on all tokens because few reached them."""
        starved = {}
        for number, layers in block.expert_layers().items():
            seen = coverage[str(layers.inner or layers.down)]
            if seen.shared:
                starved[number] = seen.tokens
        if starved:
            listed = ", ".join(f"{number} ({tokens})" for number, tokens in starved.items())
            self.progress.note(
                f"{block.name}.{block.experts}: {len(starved)} of {len(block.expert_layers())} experts were calibrated "
                f"on all tokens, fewer than {self.recipe.min_expert_tokens} reached them: {listed}"
            )

    def _solve_layers(
        self, layers: list[tuple[str, nn.Linear]], hessian: Tensor | None, coverage: Coverage | None
    ) -> tuple[list[NestedWeight], list[LayerReport]]:
        """Solve layers that share an input as one stack."""
        started = time.monotonic()
        plan, recipe = self.plan, self.recipe
        sizes = [layer.out_features for _, layer in layers]
        group_size = plan.layers[layers[0][0]].group_size
        solution = solve(torch.cat([layer.weight for _, layer in layers]), hessian, recipe, group_size, self.workers)
        seconds = time.monotonic() - started
        first = 0
        reports = []
        for name, layer in layers:
            rows = slice(first, first + layer.out_features)
            first = rows.stop
            if solution.rounded_to_nearest:
                self.progress.note(f"{name}: the Hessian could not be factored, rounded to nearest")
            elif solution.damping_steps:
                self.progress.note(f"{name}: damping raised to {solution.damping:g}")
            report = LayerReport(
                name=name,
                shape=(layer.out_features, layer.in_features),
                group_size=group_size,
                errors=solution.errors.relative(rows) if solution.errors is not None else {},
                seconds=round(seconds * layer.out_features / sum(sizes), 3),
                fallback_group_size=group_size != plan.group_size and plan.group_size > 0,
                dead_columns=solution.dead_columns,
                damping_steps=solution.damping_steps,
                rounded_to_nearest=solution.rounded_to_nearest,
                expert_tokens=None if coverage is None else coverage.tokens,
                shared_hessian=coverage is not None and coverage.shared,
            )
            reports.append(report)
        return solution.weight.split_rows(sizes), reports

    def _exchange(
        self,
        layers: list[tuple[str, nn.Linear]],
        solved: tuple[list[NestedWeight], list[LayerReport]] | None,
        owner: int,
    ) -> tuple[list[NestedWeight], list[LayerReport]]:
        """What the process that solved some layers found, on every process."""
        if self.together.count == 1:
            assert solved is not None
            return solved
        text = ""
        if solved is not None:
            widths = sorted(solved[0][0].scales)
            text = json.dumps({"scale_bits": widths, "reports": [asdict(report) for report in solved[1]]})
        record = json.loads(self.together.send_text(text, owner))
        weights = []
        for number, (_, layer) in enumerate(layers):
            if solved is not None:
                weight = solved[0][number]
            else:
                groups = layer.in_features // self.plan.layers[layers[0][0]].group_size
                weight = NestedWeight(
                    layer.weight.new_empty(layer.weight.shape, dtype=torch.uint8),
                    {
                        bits: layer.weight.new_empty(layer.out_features, groups, dtype=torch.float32)
                        for bits in record["scale_bits"]
                    },
                )
            codes, scales = weight.codes.contiguous(), {bits: s.contiguous() for bits, s in weight.scales.items()}
            self.together.send([codes, *(scales[bits] for bits in record["scale_bits"])], owner)
            weights.append(NestedWeight(codes, scales))
        return weights, [LayerReport.from_dict(report) for report in record["reports"]]

    def _finished_reports(self, index: int) -> list[LayerReport]:
        return [LayerReport.from_dict(record) for record in self.work.block_record(index)["layers"]]

    def _install(self, block: Block, index: int) -> None:
        """Give a block the quantized weights that it left with when it was finished."""
        tensors = read_header(self.work.block_file(index))
        for name, layer in block.layers():
            weight = read_layer(name, tensors, self.recipe.scale_bits)
            values = weight.dequantize(self.recipe.propagated_bits, layer.weight.dtype)
            layer.weight.data = values.to(layer.weight.device)
        self._set_scaled(index, lambda name: read_tensor(name, tensors[name]))

    def _set_scaled(self, index: int, stored: Callable[[str], Tensor]) -> None:
        """Go on with what the checkpoint holds of scaled parameters, as a later run will; rotated ones were rounded."""
        for kept in self.kept.by_block[index]:
            if kept.scaled:
                self.network.get_parameter(kept.known).data.copy_(stored(kept.name))

    def _put_together(self, writer: CheckpointWriter) -> None:
        """Hand all finished blocks to the writer, and what stands around them; bytes are copied from file to file."""
        for index in range(len(self.plan.blocks)):
            for name, info in read_header(self.work.block_file(index)).items():
                writer.add_stored(name, info)
        for tensor in self.kept.ends:
            if tensor.stored is not None and not tensor.changed:
                writer.add_stored(tensor.name, self.source.tensors[tensor.stored])
            else:
                for name, value in read_kept(self.source, self.network, [tensor]):
                    writer.add(name, value)


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
