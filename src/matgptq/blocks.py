"""Run a model one block at a time: what enters the first block, what each layer sees, what leaves a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from matgptq.devices import fast_products
from matgptq.distributed import ALONE, Processes
from matgptq.errors import UnsupportedModelError
from matgptq.families import Family
from matgptq.hessian import accumulate_hessian


@dataclass(frozen=True)
class Block:
    """One transformer block and its quantizable layers.

    Attributes:
        name: module path in the model.
        module: the block.
        inputs: layers grouped by shared input, ``(path inside the block, module)``, in forward order.
    """

    name: str
    module: nn.Module
    inputs: tuple[tuple[tuple[str, nn.Linear], ...], ...]

    def layers(self) -> Iterator[tuple[str, nn.Linear]]:
        """All quantizable layers as ``(full name, module)``, in forward order."""
        for group in self.inputs:
            for path, layer in group:
                yield f"{self.name}.{path}", layer


def find_blocks(model: nn.Module, family: Family) -> list[Block]:
    """The blocks of a model, with every Linear in them accounted for.

    Raises:
        UnsupportedModelError: a layer of the family is missing, is not a Linear, or a block holds a Linear that the
            family does not describe (it would be left out silently).
    """
    try:
        modules = model.get_submodule(family.blocks)
    except AttributeError:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {family.blocks}: not a causal language model?"
        ) from None
    if not isinstance(modules, nn.ModuleList):
        raise UnsupportedModelError(f"{family.blocks} of {type(model).__name__} is not a list of blocks")
    blocks = []
    for index, module in enumerate(modules):
        name = f"{family.blocks}.{index}"
        linears = {path: layer for path, layer in module.named_modules() if isinstance(layer, nn.Linear)}
        missing = [path for path in family.layers if path not in linears]
        extra = [path for path in linears if path not in family.layers]
        if missing or extra:
            problem = f"has no Linear {missing[0]}" if missing else f"has a Linear {extra[0]} that is not described"
            raise UnsupportedModelError(f"block {name} {problem} in matgptq.families: this variant is not supported")
        groups = tuple(tuple((path, linears[path]) for path in group) for group in family.inputs)
        blocks.append(Block(name, module, groups))
    if not blocks:
        raise UnsupportedModelError(f"{family.blocks} is empty")
    return blocks


@dataclass
class BlockInputs:
    """What the blocks are called with.

    Attributes:
        hidden: one ``[batch, seqlen, hidden]`` tensor per batch of windows, replaced as the blocks are run; in memory
            or in files (``matgptq.activations``).
        arguments: keyword arguments of each block (masks, position embeddings); the same for all batches, which
            have one shape and no padding.
        weight: of each token in the Hessians.
        token_weights: ``[n, seqlen]`` further weights for the groups of layers that share an input, by the full name
            of the first layer; a group that is not there counts all tokens alike.
        device: where blocks are run; states in files are brought there.
    """

    hidden: MutableSequence[Tensor]
    arguments: list[dict[str, Any]]
    weight: float = 1.0
    token_weights: Mapping[str, Tensor] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def tokens(self) -> int:
        """Number of tokens in all windows."""
        return sum(hidden.shape[0] * hidden.shape[1] for hidden in self.hidden)


@torch.no_grad()
def capture_inputs(
    model: Any,
    blocks: Sequence[Block],
    windows: Tensor,
    *,
    batch: int = 1,
    weight: float = 1.0,
    token_weights: Mapping[str, Tensor] | None = None,
) -> BlockInputs:
    """Record what enters the blocks without running them: each block hands its input on untouched.

    Args:
        model: a causal language model in eval mode.
        blocks: all its blocks in order.
        windows: int64 ``[n, seqlen]`` token ids.
        batch: windows that are run together, divides n.
        weight: of each token in the Hessians.
        token_weights: see ``BlockInputs``.
    """
    hidden: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def recorder(index: int) -> Callable[..., Tensor]:
        def record(hidden_states: Tensor, *positional: Any, **keywords: Any) -> Tensor:
            if positional:
                raise UnsupportedModelError(f"{blocks[index].name} is called with positional arguments")
            if index == 0:
                hidden.append(hidden_states.detach())
            if len(arguments) == index:
                arguments.append(keywords)
            return hidden_states

        return record

    device = model.get_input_embeddings().weight.device
    try:
        for index, block in enumerate(blocks):
            block.module.forward = recorder(index)
        for together in torch.split(windows, batch):
            # The base model skips the output head, whose logits would be the largest tensor of all.
            model.base_model(input_ids=together.to(device), use_cache=False)
    finally:
        for block in blocks:
            block.module.__dict__.pop("forward", None)
    return BlockInputs(hidden, arguments, weight, token_weights or {}, device)


def run_block(block: Block, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Output of one block for one batch of windows; differentiable."""
    output: Tensor | tuple[Tensor, ...] = block.module(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def skipped(blocks: Sequence[Block]) -> Iterator[None]:
    """Inside, every block hands on what it gets, so that its weights are not needed."""

    def skip(passed: Tensor, *_: Any, **__: Any) -> Tensor:
        return passed

    try:
        for block in blocks:
            block.module.forward = skip
        yield
    finally:
        for block in blocks:
            block.module.__dict__.pop("forward", None)


def complete(model: Any, blocks: Sequence[Block], hidden: Tensor) -> Tensor:
    """What the base model makes of the last block's output, ``[1, seqlen, hidden]``: the states that enter the head.

    Differentiable; no block's weights are needed.
    """
    nothing = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    with skipped(blocks):
        blocks[-1].module.forward = lambda *_, **__: hidden.to(nothing.device)
        states: Tensor = model.base_model(input_ids=nothing, use_cache=False).last_hidden_state
    return states


def _accumulate(
    block: Block, stream: BlockInputs, index: int, observed: Mapping[str, nn.Linear], totals: Mapping[str, Tensor],
    tick: Callable[[], None],
) -> None:  # fmt: skip
    """Run a block over one stream and add what the observed layers see to their totals, all by full name."""
    batch = slice(0, 0)  # windows that are being run; a layer may see them flattened

    def show(name: str, _: nn.Module, positional: tuple[Tensor, ...]) -> None:
        weights = stream.token_weights.get(name)
        accumulate_hessian(totals[name], positional[0], stream.weight, None if weights is None else weights[batch])

    with ExitStack() as stack:
        stack.enter_context(fast_products(stream.device))
        for name, layer in observed.items():
            stack.callback(layer.register_forward_pre_hook(partial(show, name)).remove)
        for hidden in stream.hidden:
            batch = slice(batch.stop, batch.stop + len(hidden))
            run_block(block, hidden.to(stream.device), stream.arguments[index])
            tick()


@torch.no_grad()
def collect_hessians(
    block: Block,
    inputs: Sequence[BlockInputs],
    index: int,
    tick: Callable[[], None],
    processes: Processes = ALONE,
) -> list[Tensor]:
    """Hessians of the block's input groups: twice the weighted mean of ``x x^T`` over all tokens.

    Args:
        block: still at full precision.
        inputs: as left by the blocks before it; not changed.
        index: position of the block, selects its arguments.
        tick: called after each batch.
        processes: among which the tokens are shared out; each gets the sums over all.

    Returns:
        One float32 ``[in, in]`` for each group.

    Raises:
        UnsupportedModelError: an activation is not finite; names the layer that receives it.
    """
    # All layers of a group see the same input, one of them is enough.
    observed = {f"{block.name}.{group[0][0]}": group[0][1] for group in block.inputs}
    totals = {
        name: torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)
        for name, layer in observed.items()
    }
    for stream in inputs:
        _accumulate(block, stream, index, observed, totals, tick)
    weight = torch.tensor([stream.weight * stream.tokens for stream in inputs], dtype=torch.float64).sum()
    processes.add([*totals.values(), weight])
    for name, total in totals.items():
        if not bool(torch.isfinite(total).all()):
            raise UnsupportedModelError(
                f"the inputs of {name} are not finite during calibration; "
                "use a dtype with more range (--dtype bfloat16 or float32)"
            )
        total.mul_(2 / float(weight))
    return [*totals.values()]


@torch.no_grad()
def propagate(
    block: Block,
    inputs: Sequence[BlockInputs],
    index: int,
    tick: Callable[[], None],
    into: Sequence[MutableSequence[Tensor]] | None = None,
) -> None:
    """Replace every hidden state by the block's output.

    Args:
        block: with the weights to compute with.
        inputs: states that enter it; afterwards those that leave it.
        index: position of the block, selects its arguments.
        tick: called after each batch.
        into: an empty list for each stream, to hold the new states from now on; None replaces the old ones in place.
    """
    for number, stream in enumerate(inputs):
        with fast_products(stream.device):
            for position, hidden in enumerate(stream.hidden):
                # The residual stream keeps its dtype; only products are rounded.
                output = run_block(block, hidden.to(stream.device), stream.arguments[index]).to(hidden.dtype)
                if into is None:
                    stream.hidden[position] = output
                else:
                    into[number].append(output)
                tick()
        if into is not None:
            stream.hidden = into[number]
