"""How long a run will take on a CPU, roughly: what it computes, at the speed at which a little of it is computed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from matgptq.core.output_hessian import count_parts
from matgptq.core.solver import solve
from matgptq.machine.devices import MEDIUM_PRECISION, exact_products, fast_products
from matgptq.machine.workers import one_thread_each
from matgptq.models.blocks import InputGroup
from matgptq.models.divergence import Predictor, compare, kl_gradient, normalizers
from matgptq.models.logits import OutputHead
from matgptq.quantization.plan import Plan, output_hessian_bytes
from matgptq.recipe import Recipe
from matgptq.tuning.scales import Schedule, TunedLinear, fast_dtype
from matgptq.tuning.text import DEFAULT_NSAMPLES, DEFAULT_SEQLEN, HELD_OUT

_FORWARD_PASSES, _SALIENCY_PASSES = 2, 5
# Rows that are solved together come in smaller pieces: SmolLM2's take 1.4 to 2.2 times as long as each row alone, and
# move each other besides.
_JOINED_FACTOR = 2.0
_SAMPLE_ROWS, _SAMPLE_COLUMNS, _SAMPLE_GROUP = 192, 512, 64
_SAMPLE_TOKENS, _SAMPLE_VOCABULARY = 256, 4096
# Attention, norms and activations, forwards and back, beside the products: SmolLM2 takes 1.3 times as long as the
# samples with one thread, and 1.6 times with two that share a core.
_TUNING_FACTOR = 1.5


def estimate_seconds(plan: Plan, recipe: Recipe, device: torch.device, vocabulary: int) -> float | None:
    """Of all stages after the text is there.

    Takes a second or two itself.

    Args:
        plan: of the run.
        recipe: of the run.
        device: where it runs.
        vocabulary: of the model.

    Returns:
        None on GPUs, where there is no measurement to go by. Tuning counts with all of its steps, as many windows as
        a long text has, and gradients through the whole model.
    """
    if device.type != "cpu":
        return None
    if not plan.nsamples:
        return 0.0
    share = 1.0 if recipe.all_experts else plan.expert_share
    weights = _weights_met(plan, share)
    inputs = _met(plan, lambda group: group[0][1].in_features ** 2, share)
    passes = _FORWARD_PASSES + (_SALIENCY_PASSES if recipe.saliency else 0)
    outputs = output_hessian_bytes(plan.blocks, plan.rows_together) / 4 if plan.rows_together else 0
    calibration = 2.0 * plan.nsamples * plan.seqlen * (passes * weights + inputs + outputs)
    with fast_products(device):
        seconds = calibration / _products_per_second()
    with exact_products(device):
        seconds += _moving(plan, recipe) / _products_per_second()
    seconds += _solving(plan, recipe, device)
    return seconds + _tuning(plan, recipe, device, vocabulary) if recipe.tuned_bits else seconds


def _met(plan: Plan, cost: Callable[[InputGroup], float], share: float) -> float:
    """Sum over all groups of layers, of which those of experts count by a share."""
    total = 0.0
    for block in plan.blocks:
        ordinary = sum(map(cost, block.ordinary_inputs()))
        total += ordinary + share * (sum(map(cost, block.inputs)) - ordinary)
    return total


def _weights_met(plan: Plan, share: float) -> float:
    return _met(plan, lambda group: sum(layer.weight.numel() for _, layer in group), share)


def _solving(plan: Plan, recipe: Recipe, device: torch.device) -> float:
    """A row takes time by the square of its columns, in the sweeps and in the refits; experts' rows are alone."""
    factor = _JOINED_FACTOR if plan.rows_together else 1.0
    squares = _met(plan, lambda group: sum(layer.weight.numel() * layer.in_features for _, layer in group), 1 / factor)
    return factor * squares * _seconds_per_square(recipe, device) / torch.get_num_threads()


def _moving(plan: Plan, recipe: Recipe) -> float:
    """Floating-point operations by which rows that are solved together move each other."""
    total = 0.0
    for block in plan.blocks if plan.rows_together else ():
        for group in block.ordinary_inputs():
            rows = [layer.out_features for _, layer in group]
            total += sum(rows) ** 2 / count_parts(rows, plan.rows_together) * group[0][1].in_features
    # the sweep moves rows behind only, half of them
    return 2 * total * len(recipe.target_bits) * (0.5 + recipe.coordinate_passes)


def _seconds_per_square(recipe: Recipe, device: torch.device) -> float:
    """What one thread takes for a row alone, over the square of its columns."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_SAMPLE_ROWS, _SAMPLE_COLUMNS, generator=generator)
    inputs = torch.randn(2 * _SAMPLE_COLUMNS, _SAMPLE_COLUMNS, generator=generator)
    hessian, alone = inputs.T @ inputs, replace(recipe, rows_together=0)
    with one_thread_each(device):  # which is this one, so that its own time is all, whatever else runs
        taken = _fastest(lambda: solve(weight, hessian, alone, _SAMPLE_GROUP), 4, time.thread_time)
    return taken / (_SAMPLE_ROWS * _SAMPLE_COLUMNS**2)


def _tuning(plan: Plan, recipe: Recipe, device: torch.device, vocabulary: int) -> float:
    """What the full model says about the text, and for each width steps and looks at what is held out."""
    weights = _weights_met(plan, plan.expert_share)
    hidden = next(iter(plan.layers.values())).in_features
    threads, schedule = torch.get_num_threads(), Schedule(recipe.tuning_steps, 1.0)
    with one_thread_each(device), exact_products(device):
        forward = 2 * weights / _products_per_second()  # of a token
        logits = _seconds_of_logits(hidden)
        step = weights * _seconds_per_gradient(device) + vocabulary * logits.gradient
        look = forward + vocabulary * logits.kl
    of_width = recipe.tuning_steps * schedule.windows_per_step / min(threads, schedule.windows_per_step) * step
    of_width += (schedule.evaluations + 1) * HELD_OUT / min(threads, HELD_OUT) * look
    asked = (DEFAULT_NSAMPLES + HELD_OUT) / threads * forward
    return _TUNING_FACTOR * DEFAULT_SEQLEN * (asked + len(recipe.tuned_bits) * of_width)


def _seconds_per_gradient(device: torch.device) -> float:
    """Of a weight and a token, there and back through a layer whose scales are tuned, with one thread."""
    levels = torch.ones(_SAMPLE_COLUMNS, _SAMPLE_COLUMNS, dtype=torch.int8)
    scales = torch.ones(_SAMPLE_COLUMNS, _SAMPLE_COLUMNS // _SAMPLE_GROUP).requires_grad_()
    layer = TunedLinear(levels, scales, None, fast_dtype(device, torch.float32))
    inputs = torch.ones(DEFAULT_SEQLEN, _SAMPLE_COLUMNS, requires_grad=True)

    @torch.enable_grad()
    def work() -> None:
        outputs = layer(inputs)
        torch.autograd.grad(outputs, (inputs, layer.scales), outputs)

    return _fastest(work, 4, time.thread_time) / (DEFAULT_SEQLEN * levels.numel())


class _OfLogits(NamedTuple):
    """Seconds of one logit of one token, with one thread."""

    gradient: float
    kl: float


def _seconds_of_logits(hidden: int) -> _OfLogits:
    head = OutputHead(nn.Linear(hidden, _SAMPLE_VOCABULARY, bias=False).requires_grad_(False), None)
    states = torch.randn(_SAMPLE_TOKENS, hidden, generator=torch.Generator().manual_seed(0))
    sample = Predictor(head, states)
    of_full = normalizers(sample)
    count = _SAMPLE_TOKENS * _SAMPLE_VOCABULARY
    with MEDIUM_PRECISION:
        gradient = _fastest(lambda: kl_gradient(sample, of_full, sample), 4, time.thread_time)
    return _OfLogits(gradient / count, _fastest(lambda: compare([sample, sample]), 4, time.thread_time) / count)


def _products_per_second() -> float:
    """Floating-point operations a second of a product, as products are computed here."""
    size = 512
    one = torch.ones(size, size)
    with torch.no_grad():
        return 2 * size**3 / _fastest(lambda: torch.mm(one, one), 8)


def _fastest(work: Callable[[], object], times: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """A moment in which something else has the processor says nothing, nor does the first time."""
    work()
    fastest = math.inf
    for _ in range(times):
        started = clock()
        work()
        fastest = min(fastest, clock() - started)
    return fastest
