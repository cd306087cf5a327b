"""Run a model one block at a time: what enters the first block, what each layer sees, what leaves a block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from matgptq.errors import UnsupportedModelError
from matgptq.machine.devices import fast_products
from matgptq.machine.workers import INLINE, Workers
from matgptq.models.experts import ExpertLayers, Experts
from matgptq.models.families import Family

InputGroup = tuple[tuple[str, nn.Linear], ...]  # layers that share an input, with their paths inside the block


@dataclass(frozen=True)
class Block:
    """One transformer block and its quantizable layers.

    Attributes:
        name: module path in the model.
        module: the block.
        inputs: layers grouped by shared input, ``(path inside the block, module)``, in forward order; those of experts
            come last.
        experts: path of the experts inside the block, if it has any.
    """

    name: str
    module: nn.Module
    inputs: tuple[InputGroup, ...]
    experts: str | None = None

    def layers(self) -> Iterator[tuple[str, nn.Linear]]:
        """All quantizable layers as ``(full name, module)``, in forward order."""
        for group in self.inputs:
            for path, layer in group:
                yield f"{self.name}.{path}", layer

    def ordinary_inputs(self) -> Iterator[InputGroup]:
        """The groups that every token goes through: all but those of experts."""
        return (group for group in self.inputs if self._expert_of(group) is None)

    def joined_rows(self) -> list[dict[str, int]]:
        """Numbers of rows of the layers of each of these groups, by full name."""
        return [
            {f"{self.name}.{path}": layer.out_features for path, layer in group} for group in self.ordinary_inputs()
        ]

    def outputs(self) -> Iterator[tuple[str, nn.Module]]:
        """What token weights are known for: the ordinary layers, and all experts together, by their full names."""
        for group in self.ordinary_inputs():
            for path, layer in group:
                yield f"{self.name}.{path}", layer
        if self.experts is not None:
            yield f"{self.name}.{self.experts}", self.module.get_submodule(self.experts)

    def expert_layers(self) -> dict[int, ExpertLayers]:
        """The other groups, by the number of their expert."""
        found: dict[int, dict[str, str]] = {}
        for group in self.inputs:
            number = self._expert_of(group)
            if number is not None:
                first, layer = group[0]
                expert: Any = self.module.get_submodule(f"{self.experts}.{number}")
                found.setdefault(number, {})["down" if layer is expert.down else "inner"] = f"{self.name}.{first}"
        return {number: ExpertLayers(names.get("inner"), names.get("down")) for number, names in found.items()}

    def _expert_of(self, group: InputGroup) -> int | None:
        if self.experts is None or not group[0][0].startswith(f"{self.experts}."):
            return None
        return int(group[0][0].removeprefix(f"{self.experts}.").partition(".")[0])


def block_modules(model: nn.Module, family: Family) -> list[nn.Module]:
    """The transformer blocks of a model in order, quantized or not; raises ``UnsupportedModelError`` if it has none."""
    try:
        blocks = list(model.get_submodule(family.blocks).children())
    except AttributeError:
        blocks = []
    if not blocks:
        raise UnsupportedModelError(f"{type(model).__name__} has no {family.blocks}: not a causal language model?")
    return blocks


def find_blocks(model: nn.Module, family: Family) -> list[Block]:
    """The blocks of a model, with every Linear in them accounted for.

    Experts must be unfused (``matgptq.models.experts``).

    Raises:
        UnsupportedModelError: a layer of the family is missing, is not a Linear, or a block holds a Linear that the
            family does not describe (it would be left out silently).
    """
    blocks = []
    for index, module in enumerate(block_modules(model, family)):
        name = f"{family.blocks}.{index}"
        linears = {path: layer for path, layer in module.named_modules() if isinstance(layer, nn.Linear)}
        experts = _experts_in(module, name, family)
        inputs = family.block_inputs(None if experts is None else len(experts))
        wanted = {path: None for group in inputs for path in group}
        kept = () if family.experts is None else family.experts.kept
        missing = [path for path in wanted if path not in linears]
        extra = [path for path in linears if path not in wanted and path not in kept]
        if missing or extra:
            problem = f"has no Linear {missing[0]}" if missing else f"has a Linear {extra[0]} that is not described"
            raise UnsupportedModelError(
                f"block {name} {problem} in matgptq.models.families: this variant is not supported"
            )
        groups = tuple(tuple((path, linears[path]) for path in group) for group in inputs)
        path_of_experts = family.experts.path if family.experts is not None and experts is not None else None
        blocks.append(Block(name, module, groups, path_of_experts))
    return blocks


def expand_paths(block: nn.Module, paths: Sequence[str]) -> tuple[str, ...]:
    """Those of some paths that a block has; one with a ``*`` stands for the same layer of every expert."""
    modules = dict(block.named_modules())
    found: list[str] = []
    for path in paths:
        before, star, after = path.partition("*")
        if not star:
            found += [path] if path in modules else []
            continue
        matches = (name[len(before) :].partition(after) for name in modules if name.startswith(before))
        found += [f"{before}{number}{after}" for number, end, rest in matches if end and number.isdecimal()
                  and not rest]  # fmt: skip
    return tuple(found)


def _experts_in(module: nn.Module, name: str, family: Family) -> Experts | None:
    if family.experts is None:
        return None
    try:
        experts = module.get_submodule(family.experts.path)
    except AttributeError:
        return None
    if not isinstance(experts, Experts):
        raise UnsupportedModelError(f"block {name}: {family.experts.path} is a {type(experts).__name__}, still fused")
    return experts


@dataclass
class BlockInputs:
    """What the blocks are called with.

    Attributes:
        hidden: one ``[batch, seqlen, hidden]`` tensor per batch of windows, replaced as the blocks are run; in memory
            or in files (``matgptq.quantization.activations``).
        arguments: keyword arguments of each block (masks, position embeddings); the same for all batches, which
            have one shape and no padding.
        weight: of each token in the Hessians.
        token_weights: ``[n, seqlen]`` further weights for the groups of layers that share an input, by the full name
            of the first layer, and for all experts of a block by the experts' full name; a group that is not there
            counts all tokens alike.
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


@contextmanager
def replaced_forwards(
    modules: Sequence[nn.Module], make: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Inside, each module's ``forward`` is ``make(number, its own)``."""
    try:
        for index, module in enumerate(modules):
            module.forward = make(index, module.forward)
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


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
    with replaced_forwards([block.module for block in blocks], lambda index, _: recorder(index)):
        for together in torch.split(windows, batch):
            # The base model skips the output head, whose logits would be the largest tensor of all.
            model.base_model(input_ids=together.to(device), use_cache=False)
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

    with replaced_forwards([block.module for block in blocks], lambda *_: skip):
        yield


@contextmanager
def ending(model: Any, blocks: Sequence[Block]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside, what follows the blocks: from the last block's output to the states that enter the head.

    Both are ``[1, seqlen, hidden]``. Differentiable; no block's weights are needed. May be called in several threads.
    """
    device = model.get_input_embeddings().weight.device
    of_thread = threading.local()

    def complete(hidden: Tensor) -> Tensor:
        of_thread.hidden = hidden.to(device)
        nothing = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=device)
        states: Tensor = model.base_model(input_ids=nothing, use_cache=False).last_hidden_state
        return states

    with skipped(blocks):
        blocks[-1].module.forward = lambda *_, **__: of_thread.hidden
        yield complete


def complete(model: Any, blocks: Sequence[Block], hidden: Tensor) -> Tensor:
    """What the base model makes of the last block's output; see ``ending``."""
    with ending(model, blocks) as rest:
        return rest(hidden)


def propagate(
    block: Block,
    inputs: Sequence[BlockInputs],
    index: int,
    tick: Callable[[], None],
    into: Sequence[MutableSequence[Tensor]] | None = None,
    workers: Workers = INLINE,
) -> None:
    """Replace every hidden state by the block's output.

    Args:
        block: with the weights to compute with.
        inputs: states that enter it; afterwards those that leave it.
        index: position of the block, selects its arguments.
        tick: called after each batch.
        into: an empty list for each stream, to hold the new states from now on; None replaces the old ones in place.
        workers: among which batches are shared out.
    """
    for number, stream in enumerate(inputs):
        run = partial(_leave, block, stream, index)
        for position, output in enumerate(workers.map(run, range(len(stream.hidden)))):
            if into is None:
                stream.hidden[position] = output
            else:
                into[number].append(output)
            tick()
        if into is not None:
            stream.hidden = into[number]


def _leave(block: Block, stream: BlockInputs, index: int, position: int) -> Tensor:
    """What leaves a block where a batch of windows enters it."""
    hidden = stream.hidden[position]
    with torch.no_grad(), fast_products(stream.device):
        # The residual stream keeps its dtype; only products are rounded.
        return run_block(block, hidden.to(stream.device), stream.arguments[index]).to(hidden.dtype)
