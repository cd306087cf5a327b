"""Run a model one block at a time: what enters the first block, what each layer sees, what leaves a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
        hidden: one ``[1, seqlen, hidden]`` tensor per window, replaced as the blocks are run.
        arguments: keyword arguments of each block (masks, position embeddings); the same for all windows, which
            have one length and no padding.
    """

    hidden: list[Tensor]
    arguments: list[dict[str, Any]]


@torch.no_grad()
def capture_inputs(model: Any, blocks: Sequence[Block], windows: Tensor) -> BlockInputs:
    """Record what enters the blocks without running them: each block hands its input on untouched.

    Args:
        model: a causal language model in eval mode.
        blocks: all its blocks in order.
        windows: int64 ``[n, seqlen]`` token ids.
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
        for window in windows:
            # The base model skips the output head, whose logits would be the largest tensor of all.
            model.base_model(input_ids=window.unsqueeze(0).to(device), use_cache=False)
    finally:
        for block in blocks:
            block.module.__dict__.pop("forward", None)
    return BlockInputs(hidden, arguments)


def run_block(block: Block, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Output of one block for one window; differentiable."""
    output: Tensor | tuple[Tensor, ...] = block.module(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def complete(model: Any, blocks: Sequence[Block], hidden: Tensor) -> Tensor:
    """What the base model makes of the last block's output, ``[1, seqlen, hidden]``: the states that enter the head."""

    def skip(passed: Tensor, *_: Any, **__: Any) -> Tensor:
        return passed

    nothing = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    try:
        for block in blocks:
            block.module.forward = skip
        blocks[-1].module.forward = lambda *_, **__: hidden.to(nothing.device)
        states: Tensor = model.base_model(input_ids=nothing, use_cache=False).last_hidden_state
    finally:
        for block in blocks:
            block.module.__dict__.pop("forward", None)
    return states


@contextmanager
def _observe(layer: nn.Linear, total: Tensor) -> Iterator[None]:
    def hook(_: nn.Module, positional: tuple[Tensor, ...]) -> None:
        accumulate_hessian(total, positional[0])

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def collect_hessians(block: Block, inputs: BlockInputs, index: int, tick: Callable[[], None]) -> list[Tensor]:
    """Hessians ``2/N sum x x^T`` of the block's input groups, float32 ``[in, in]`` each, from all windows.

    Args:
        block: still at full precision.
        inputs: as left by the blocks before it; not changed.
        index: position of the block, selects its arguments.
        tick: called after each window.

    Raises:
        UnsupportedModelError: an activation is not finite; names the layer that receives it.
    """
    totals = []
    observers = []
    for group in block.inputs:
        layer = group[0][1]  # all layers of a group see the same input, one of them is enough
        totals.append(torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device))
        observers.append(_observe(layer, totals[-1]))
    with ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer)
        for hidden in inputs.hidden:
            run_block(block, hidden, inputs.arguments[index])
            tick()
    tokens = sum(hidden.shape[1] for hidden in inputs.hidden)
    for group, total in zip(block.inputs, totals, strict=True):
        if not bool(torch.isfinite(total).all()):
            raise UnsupportedModelError(
                f"the inputs of {block.name}.{group[0][0]} are not finite during calibration; "
                "use a dtype with more range (--dtype bfloat16 or float32)"
            )
        total.mul_(2 / tokens)
    return totals


@torch.no_grad()
def propagate(block: Block, inputs: BlockInputs, index: int, tick: Callable[[], None]) -> None:
    """Replace every window's hidden state by the block's output."""
    for position, hidden in enumerate(inputs.hidden):
        inputs.hidden[position] = run_block(block, hidden, inputs.arguments[index])
        tick()
