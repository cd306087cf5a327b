"""The gradient of the custom product, the optimiser, and the promise that nothing gets worse."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matgptq.core.grid import storable_scales
from matgptq.errors import ConfigurationError
from matgptq.slicing import dequantize, slice_levels
from matgptq.tuning.scales import ScaledProduct, ScaleVector, Schedule, TunedLinear, TuningState, tune


def random_layer(out: int, groups: int, group_size: int, bits: int = 3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (out, groups * group_size), generator=generator, dtype=torch.uint8)
    scales = storable_scales(torch.randn(out, groups, generator=generator) * 0.02)
    return codes, scales, slice_levels(codes, bits, torch.int8)


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(1, 9),
    groups=st.integers(1, 4),
    group_size=st.integers(1, 8),
    leading=st.sampled_from([(1,), (5,), (2, 3)]),
    seed=st.integers(0, 2**31),
)
def test_gradient_is_autograds(out: int, groups: int, group_size: int, leading: tuple[int, ...], seed: int) -> None:
    _, scales, levels = random_layer(out, groups, group_size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, groups * group_size, generator=generator, dtype=torch.float64, requires_grad=True)
    mine = scales.double().requires_grad_()
    plain = scales.double().requires_grad_()
    x_plain = x.detach().clone().requires_grad_()
    upstream = torch.randn(*leading, out, generator=generator, dtype=torch.float64)

    result = ScaledProduct.apply(x, levels, mine, torch.float64)
    weight = (levels.double().view(out, groups, -1) * plain.unsqueeze(-1)).view(out, -1)
    expected = x_plain @ weight.T
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-12)
    result.backward(upstream)
    expected.backward(upstream)
    assert torch.allclose(mine.grad, plain.grad, rtol=1e-10, atol=1e-10)
    assert torch.allclose(x.grad, x_plain.grad, rtol=1e-10, atol=1e-10)


def test_bfloat16_products_keep_the_direction_of_the_gradient() -> None:
    _, scales, levels = random_layer(32, 4, 16)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = scales.clone().requires_grad_()
        ScaledProduct.apply(x, levels, leaf, dtype).square().mean().backward()
        gradients.append(leaf.grad)
    assert torch.cosine_similarity(*(g.flatten() for g in gradients), dim=0) > 0.999


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_without_gradients_products_are_exact(bits: int) -> None:
    codes, scales, levels = random_layer(12, 3, 8, bits)
    layer = TunedLinear(levels, scales, torch.randn(12), torch.bfloat16)
    x = torch.randn(5, 24)
    with torch.no_grad():
        expected = torch.nn.functional.linear(x, dequantize(codes, scales, bits), layer.bias)
        assert torch.allclose(layer(x), expected, rtol=1e-6, atol=1e-6)


class Regression:
    """A layer that should put out what another one does."""

    def __init__(self, seed: int = 0) -> None:
        codes, scales, levels = random_layer(8, 4, 8, bits=3, seed=seed)
        self.layer = TunedLinear(levels, scales, None, torch.float32)
        generator = torch.Generator().manual_seed(seed + 1)
        self.weight = dequantize(codes, scales * (1 + 0.2 * torch.randn(scales.shape, generator=generator)), 3)
        self.x = torch.randn(6, 10, 32, generator=generator)
        self.scales = ScaleVector({"layer": self.layer})
        self.evaluations = 0

    def loss(self, window: int) -> torch.Tensor:
        return (self.layer(self.x[window]) - self.x[window] @ self.weight.T).square().mean()

    def gradient(self, windows: Sequence[int]) -> torch.Tensor:
        return self.scales.gradient(sum(self.loss(window) for window in windows) / len(windows))

    @torch.no_grad()
    def held_out_loss(self) -> float:
        self.evaluations += 1
        return float(self.loss(5))

    def tune(self, schedule: Schedule, **options) -> TuningState:
        return tune(self.scales, 5, self.gradient, self.held_out_loss, schedule, **options)


def test_tuning_finds_the_scales() -> None:
    task = Regression()
    before, levels = task.scales.start.clone(), task.layer.levels.clone()
    state = task.tune(Schedule(200, 2e-2))
    assert state.loss_after < 0.02 * state.loss_before
    assert task.held_out_loss() == pytest.approx(state.loss_after)
    assert torch.equal(task.scales.values, storable_scales(task.scales.values))
    assert torch.equal(task.scales.values.sign(), before.sign())
    assert torch.equal(task.layer.levels, levels)
    assert torch.equal(task.scales.by_layer()["layer"], task.layer.scales)


def test_each_layer_moves_at_its_own_pace() -> None:
    layers = {}
    for name, pace in (("slow", 0.25), ("fast", 1.0)):
        _, scales, levels = random_layer(8, 4, 8)
        layers[name] = TunedLinear(levels, scales, None, torch.float32, pace)
    scales = ScaleVector(layers)
    state = tune(
        scales, 1, lambda _: torch.ones_like(scales.start), lambda: -float(scales.values.sum()), Schedule(1, 0.2)
    )
    slow, fast = state.logarithms.abs().chunk(2)
    assert torch.allclose(4 * slow, fast)
    assert bool((fast > 0).all())


@pytest.mark.parametrize("rate", [1e-3, 0.3, 5.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_never_worse(rate: float, seed: int) -> None:
    task = Regression(seed)
    before = task.held_out_loss()
    state = task.tune(Schedule(12, rate, evaluations=6))
    assert task.held_out_loss() <= before
    assert state.loss_before == before
    assert state.loss_after == task.held_out_loss()


def test_a_start_that_cannot_be_improved_stays_and_ends_early() -> None:
    task = Regression()
    task.weight = (task.layer.levels.view(8, 4, 8) * task.layer.scales.detach()[..., None]).view(8, 32)
    state = task.tune(Schedule(100, 1e-2, evaluations=20, patience=3))
    assert torch.equal(task.scales.values, task.scales.start)
    assert state.step == 15
    assert state.finished


def test_adam_is_pytorchs() -> None:
    task, other = Regression(), Regression()
    schedule = Schedule(9, 1e-2, windows_per_step=1, evaluations=1)
    states: list[torch.Tensor] = []
    task.tune(schedule, save=lambda state: states.append(state.logarithms.clone()))
    logarithms = torch.zeros_like(other.scales.start).requires_grad_()
    optimizer = torch.optim.Adam([logarithms], betas=(0.9, 0.95), eps=1e-12)
    for step in range(9):
        logarithms.grad = other.gradient(schedule.windows(step, 5)) * other.scales.values
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        optimizer.step()
        other.scales.multiply(logarithms.detach())
    assert torch.allclose(states[-1], logarithms, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_going_on_gives_the_same_bits(stop: int) -> None:
    schedule = Schedule(16, 1e-2, evaluations=4)
    kept: list[dict[str, torch.Tensor]] = []
    whole = Regression()
    expected = whole.tune(schedule, save=lambda state: kept.append(copy.deepcopy(state.to_tensors())))
    again = Regression()
    state = again.tune(schedule, state=TuningState.from_tensors(kept[stop]))
    assert torch.equal(again.scales.values, whole.scales.values)
    assert state.history == expected.history
    finished = Regression()
    finished.tune(schedule, state=TuningState.from_tensors(kept[-1]))
    assert finished.evaluations == 0
    assert torch.equal(finished.scales.values, whole.scales.values)


@given(steps=st.integers(1, 60), per_step=st.integers(1, 5), count=st.integers(1, 20), evaluations=st.integers(1, 70))
def test_schedule(steps: int, per_step: int, count: int, evaluations: int) -> None:
    schedule = Schedule(steps, 1e-3, per_step, evaluations)
    seen = [window for step in range(steps) for window in schedule.windows(step, count)]
    assert len(seen) == steps * per_step
    for first in range(0, len(seen) - count + 1, count):
        assert sorted(seen[first : first + count]) == list(range(count))
    assert schedule.is_evaluated(steps)
    assert sum(schedule.is_evaluated(step) for step in range(1, steps + 1)) == min(evaluations, steps)
    assert all(0 < schedule.rate(step) <= 1e-3 for step in range(steps))


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"patience": 0}]
)
def test_refusals(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong)).replace("_", " ")):
        Schedule(**{"steps": 4, "learning_rate": 1e-3, **wrong})


def test_a_state_from_a_file_moves_to_where_the_scales_are() -> None:
    state = TuningState.begin(torch.ones(3)).to(torch.device("meta"))
    tensors = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 4
    assert all(each.is_meta for each in tensors)
