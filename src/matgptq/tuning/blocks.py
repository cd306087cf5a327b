"""Tune scales one block after the other, where gradients through a whole model do not fit.

Each block is fed with what the blocks before it, already tuned, put out, and its output is matched to what the full
model has at that place, as in the first phase of EfficientQAT (arXiv 2407.11062). A position counts by its relative
error, ``||y - t||^2 / ||t||^2``: the first position of a text has activations hundreds of times larger than the others
and would otherwise be the only one that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from matgptq.machine.workers import INLINE, Workers
from matgptq.models.blocks import Block, BlockInputs, run_block
from matgptq.tuning.scales import ScaleVector, Schedule, TunedLinear, mean_gradient, tune


@dataclass
class BlockObjective:
    """Mean relative squared error of a block's output.

    Attributes:
        block: with ``TunedLinear`` layers.
        scales: of those layers.
        arguments: that the block is called with, besides the hidden states.
        inputs, targets: of the windows to train on, ``[1, seqlen, hidden]`` each.
        held_out_inputs, held_out_targets: of the others.
        workers: that windows are shared out among.
    """

    block: Block
    scales: ScaleVector
    arguments: dict[str, Any]
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    held_out_inputs: Sequence[Tensor]
    held_out_targets: Sequence[Tensor]
    workers: Workers = INLINE

    def _loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        difference = (run_block(self.block, hidden, self.arguments) - target).float()
        return (difference.square().sum(-1) / target.float().square().sum(-1)).mean()

    def gradient(self, windows: Sequence[int]) -> Tensor:
        """Of the mean over some windows to train on, ``[scales]``."""

        @torch.enable_grad()
        def gradient(window: int) -> Tensor:
            return self.scales.gradient(self._loss(self.inputs[window], self.targets[window]))

        return mean_gradient(self.workers, gradient, windows)

    def held_out_loss(self) -> float:
        """Mean over the held-out windows, exact products."""

        @torch.no_grad()
        def loss(pair: tuple[Tensor, Tensor]) -> float:
            return float(self._loss(*pair))

        pairs = zip(self.held_out_inputs, self.held_out_targets, strict=True)
        return sum(self.workers.map(loss, pairs)) / len(self.held_out_inputs)


def tune_blocks(
    blocks: Sequence[Block],
    full_blocks: Sequence[Block],
    inputs: BlockInputs,
    full_inputs: BlockInputs,
    *,
    held_out: int,
    schedule: Schedule,
    prepare: Callable[[Block], Mapping[str, TunedLinear]],
    finished: Mapping[str, Tensor],
    save: Callable[[Mapping[str, Tensor]], None],
    tick: Callable[[], None],
    device: torch.device,
    workers: Workers = INLINE,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Tune all blocks in order.

    Args:
        blocks: of the quantized model; on the CPU or on ``device``.
        full_blocks: of the full model.
        inputs, full_inputs: what enters the first block of each; windows to train on, then the held-out ones. Their
            hidden states are replaced by what leaves the last block.
        held_out: number of the latter.
        schedule: for one block.
        prepare: turns a block's quantized layers into ``TunedLinear``, by full name.
        finished: ``{layer: scales}`` of blocks that an earlier call has done.
        save: receives ``{layer: scales}`` of all finished blocks after each of them.
        tick: called after each block.
        device: where a block and its windows are while it is tuned.
        workers: that windows are shared out among.

    Returns:
        ``{layer: scales}`` of the whole model, and what leaves the last block on the held-out windows if every scale
        is left as it was.
    """

    def outputs(block: Block, arguments: dict[str, Any], hidden: Sequence[Tensor]) -> list[Tensor]:
        @torch.no_grad()
        def output(window: Tensor) -> Tensor:
            return run_block(block, window, arguments)

        return list(workers.map(output, hidden))

    done = dict(finished)
    untuned = [hidden.to(device) for hidden in inputs.hidden[-held_out:]]
    for stream in (inputs, full_inputs):
        stream.hidden[:] = [hidden.to(device) for hidden in stream.hidden]
    for index, (block, full_block) in enumerate(zip(blocks, full_blocks, strict=True)):
        homes = [next(each.module.parameters()).device for each in (block, full_block)]
        for each in (block, full_block):
            each.module.to(device)
        arguments, full_arguments = (_moved(stream.arguments[index], device) for stream in (inputs, full_inputs))
        layers = prepare(block)
        targets = outputs(full_block, full_arguments, full_inputs.hidden)
        untuned = outputs(block, arguments, untuned)
        scales = ScaleVector(layers)
        if all(name in done for name in layers):
            scales.values.copy_(torch.cat([done[name].flatten() for name in layers]))
        else:
            objective = BlockObjective(
                block,
                scales,
                arguments,
                inputs.hidden[:-held_out],
                targets[:-held_out],
                inputs.hidden[-held_out:],
                targets[-held_out:],
                workers,
            )
            tune(scales, len(targets) - held_out, objective.gradient, objective.held_out_loss, schedule)
            done.update(scales.by_layer())
            save(done)
        inputs.hidden[:] = outputs(block, arguments, inputs.hidden)
        full_inputs.hidden[:] = targets
        for each, home in zip((block, full_block), homes, strict=True):
            each.module.to(home)
        tick()
    return done, untuned


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors inside arguments on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(part, device) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    return value
