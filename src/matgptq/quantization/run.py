"""The long part of a quantization: block after block, kept as soon as it is done, and put together at the end.

No more of the model is in memory than one block and what stands around the blocks.
"""

from __future__ import annotations

import copy
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matgptq.checkpoints.format import REPORT_NAME, Settings, group_size_exceptions
from matgptq.checkpoints.stored_layers import layer_tensors, read_layer
from matgptq.checkpoints.writer import CheckpointWriter
from matgptq.files.run_log import LOG_NAME, RunLog
from matgptq.files.stored_tensors import read_header, read_tensor
from matgptq.machine.distributed import Processes
from matgptq.machine.workers import Workers, one_thread_each
from matgptq.models.blocks import Block, BlockInputs, capture_inputs, propagate
from matgptq.models.kept_tensors import read_kept
from matgptq.models.residency import Streamed, return_freed_memory
from matgptq.models.rotated_model import rotate_model
from matgptq.models.source import ModelSource
from matgptq.nested_weight import NestedWeight
from matgptq.progress import Progress, StageClock, counting_steps
from matgptq.quantization.activations import Boundaries
from matgptq.quantization.block_quantizer import BlockQuantizer
from matgptq.quantization.calibration_gradients import CalibrationGradients
from matgptq.quantization.plan import CalibrationRequest, Plan
from matgptq.quantization.preparation import Prepared
from matgptq.quantization.work_directory import WRITTEN_WINDOWS, WorkDirectory
from matgptq.recipe import Recipe
from matgptq.report import LayerReport, Report
from matgptq.text.packing import first_tokens
from matgptq.text.windows import Windows, calibration_windows, takes_self, text_names

# One-token sequences for the weight of first positions; as one batch they cost half as much as one window.
_FIRST_TOKENS = 1024
# Activations that are kept in memory are also written for a later run to go on from, but not after every short block.
_SECONDS_BETWEEN_STATES = 20.0


class QuantizationRun:
    """The long part of a quantization, which can be interrupted anywhere."""

    def __init__(
        self,
        prepared: Prepared,
        request: CalibrationRequest,
        work: WorkDirectory,
        together: Processes,
        clock: StageClock,
        progress: Progress,
    ) -> None:
        self.prepared = prepared
        self.device = prepared.device
        self.together = together
        self.source = prepared.source
        self.residency = prepared.residency
        self.network = prepared.residency.network
        self.plan = prepared.plan
        self.kept = prepared.kept
        self.on_disk = prepared.needs.activations == "disk"
        self.recipe = prepared.recipe
        self.request = request
        self.work = work
        self.clock = clock
        self.progress = progress
        self.gradients = CalibrationGradients(prepared, work, together, progress)

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
            with one_thread_each(self.device) as workers:
                self._rotate()
                return Report(
                    str(destination), recipe.to_dict(), calibration, [*self._quantize_blocks(windows, workers)]
                )
        with CheckpointWriter(destination, force=force, shard_bytes=shard_bytes, staging=work.staging) as writer:
            # before the long part: what cannot be read is better known now
            self._copy_side_files(writer)
            windows, calibration = self._calibration_windows()
            self.clock.lap("calibration text")
            report = Report(str(destination), recipe.to_dict(), calibration)
            described = {"model": self.source.name, "recipe": report.recipe, "calibration": calibration}
            with (
                one_thread_each(self.device) as workers,
                RunLog(work.path / LOG_NAME, described, wandb_project=wandb_project) as log,
            ):
                self._rotate()
                for layer_report in self._quantize_blocks(windows, workers):
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
            change = rotate_model(self.residency, self.prepared.family, self.plan.blocks, self.recipe.seed)
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

        kept = self.work.kept_or_made(WRITTEN_WINDOWS if takes_self(dataset) else "windows.safetensors", make)
        record = {
            "dataset": "token ids" if isinstance(dataset, Tensor) else _found_again(dataset),
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
        return calibration_windows(
            dataset,
            None if isinstance(dataset, Tensor) else self._tokenizer,
            nsamples=plan.nsamples,
            seqlen=plan.seqlen,
            seed=self.recipe.seed,
            model=network,
            progress=counting_steps(self.progress, plan.nsamples),
        )

    def _quantize_blocks(self, windows: Tensor | None, workers: Workers) -> Iterator[LayerReport]:
        """Solve block after block, feeding each with the outputs of the quantized ones before it."""
        plan, work, progress = self.plan, self.work, self.progress
        quantizer = BlockQuantizer(self.prepared, self.together, workers, progress)
        inputs = [] if windows is None else self._block_inputs(windows, workers)
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
                        self._propagate(block, inputs, index, boundaries, workers)
                progress.advance(3 * batches or 1)
                continue
            return_freed_memory()
            with self.residency.present(block):
                solved = quantizer.quantize(block, index, inputs, self.gradients.output_hessians(block, index))
                yield from self._finish_block(index, *solved)
                progress.advance(batches or 1)
                if not inputs:
                    continue
                if index == last:
                    progress.advance(batches)
                    continue
                self._propagate(block, inputs, index, boundaries, workers)
            if not self.on_disk and time.monotonic() - saved > _SECONDS_BETWEEN_STATES:
                boundaries.keep(index + 1, [stream.hidden for stream in inputs])
                saved = time.monotonic()

    def _block_inputs(self, windows: Tensor, workers: Workers) -> list[BlockInputs]:
        """Calibration windows, and one-token sequences that give first positions the recipe's weight."""
        recipe, blocks, network, together = self.recipe, self.plan.blocks, self.network, self.together
        mine = together.share(len(windows))
        weights: dict[str, Tensor] = {}
        if recipe.saliency:
            weights = {name: rows[mine] for name, rows in self.gradients.token_weights(windows, workers).items()}
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

    def _propagate(
        self, block: Block, inputs: list[BlockInputs], index: int, boundaries: Boundaries, workers: Workers
    ) -> None:
        into = boundaries.begin(index + 1, len(inputs)) if self.on_disk else None
        propagate(block, inputs, index, self.progress.advance, into, workers)
        if self.on_disk:
            boundaries.finish(index + 1)

    def _finish_block(
        self, index: int, weights: Mapping[str, NestedWeight], reports: list[LayerReport]
    ) -> list[LayerReport]:
        """Keep a quantized block for good."""
        tensors: dict[str, Tensor] = {}
        for name, weight in weights.items():
            tensors.update(layer_tensors(name, weight))
        tensors.update(read_kept(self.source, self.network, self.kept.by_block[index]))
        self._set_scaled(index, tensors.__getitem__)
        self.work.finish_block(index, tensors, {"layers": [asdict(report) for report in reports]})
        return reports

    def _finished_reports(self, index: int) -> list[LayerReport]:
        return [LayerReport.from_dict(record) for record in self.work.block_record(index)["layers"]]

    def _install(self, block: Block, index: int) -> None:
        """Give a block the quantized weights that it left with when it was finished."""
        tensors = read_header(self.work.block_file(index))
        for name, layer in block.layers():
            weight = read_layer(name, tensors, self.recipe.scale_bits)
            values = weight.dequantize(self.recipe.propagated_bits, layer.weight.dtype)
            layer.weight.data = values.to(layer.weight.device)
        self._set_scaled(index, lambda name: read_tensor(tensors[name]))

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


def _found_again(dataset: str | Path) -> str:
    """The texts by names that hold from any directory; ``refine`` looks for them."""
    names = (Path(name).expanduser() for name in text_names(dataset))
    return ",".join(str(name.resolve()) if os.path.isfile(name) else str(name) for name in names)


def _settings(
    source: ModelSource, plan: Plan, recipe: Recipe, calibration: Mapping[str, Any], default_bits: int
) -> Settings:
    sizes = {name: (layer.in_features, layer.group_size) for name, layer in plan.layers.items()}
    return Settings(
        bits=default_bits,
        target_bits=recipe.target_bits,
        scale_bits=recipe.scale_bits,
        group_size=plan.group_size,
        layer_group_sizes=group_size_exceptions(sizes, plan.group_size),
        ignore=plan.kept,
        recipe=recipe.to_dict(),
        calibration=dict(calibration),
        source=source.recorded_name,
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
