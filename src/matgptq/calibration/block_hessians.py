"""Hessians of a block's layers: the block is run over all windows, and what its layers see is summed.

Windows are run side by side, a few at a time, and each only notes what enters the layers. The sums are cut in tiles
that are shared out afterwards, and every tile adds the windows in their order: the result does not depend on the number
of threads, no sum is in memory twice, and of a symmetric product half is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from matgptq.calibration.expert_hessians import Coverage, ExpertCalibration, ExpertTotals
from matgptq.calibration.sightings import Notes, Sighting, Watch
from matgptq.core.finiteness import all_finite
from matgptq.core.hessian import add_to_tile, hessian_tiles, mirror
from matgptq.errors import UnsupportedModelError
from matgptq.machine.devices import fast_products, fast_sums
from matgptq.machine.distributed import ALONE, Processes
from matgptq.machine.workers import INLINE, Workers
from matgptq.models.blocks import Block, BlockInputs, run_block
from matgptq.models.experts import Experts

# Of what the layers have seen and no sum has taken up yet; one window is always run.
_SEEN_BYTES = 1 << 30
MOST_EXPERTS_PER_TOKEN = 8  # of the largest models with experts


@dataclass(frozen=True)
class BlockHessians:
    """What the layers of a block see.

    Attributes:
        matrices: for each group of layers that share an input, float32 ``[in, in]``: twice the weighted mean of
            ``x x^T``. Not finite for an expert that nothing is known of.
        coverage: of the groups of experts, by the full name of their first layer.
    """

    matrices: list[Tensor]
    coverage: Mapping[str, Coverage]


@torch.no_grad()
def collect_hessians(
    block: Block,
    inputs: Sequence[BlockInputs],
    index: int,
    tick: Callable[[], None],
    processes: Processes = ALONE,
    experts: ExpertCalibration | None = None,
    workers: Workers = INLINE,
) -> BlockHessians:
    """Hessians of the block's input groups: twice the weighted mean of ``x x^T`` over all tokens.

    Args:
        block: still at full precision.
        inputs: as left by the blocks before it; not changed. The first are the calibration windows, whose tokens are
            counted for experts.
        index: position of the block, selects its arguments.
        tick: called after each batch.
        processes: among which the tokens are shared out; each gets the sums over all.
        experts: how experts are calibrated; None for the defaults.
        workers: among which windows and tiles are shared out.

    Raises:
        UnsupportedModelError: an activation is not finite; names the layer that receives it.
    """
    experts = experts or ExpertCalibration()
    # All layers of a group see the same input, one of them is enough.
    observed = {f"{block.name}.{group[0][0]}": group[0][1] for group in block.ordinary_inputs()}
    totals = {
        name: torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)
        for name, layer in observed.items()
    }
    of_experts = _expert_totals(block, experts)
    _Pass(block, observed, totals, of_experts, workers).run(inputs, index, tick)
    weight = torch.tensor([stream.weight * stream.tokens for stream in inputs], dtype=torch.float64).sum()
    processes.add([*totals.values(), weight])
    for name, total in totals.items():
        mirror(total)
        _check_finite(name, total)
        total.mul_(2 / float(weight))
    coverage: dict[str, Coverage] = {}
    if of_experts is not None:
        coverage = _finish_experts(block, inputs, index, experts, of_experts, totals, processes, workers)
    return BlockHessians([totals[f"{block.name}.{group[0][0]}"] for group in block.inputs], coverage)


@dataclass(frozen=True)
class _Pass:
    """One run of a block over all windows.

    Attributes:
        block: the block.
        observed: its ordinary layers that are watched, by full name.
        totals: what they see is added here; filled on and below the diagonal.
        experts: those that are watched, with totals of their own.
        workers: among which work is shared out.
    """

    block: Block
    observed: Mapping[str, nn.Linear]
    totals: Mapping[str, Tensor]
    experts: ExpertTotals | None
    workers: Workers

    def run(self, inputs: Sequence[BlockInputs], index: int, tick: Callable[[], None]) -> None:
        """Add what the layers see of all streams."""
        for number, stream in enumerate(inputs):
            watch = Watch()
            with ExitStack() as stack:
                for name, layer in self.observed.items():
                    show = partial(self._show, watch, stream, name)
                    stack.callback(layer.register_forward_pre_hook(show).remove)
                if self.experts is not None:
                    weights_of = partial(_weights_of, stream, watch, f"{self.block.name}.{self.block.experts}")
                    stack.enter_context(self.experts.watching(watch, weights_of))
                self._run_stream(watch, stream, index, tick, counts=number == 0)

    def _show(self, watch: Watch, stream: BlockInputs, name: str, _: nn.Module, positional: tuple[Tensor, ...]) -> None:
        weights = _weights_of(stream, watch, name)
        watch.notes.sightings.append(Sighting(name, positional[0], positional[0].shape[:-1].numel(), weights))

    def _run_stream(
        self, watch: Watch, stream: BlockInputs, index: int, tick: Callable[[], None], *, counts: bool
    ) -> None:
        bounds = [0, *accumulate(len(hidden) for hidden in stream.hidden)]

        def run(position: int) -> Notes:
            notes = watch.begin(slice(bounds[position], bounds[position + 1]))
            with torch.no_grad(), fast_products(stream.device):
                run_block(self.block, stream.hidden[position].to(stream.device), stream.arguments[index])
            return notes

        positions, together = range(len(stream.hidden)), self._together(stream)
        for first in range(0, len(positions), together):
            sightings: list[Sighting] = []
            for notes in self.workers.map(run, positions[first : first + together]):
                sightings += notes.sightings
                if self.experts is not None:
                    self.experts.count(notes, stream.weight, counts=counts)
                tick()
            self._add(sightings, stream)

    def _together(self, stream: BlockInputs) -> int:
        """Batches whose sightings are in memory at the same time; the result does not depend on it."""
        columns = sum(layer.in_features for layer in self.observed.values())
        if self.experts is not None:
            columns += MOST_EXPERTS_PER_TOKEN * self.experts.columns
        tokens = stream.hidden[0].shape[0] * stream.hidden[0].shape[1]
        return max(1, min(self.workers.count, _SEEN_BYTES // (tokens * max(1, columns) * 4)))

    def _add(self, sightings: Sequence[Sighting], stream: BlockInputs) -> None:
        """Add sightings to their totals in their order: tile by tile, of experts, who are many, total by total."""

        def add(work: tuple[Tensor, Sequence[slice], Sequence[Sighting]]) -> None:
            total, tiles, seen = work
            with torch.no_grad(), fast_sums(stream.device):
                for each in seen:
                    rows = each.rows()
                    for tile in tiles:
                        add_to_tile(total, tile, rows, stream.weight)

        pieces: list[tuple[Tensor, Sequence[slice], Sequence[Sighting]]] = []
        ordinary = [each for each in sightings if each.total in self.totals]
        ready = [*self.workers.map(Sighting.ready, ordinary)]
        for name, total in self.totals.items():
            seen = [each for each in ready if each.total == name]
            pieces += [(total, [tile], seen) for tile in reversed(hessian_tiles(total))]
        if self.experts is not None:
            by_total: dict[int, tuple[Tensor, list[Sighting]]] = {}
            for each in sightings:
                if each.total not in self.totals:
                    total = self.experts.totals[each.total]
                    by_total.setdefault(id(total), (total, []))[1].append(each)
            pieces += [(total, hessian_tiles(total), seen) for total, seen in by_total.values()]
        self.workers.run(add, pieces)


def _weights_of(stream: BlockInputs, watch: Watch, name: str) -> Tensor | None:
    weights = stream.token_weights.get(name)
    return None if weights is None else weights[watch.windows]


def _check_finite(name: str, total: Tensor) -> None:
    if not all_finite(total):
        raise UnsupportedModelError(
            f"the inputs of {name} are not finite during calibration; "
            "use a dtype with more range (--dtype bfloat16 or float32)"
        )


def _expert_totals(block: Block, how: ExpertCalibration, only: Sequence[int] | None = None) -> ExpertTotals | None:
    layers = block.expert_layers()
    if only is not None:
        layers = {number: layers[number] for number in only}
    if not layers:
        return None
    experts = block.module.get_submodule(str(block.experts))
    assert isinstance(experts, Experts)
    return ExpertTotals(experts, layers, how)


def _finish_experts(
    block: Block, inputs: Sequence[BlockInputs], index: int, how: ExpertCalibration, own: ExpertTotals,
    totals: dict[str, Tensor], processes: Processes, workers: Workers,
) -> dict[str, Coverage]:  # fmt: skip
    """Add the Hessians of experts to the others; those that saw too few tokens see all of them in a second pass."""
    own.finish(processes)
    totals.update(own.totals)
    starved = own.starved()
    shared = _expert_totals(block, replace(how, every_token=True), starved)
    if shared is not None:
        _Pass(block, {}, {}, shared, workers).run(inputs, index, lambda: None)
        shared.finish(processes)
        totals.update(shared.totals)
    coverage = {}
    for number, layers in block.expert_layers().items():
        alone = number not in starved and not how.every_token
        for name in (layers.inner, layers.down):
            if name is not None:
                if alone or name == layers.inner:  # what enters all experts is what the block computes with
                    _check_finite(name, totals[name])
                coverage[name] = Coverage(own.tokens[number], number in starved)
    return coverage
