"""Solve the layers of one block: what they see, their Hessians, channels that are scaled, codes and scales."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from matgptq.calibration.block_hessians import collect_hessians
from matgptq.calibration.channel_scaling import scale_channels
from matgptq.calibration.expert_hessians import Coverage, ExpertCalibration
from matgptq.core.output_hessian import OutputHessian
from matgptq.core.solver import solve
from matgptq.machine.distributed import Processes, assign
from matgptq.machine.workers import Workers
from matgptq.models.blocks import Block, BlockInputs
from matgptq.nested_weight import NestedWeight
from matgptq.progress import Progress
from matgptq.quantization.preparation import Prepared
from matgptq.report import LayerReport


class BlockQuantizer:
    """Quantizes one block after the other; reads and writes no files.

    Args:
        prepared: the run.
        together: the processes that share the work.
        workers: that windows and rows are shared out among.
        progress: receives a step for each batch, and notes.
    """

    def __init__(self, prepared: Prepared, together: Processes, workers: Workers, progress: Progress) -> None:
        self._family = prepared.family
        self._config = prepared.residency.network.config.get_text_config()
        self._plan = prepared.plan
        self._recipe = prepared.recipe
        self._together = together
        self._workers = workers
        self._progress = progress

    def quantize(
        self,
        block: Block,
        index: int,
        inputs: Sequence[BlockInputs],
        output_hessians: Sequence[OutputHessian] = (),
    ) -> tuple[dict[str, NestedWeight], list[LayerReport]]:
        """Solve one block, and leave the slices that feed the next one in the model.

        Args:
            block: whose weights are present.
            index: its number.
            inputs: what enters it; empty if the recipe needs no calibration.
            output_hessians: of groups of layers whose rows are solved together; scaled with the channels.

        Returns:
            What each layer became, by full name, and what happened to it.
        """
        hessians: list[Tensor | None] = [None] * len(block.inputs)
        coverage: Mapping[str, Coverage] = {}
        outputs = {name: each for each in output_hessians for name in each.layers}
        if inputs:
            recipe = self._recipe
            how = ExpertCalibration(recipe.min_expert_tokens, recipe.all_experts, recipe.saliency)
            seen = collect_hessians(block, inputs, index, self._progress.advance, self._together, how, self._workers)
            hessians, coverage = [*seen.matrices], seen.coverage
            self._note_starved(block, coverage)
            if recipe.channel_scaling and self._family.channels is not None:
                scale_channels(
                    block, self._family.channels, seen.matrices, self._config, recipe.channel_scaling, outputs
                )
        costs = [sum(layer.weight.numel() for _, layer in group) for group in block.inputs]
        owners = assign(costs, self._together.count)
        solved: dict[int, tuple[list[NestedWeight], list[LayerReport]]] = {}
        named = [[(f"{block.name}.{path}", layer) for path, layer in group] for group in block.inputs]
        for number, (layers, hessian, owner) in enumerate(zip(named, hessians, owners, strict=True)):
            if owner == self._together.rank:
                name = layers[0][0]
                solved[number] = self.solve_layers(layers, hessian, coverage.get(name), outputs.get(name))
        quantized: dict[str, NestedWeight] = {}
        reports: list[LayerReport] = []
        for number, (layers, owner) in enumerate(zip(named, owners, strict=True)):
            weights, group_reports = self._exchange(layers, solved.get(number), owner)
            for (name, layer), weight in zip(layers, weights, strict=True):
                quantized[name] = weight
                layer.weight.data = weight.dequantize(self._recipe.propagated_bits, layer.weight.dtype)
            reports += group_reports
        return quantized, reports

    def _note_starved(self, block: Block, coverage: Mapping[str, Coverage]) -> None:
        """Say which experts were calibrated on all tokens because few reached them."""
        starved = {}
        for number, layers in block.expert_layers().items():
            seen = coverage[str(layers.inner or layers.down)]
            if seen.shared:
                starved[number] = seen.tokens
        if starved:
            listed = ", ".join(f"{number} ({tokens})" for number, tokens in starved.items())
            self._progress.note(
                f"{block.name}.{block.experts}: {len(starved)} of {len(block.expert_layers())} experts were calibrated "
                f"on all tokens, fewer than {self._recipe.min_expert_tokens} reached them: {listed}"
            )

    def solve_layers(
        self,
        layers: list[tuple[str, nn.Linear]],
        hessian: Tensor | None,
        coverage: Coverage | None,
        outputs: OutputHessian | None = None,
    ) -> tuple[list[NestedWeight], list[LayerReport]]:
        """Solve layers that share an input as one stack."""
        started = time.monotonic()
        plan, recipe = self._plan, self._recipe
        sizes = [layer.out_features for _, layer in layers]
        group_size = plan.layers[layers[0][0]].group_size
        stack = torch.cat([layer.weight for _, layer in layers])
        solution = solve(stack, hessian, recipe, group_size, self._workers, outputs)
        seconds = time.monotonic() - started
        first = 0
        reports = []
        for name, layer in layers:
            rows = slice(first, first + layer.out_features)
            first = rows.stop
            if solution.rounded_to_nearest:
                self._progress.note(f"{name}: the Hessian could not be factored, rounded to nearest")
            elif solution.damping_steps:
                self._progress.note(f"{name}: damping raised to {solution.damping:g}")
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
        if self._together.count == 1:
            assert solved is not None
            return solved
        text = ""
        if solved is not None:
            widths = sorted(solved[0][0].scales)
            text = json.dumps({"scale_bits": widths, "reports": [asdict(report) for report in solved[1]]})
        record = json.loads(self._together.send_text(text, owner))
        weights = []
        for number, (_, layer) in enumerate(layers):
            if solved is not None:
                weight = solved[0][number]
            else:
                groups = layer.in_features // self._plan.layers[layers[0][0]].group_size
                weight = NestedWeight(
                    layer.weight.new_empty(layer.weight.shape, dtype=torch.uint8),
                    {
                        bits: layer.weight.new_empty(layer.out_features, groups, dtype=torch.float32)
                        for bits in record["scale_bits"]
                    },
                )
            codes, scales = weight.codes.contiguous(), {bits: s.contiguous() for bits, s in weight.scales.items()}
            self._together.send([codes, *(scales[bits] for bits in record["scale_bits"])], owner)
            weights.append(NestedWeight(codes, scales))
        return weights, [LayerReport.from_dict(report) for report in record["reports"]]
