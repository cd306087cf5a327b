"""How much a model's predictions depend on each layer's output, token by token.

The solver minimises ``sum_t ||(W - W_r) x_t||^2``, as if all tokens mattered alike. To second order the loss of the
whole model grows by the Fisher information of the outputs instead: with ``g_t`` the gradient of the model's own
log-likelihood in a layer's output at token t, by ``sum_t (g_t . (W - W_r) x_t)^2``. Keeping one number of it for each
token, ``||g_t||^2``, leaves the rows of W independent and turns the Hessian into ``sum_t ||g_t||^2 x_t x_t^T``
(the end-loss guidance of GuidedQuant, arXiv 2505.07004, with a single group of output channels).

An attention sink shows in it by itself: what the first position's value vector says is read by every later token, and
its query by none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from matgptq.core.output_hessian import OutputHessian
from matgptq.machine.devices import fast_attention, multiplies_bfloat16
from matgptq.machine.workers import INLINE, Workers
from matgptq.models.blocks import Block, capture_inputs, ending, run_block
from matgptq.models.logits import OutputHead, chunks, output_head, softmax_
from matgptq.models.residency import Residency

_Result = TypeVar("_Result")

_STRETCH = 128  # of the vocabulary, when a token is drawn


def token_saliency(
    residency: Residency,
    blocks: Sequence[Block],
    windows: Tensor,
    seed: int,
    tick: Callable[[], None] = lambda: None,
    *,
    windows_together: int | None = None,
    first_window: int = 0,
    workers: Workers = INLINE,
    output_hessians: Sequence[OutputHessian] = (),
    exponent: float = 2.0,
) -> dict[str, Tensor]:
    """Squared gradient norms of all quantizable layers' outputs.

    The gradient is that of ``-log p(y)`` with y drawn from the model's own prediction at each position (the Fisher
    information proper, not the loss on the text). A few windows at a time go through the blocks and leave what enters
    each; on the way back every block is computed again, so that neither a graph nor the weights of more than one block
    are needed at once.

    Args:
        residency: of a causal language model in eval mode; its parameters are left alone.
        blocks: all its blocks.
        windows: int64 ``[n, seqlen]``.
        seed: of the drawn tokens.
        tick: called for each window after each block, there and back.
        first_window: number of the first of these windows among all; each draws its tokens by a seed of its own.
        windows_together: how many go through the blocks at a time, by default all; results do not depend on it.
        workers: among which windows are shared out.
        output_hessians: of some layers by their full names; what the windows say is added to them.
        exponent: by which tokens count in these, see ``OutputHessian.add``.

    Returns:
        float32 ``[n, seqlen]`` on the CPU for each layer, by its full name; for the experts of a block one for the sum
        of what they put out, which times the router's weight squared is that of each of them.
    """
    network = residency.network
    names = [name for block in blocks for name, _ in block.outputs()]
    saliency = {name: torch.zeros(windows.shape, dtype=torch.float32) for name in names}
    head = output_head(network, blocks)
    if multiplies_bfloat16(network.device):
        head = _in_bfloat16(head)
    together = max(1, len(windows)) if windows_together is None else windows_together
    with _without_parameter_gradients(network):
        for first in range(0, len(windows), together):
            part = windows[first : first + together]
            rows = {name: values[first : first + together] for name, values in saliency.items()}
            seeds = [_window_seed(seed, first_window + first + number) for number in range(len(part))]
            outputs = _Outputs(output_hessians, exponent)
            _Part(part, rows, outputs, seeds, head, workers, tick).see(residency, blocks)
    return saliency


@dataclass(frozen=True)
class _Outputs:
    """Output Hessians that are summed.

    Attributes:
        hessians: of layers by their full names.
        exponent: by which tokens count.
    """

    hessians: Sequence[OutputHessian]
    exponent: float

    def watched(self) -> frozenset[str]:
        """Full names of the layers whose gradients are wanted."""
        return frozenset(name for each in self.hessians for name in each.layers)

    def add(self, windows: Sequence[Mapping[str, Tensor]], workers: Workers) -> None:
        """Add what windows say, of each the gradients ``[tokens, rows]`` in the outputs of a block's watched layers."""
        for hessian in self.hessians:
            seen = [each for each in windows if all(name in each for name in hessian.layers)]
            if seen:
                hessian.add([[each[name] for name in hessian.layers] for each in seen], self.exponent, workers)


@dataclass(frozen=True)
class _Part:
    """Some windows that go through the blocks together, each in a thread of its own for as long as it is in a block.

    Attributes:
        windows: int64 ``[n, seqlen]``.
        saliency: their rows of what is found, by layer.
        outputs: what else is found.
        seeds: of the tokens that each draws.
        head: the model's.
        workers: among which windows are shared out.
        tick: called for each window after each block, there and back.
    """

    windows: Tensor
    saliency: Mapping[str, Tensor]
    outputs: _Outputs
    seeds: Sequence[int]
    head: OutputHead
    workers: Workers
    tick: Callable[[], None]

    def see(self, residency: Residency, blocks: Sequence[Block]) -> None:
        """Run the windows through the model and back."""
        network = residency.network
        inputs = capture_inputs(network, blocks, self.windows)
        states = [list(inputs.hidden)]  # what enters each block, by window
        for block, arguments in zip(blocks, inputs.arguments, strict=True):
            with residency.present(block):
                leave = partial(self._leave, network, block, arguments)
                states.append([*self._ticked(self.workers.map(leave, states[-1]))])
        with ending(network, blocks) as rest:
            begin = partial(self._gradient_at_end, network, rest)
            gradients = [*self.workers.map(begin, zip(states.pop(), self.seeds, strict=True))]
        for block, arguments in zip(reversed(blocks), reversed(inputs.arguments), strict=True):
            watch = _WatchedWindow()
            with residency.present(block), _observed(block, self.saliency, self.outputs.watched(), watch):
                back = partial(self._gradient_at_entry, network, block, arguments, watch)
                found = [*self._ticked(self.workers.map(back, zip(count(), states.pop(), gradients)))]
            gradients = [gradient for gradient, _ in found]
            self.outputs.add([seen for _, seen in found], self.workers)

    def _ticked(self, results: Iterator[_Result]) -> Iterator[_Result]:
        for result in results:
            self.tick()
            yield result

    def _leave(self, network: Any, block: Block, arguments: dict[str, Any], hidden: Tensor) -> Tensor:
        with torch.no_grad(), _products_of(network):
            return run_block(block, hidden, arguments)

    def _gradient_at_end(self, network: Any, rest: Callable[[Tensor], Tensor], entering: tuple[Tensor, int]) -> Tensor:
        """The gradient in what leaves the last block."""
        hidden, seed = entering
        generator = torch.Generator(hidden.device).manual_seed(seed)
        with torch.enable_grad(), _products_of(network):
            last = hidden.requires_grad_()
            states = rest(last)
            states.backward(_gradient_at_head(self.head, states.detach()[0], generator).unsqueeze(0))  # type: ignore[no-untyped-call]
        return _gradient(last)

    def _gradient_at_entry(
        self,
        network: Any,
        block: Block,
        arguments: dict[str, Any],
        watch: _WatchedWindow,
        entering: tuple[int, Tensor, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient in what enters a block, by that in what leaves it, and those in the outputs of its layers."""
        watch.number, hidden, gradient = entering
        watch.seen = {}
        with torch.enable_grad(), _products_of(network):
            entered = hidden.requires_grad_()
            run_block(block, entered, arguments).backward(gradient)  # type: ignore[no-untyped-call]
        return _gradient(entered), watch.seen


class _WatchedWindow(threading.local):
    """Which of a part's windows a thread runs, and the gradients ``[tokens, rows]`` that are kept of it, by layer."""

    number: int
    seen: dict[str, Tensor]


@contextmanager
def _products_of(network: Any) -> Iterator[None]:
    """Multiply in bfloat16 where that is faster; autocast is each thread's own."""
    if not multiplies_bfloat16(network.device):
        yield
        return
    with torch.autocast(network.device.type, torch.bfloat16), fast_attention(network.device):
        yield


def _in_bfloat16(head: OutputHead) -> OutputHead:
    """The head as autocast sees it, rounded once and not for every piece of the logits."""
    module = head.module
    if type(module) is not nn.Linear:
        return head
    rounded = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    for name, parameter in module.named_parameters():
        setattr(rounded, name, nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False))
    return replace(head, module=rounded)


def _window_seed(seed: int, window: int) -> int:
    """Different for each window, and independent of how windows are shared out."""
    return seed * 1_000_003 + window


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


@contextmanager
def _observed(
    block: Block, saliency: Mapping[str, Tensor], kept: frozenset[str], watch: _WatchedWindow
) -> Iterator[None]:
    """Inside, a backward pass through the block notes what it finds of the gradients in its layers' outputs.

    Those of the layers named ``kept`` are kept as they are.
    """

    def observe(name: str, _: nn.Module, __: object, output: Tensor) -> None:
        window, seen = watch.number, watch.seen  # the backward pass may run in another thread

        def record(gradient: Tensor) -> None:
            # some models flatten batch and tokens
            saliency[name][window].copy_(gradient.float().square().sum(-1).view(-1))
            if name in kept:
                seen[name] = gradient.flatten(0, -2)

        output.register_hook(record)  # type: ignore[no-untyped-call]

    with ExitStack() as stack:
        for name, layer in block.outputs():
            stack.callback(layer.register_forward_hook(partial(observe, name)).remove)
        yield


def _gradient_at_head(head: OutputHead, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of ``-log p(y)``, summed over positions, in the states ``[seqlen, hidden]`` that enter the head."""
    gradient = torch.empty_like(hidden)
    with torch.no_grad():
        vocabulary = head(hidden[:1]).shape[-1]
    for piece in chunks(len(hidden), vocabulary):
        states = hidden[piece].requires_grad_()
        logits = head(states)
        with torch.no_grad():  # d(-log p(y)) / dlogits = p - onehot(y)
            probabilities = softmax_(logits.detach())
            drawn = draw_tokens(probabilities, generator)
            probabilities.scatter_add_(1, drawn, torch.full(drawn.shape, -1.0, device=drawn.device))
        logits.backward(probabilities)  # type: ignore[no-untyped-call]
        assert states.grad is not None
        gradient[piece] = states.grad
    return gradient


def draw_tokens(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token for each row: where a uniform number falls among the cumulated probabilities.

    First among those of stretches, then among those of the stretch it falls in: to cumulate a whole vocabulary takes
    half as long as to multiply by the head, and ``torch.multinomial`` ten times as long as all that happens there.

    Args:
        probabilities: float32 ``[positions, vocabulary]``, rows sum to about 1.
        generator: on the same device.

    Returns:
        int64 ``[positions, 1]``.
    """
    rows, vocabulary = probabilities.shape
    if vocabulary % _STRETCH:
        probabilities = functional.pad(probabilities, (0, -vocabulary % _STRETCH))
    stretches = probabilities.view(rows, -1, _STRETCH)
    cumulated = stretches.sum(-1).cumsum(-1)
    target = torch.rand(rows, 1, generator=generator, device=probabilities.device) * cumulated[:, -1:]
    chosen = torch.searchsorted(cumulated, target, right=True).clamp_(max=cumulated.shape[1] - 1)
    before = functional.pad(cumulated, (1, 0)).gather(1, chosen)
    inside = stretches[torch.arange(rows, device=chosen.device), chosen[:, 0]].cumsum(-1)
    place = torch.searchsorted(inside, target - before, right=True).clamp_(max=_STRETCH - 1)
    return (chosen * _STRETCH + place).clamp_(max=vocabulary - 1)


def token_weights(saliency: Mapping[str, Tensor], blocks: Sequence[Block], exponent: float) -> dict[str, Tensor]:
    """Weights of tokens in the Hessian of each group of layers that share an input, with mean 1.

    Args:
        saliency: of ``token_saliency``.
        blocks: all blocks.
        exponent: of the gradient's norm: 2 for the Fisher information itself; less trusts it less, because it
            describes small errors and those of 2 bits are large.

    Returns:
        float32 ``[n, seqlen]`` by the full name of the first layer of the group, or by that of a block's experts.
    """
    weights = {}
    for block in blocks:
        groups = [[f"{block.name}.{path}" for path, _ in group] for group in block.ordinary_inputs()]
        for names in groups if block.experts is None else [*groups, [f"{block.name}.{block.experts}"]]:
            together = torch.stack([saliency[name] for name in names]).sum(0) ** (exponent / 2)
            mean = together.mean()
            if mean > 0:
                weights[names[0]] = together / mean
    return weights


@contextmanager
def _without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
