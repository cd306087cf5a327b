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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from matgptq.blocks import Block
from matgptq.devices import multiplies_bfloat16
from matgptq.teacher import chunks, output_head


def token_saliency(
    model: Any, blocks: Sequence[Block], windows: Tensor, seed: int, tick: Callable[[], None] = lambda: None
) -> dict[str, Tensor]:
    """Squared gradient norms of all quantizable layers' outputs.

    The gradient is that of ``-log p(y)`` with y drawn from the model's own prediction at each position (the Fisher
    information proper, not the loss on the text). One window at a time, each block computed again on the way back, so
    that the memory is that of one block and a piece of the logits.

    Args:
        model: a causal language model in eval mode; its parameters are left alone.
        blocks: all its blocks.
        windows: int64 ``[n, seqlen]``.
        seed: of the drawn tokens.
        tick: called after each window.

    Returns:
        float32 ``[n, seqlen]`` on the CPU for each layer, by its full name.
    """
    names = {layer: name for block in blocks for name, layer in block.layers()}
    saliency = {name: torch.zeros(windows.shape, dtype=torch.float32) for name in names.values()}
    generator = torch.Generator(model.device).manual_seed(seed)
    head = output_head(model)
    current = 0

    def observe(layer: nn.Module, _: object, output: Tensor) -> None:
        if not output.requires_grad:  # the first pass of a checkpointed block
            return
        where = saliency[names[layer]][current]  # type: ignore[index]

        def record(gradient: Tensor) -> None:
            where.copy_(gradient.float().square().sum(-1).view(-1))  # some models flatten batch and tokens

        output.register_hook(record)  # type: ignore[no-untyped-call]

    with ExitStack() as stack:
        stack.enter_context(_without_parameter_gradients(model))
        stack.enter_context(_checkpointed(blocks))
        for layer in names:
            stack.callback(layer.register_forward_hook(observe).remove)
        embedding = model.get_input_embeddings()
        stack.callback(embedding.register_forward_hook(lambda *seen: seen[2].requires_grad_()).remove)
        if multiplies_bfloat16(model.device):
            stack.enter_context(torch.autocast(model.device.type, torch.bfloat16))
        for current, window in enumerate(windows):  # noqa: B007 - observe reads it
            with torch.enable_grad():
                hidden = model.base_model(
                    input_ids=window.unsqueeze(0).to(model.device), use_cache=False
                ).last_hidden_state
                hidden.backward(_gradient_at_head(head, hidden.detach()[0], generator).unsqueeze(0))
            tick()
    return saliency


def _gradient_at_head(head: Callable[[Tensor], Tensor], hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of ``-log p(y)``, summed over positions, in the states ``[seqlen, hidden]`` that enter the head."""
    gradient = torch.empty_like(hidden)
    with torch.no_grad():
        vocabulary = head(hidden[:1]).shape[-1]
    for piece in chunks(len(hidden), vocabulary):
        states = hidden[piece].requires_grad_()
        logits = head(states)
        with torch.no_grad():  # d(-log p(y)) / dlogits = p - onehot(y)
            probabilities = torch.softmax(logits, -1)
            drawn = draw_tokens(probabilities, generator)
            probabilities.scatter_add_(1, drawn, torch.full(drawn.shape, -1.0, device=drawn.device))
        logits.backward(probabilities)  # type: ignore[no-untyped-call]
        assert states.grad is not None
        gradient[piece] = states.grad
    return gradient


def draw_tokens(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token for each row: where a uniform number falls among the cumulated probabilities.

    ``torch.multinomial`` takes ten times as long as everything else that happens at the head.

    Args:
        probabilities: float32 ``[positions, vocabulary]``, rows sum to about 1.
        generator: on the same device.

    Returns:
        int64 ``[positions, 1]``.
    """
    cumulated = probabilities.cumsum(-1)
    uniform = torch.rand(len(probabilities), 1, generator=generator, device=probabilities.device)
    drawn = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)
    return drawn.clamp_(max=probabilities.shape[-1] - 1)


def token_weights(saliency: Mapping[str, Tensor], blocks: Sequence[Block], exponent: float) -> dict[str, Tensor]:
    """Weights of tokens in the Hessian of each group of layers that share an input, with mean 1.

    Args:
        saliency: of ``token_saliency``.
        blocks: all blocks.
        exponent: of the gradient's norm: 2 for the Fisher information itself; less trusts it less, because it
            describes small errors and those of 2 bits are large.

    Returns:
        float32 ``[n, seqlen]`` by the full name of the first layer of the group.
    """
    weights = {}
    for block in blocks:
        for group in block.inputs:
            names = [f"{block.name}.{path}" for path, _ in group]
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


@contextmanager
def _checkpointed(blocks: Sequence[Block]) -> Iterator[None]:
    """Forget what happens inside each block and compute it again when its gradient is asked for."""

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*positional: Any, **keywords: Any) -> Any:
            return checkpoint(forward, *positional, use_reentrant=False, **keywords)

        return run

    for block in blocks:
        block.module.forward = wrap(block.module.forward)
    try:
        yield
    finally:
        for block in blocks:
            block.module.__dict__.pop("forward", None)
