"""Tune the group scales of one width by gradient, until the model predicts as the full one does. Codes stay.

The scale of row i and group g is ``s = storable(s_0 * exp(m))``: a multiplier ``exp(m)`` on what the solver found, so
that the sign stays and a step means the same relative change everywhere. What is trained is always what will be
stored; the gradient passes through the rounding as if it were not there (Bengio et al., arXiv 1308.3432). Training
nothing but step sizes end to end is the second phase of EfficientQAT (arXiv 2407.11062); here all widths share the
codes, and each width's scales are its own.

Products run in bfloat16 where the hardware multiplies it, the gradient of a scale is
``dL/ds_ig = sum_(j in g) (dL/dW)_ij * level_ij``, and no dense float weight outlives a product, so that memory is one
byte for each weight and the activations of the windows at work.

The windows of a step are shared out among threads, one of PyTorch's each, and their gradients are added up in the
windows' order, so that the scales found don't depend on how many threads there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from matgptq.core.grid import storable_scales
from matgptq.errors import ConfigurationError
from matgptq.machine.devices import MEDIUM_PRECISION, multiplies_bfloat16
from matgptq.machine.workers import INLINE, Workers
from matgptq.models.divergence import Predictor, kl_gradient, normalizers
from matgptq.models.logits import OutputHead, last_hidden
from matgptq.models.teacher import Teacher
from matgptq.recipe import check_seed

_BETAS = (0.9, 0.95)
_EPSILON = 1e-12  # gradients of a mean over many tokens for one group of weights are tiny
_WARM_UP = 5


def _scaled(levels: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense weight ``[out, in]`` of int8 levels and ``[out, groups]`` scales."""
    spread = levels.view(*scales.shape, -1).to(dtype)  # [out, groups, group_size]
    return spread.mul_(scales.to(dtype).unsqueeze(-1)).view(levels.shape)


class ScaledProduct(torch.autograd.Function):
    """``x @ (levels * scales)^T``, differentiable in x and scales; the dense weight is made anew in each direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Multiply.

        Args:
            ctx: of autograd.
            x: floating ``[..., in]``.
            levels: int8 ``[out, in]``.
            scales: floating ``[out, groups]``.
            dtype: of the product and of the gradients' products.

        Returns:
            ``[..., out]`` in the dtype of ``x``.
        """
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        ctx.save_for_backward(rows, levels, scales)
        ctx.like = x.shape, x.dtype
        return (rows @ _scaled(levels, scales, dtype).T).to(x.dtype).view(*x.shape[:-1], len(levels))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and scales."""
        rows, levels, scales = ctx.saved_tensors
        shape, dtype = ctx.like
        outer = gradients[0].reshape(len(rows), -1).to(rows.dtype)
        inner = None
        if ctx.needs_input_grad[0]:
            inner = (outer @ _scaled(levels, scales, rows.dtype)).to(dtype).view(shape)
        dense = (outer.T @ rows).mul_(levels)
        # bfloat16 sums must not be kept in bfloat16
        wide = torch.float32 if dense.dtype == torch.bfloat16 else dense.dtype
        return inner, None, dense.view(*scales.shape, -1).sum(-1, dtype=wide).to(scales.dtype), None


def fast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a model of ``dtype`` on ``device`` should multiply where rounding does not matter much."""
    return torch.bfloat16 if dtype == torch.float32 and multiplies_bfloat16(device) else dtype


class TunedLinear(nn.Module):
    """Linear layer over the levels of one width, whose scales can be trained.

    Attributes:
        levels: int8 ``[out, in]``, ``v_r(q) - 128``.
        scales: float32 ``[out, groups]``, a leaf for autograd once a ``ScaleVector`` holds it.
        bias: ``[out]`` or None.
        product_dtype: of products while gradients are recorded; without, they are exact in the dtype of the input.
        pace: what the learning rate is multiplied by for these scales.
    """

    levels: Tensor
    scales: Tensor

    def __init__(
        self,
        levels: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        product_dtype: torch.dtype,
        pace: float = 1.0,
    ) -> None:
        super().__init__()
        self.register_buffer("levels", levels)
        self.register_buffer("scales", scales)
        self.bias = bias if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.product_dtype = product_dtype
        self.pace = pace

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs @ w^T + bias`` in the dtype of ``inputs``."""
        dtype = self.product_dtype if torch.is_grad_enabled() else inputs.dtype
        result: Tensor = ScaledProduct.apply(inputs, self.levels, self.scales, dtype)  # type: ignore[no-untyped-call]
        return result if self.bias is None else result + self.bias


class ScaleVector:
    """All scales that are tuned together, as one vector of which each layer's scales are a stretch.

    Attributes:
        start: float32 ``[scales]``, what was found.
        values: what the layers multiply by; storable.
        pace: of each scale, see ``TunedLinear``.
    """

    def __init__(self, layers: Mapping[str, TunedLinear]) -> None:
        self._shapes = {name: layer.scales.shape for name, layer in layers.items()}
        self.start = torch.cat([layer.scales.detach().flatten() for layer in layers.values()]).float()
        self.values = self.start.clone()
        self.pace = torch.cat([torch.full_like(layer.scales, layer.pace).flatten() for layer in layers.values()])
        self._leaves = [values.detach().requires_grad_() for values in self._split(self.values)]
        for layer, leaf in zip(layers.values(), self._leaves, strict=True):
            layer.scales = leaf

    def _split(self, vector: Tensor) -> list[Tensor]:
        pieces = torch.split(vector, [shape.numel() for shape in self._shapes.values()])
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes.values(), strict=True)]

    def gradient(self, output: Tensor, upstream: Tensor | None = None) -> Tensor:
        """Gradient of a function of the scales, ``[scales]``; zero for layers that the output does not depend on.

        Nothing is kept in the scales themselves, so that several threads can ask at the same time.

        Args:
            output: what was computed from them; one number unless ``upstream`` is given.
            upstream: gradient with respect to ``output``, in its shape.
        """
        parts = torch.autograd.grad(output, self._leaves, upstream, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    def multiply(self, logarithms: Tensor) -> None:
        """Set every scale to ``storable(start * exp(logarithm))``."""
        self.values.copy_(storable_scales(self.start * logarithms.exp()))

    def by_layer(self) -> dict[str, Tensor]:
        """``{layer: [out, groups]}`` of the present values."""
        return dict(zip(self._shapes, self._split(self.values.clone()), strict=True))


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: of Adam with betas (0.9, 0.95).
        learning_rate: largest relative change of a scale in one step; 5 steps of warm-up, then linearly to zero.
        windows_per_step: token windows whose gradients are averaged.
        evaluations: how often the held-out text is looked at, in equal distances.
        patience: evaluations in a row that bring nothing before tuning stops.
        seed: of the order of the windows.
    """

    steps: int
    learning_rate: float
    windows_per_step: int = 2
    evaluations: int = 8
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "windows_per_step", "evaluations", "patience"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {getattr(self, name)}")
        check_seed(self.seed)
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigurationError(f"the learning rate must be positive, not {self.learning_rate}")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return self.learning_rate * min(1.0, (step + 1) / _WARM_UP) * (1 - step / self.steps)

    def windows(self, step: int, count: int) -> list[int]:
        """Which of ``count`` windows a step sees: each once before any is seen again, in an order of the seed's."""
        first = step * self.windows_per_step
        chosen = []
        for position in range(first, first + self.windows_per_step):
            epoch, place = divmod(position, count)
            generator = torch.Generator().manual_seed(self.seed + epoch)
            chosen.append(int(torch.randperm(count, generator=generator)[place]))
        return chosen

    def is_evaluated(self, step: int) -> bool:
        """Whether the held-out text is looked at after this many steps."""
        return step * self.evaluations // self.steps > (step - 1) * self.evaluations // self.steps


@dataclass
class TuningState:
    """Everything that tuning needs to go on.

    Attributes:
        step: steps taken.
        logarithms: of the multipliers, float32 ``[scales]``.
        first_moment, second_moment: Adam's.
        best: the scales with the smallest held-out loss so far, storable.
        history: ``(steps taken, held-out loss)``; the first entry is the start's.
        finished: nothing is left to do.
    """

    step: int
    logarithms: Tensor
    first_moment: Tensor
    second_moment: Tensor
    best: Tensor
    history: list[tuple[int, float]] = field(default_factory=list)
    finished: bool = False

    @classmethod
    def begin(cls, values: Tensor) -> TuningState:
        """Before the first step; ``values`` are the scales that were found."""
        zeros = torch.zeros_like(values)
        return cls(0, zeros, zeros.clone(), zeros.clone(), values.clone())

    def to(self, device: torch.device) -> TuningState:
        """The same with all tensors on a device."""
        return replace(
            self,
            logarithms=self.logarithms.to(device),
            first_moment=self.first_moment.to(device),
            second_moment=self.second_moment.to(device),
            best=self.best.to(device),
        )

    @property
    def loss_before(self) -> float:
        """Held-out loss of the scales that were found."""
        return self.history[0][1]

    @property
    def loss_after(self) -> float:
        """Held-out loss of the best scales; never larger than ``loss_before``."""
        return min(loss for _, loss in self.history)

    def note(self, step: int, loss: float, values: Tensor) -> None:
        """Record a held-out loss, and the scales it belongs to if it is the smallest."""
        if not self.history or loss < self.loss_after:
            self.best = values.clone()
        self.history.append((step, loss))

    def is_stale(self, patience: int) -> bool:
        """Whether the last ``patience`` evaluations brought nothing."""
        losses = [loss for _, loss in self.history]
        return len(losses) - 1 - losses.index(min(losses)) >= patience

    def to_tensors(self) -> dict[str, Tensor]:
        """For a file without pickles."""
        return {
            "step": torch.tensor(self.step),
            "finished": torch.tensor(self.finished),
            "logarithms": self.logarithms,
            "first_moment": self.first_moment,
            "second_moment": self.second_moment,
            "best": self.best,
            "history": torch.tensor(self.history, dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TuningState:
        """The inverse of ``to_tensors``."""
        rest = {name: tensors[name] for name in ("logarithms", "first_moment", "second_moment", "best")}
        history = [(int(step), float(loss)) for step, loss in tensors["history"].tolist()]
        return cls(int(tensors["step"]), history=history, finished=bool(tensors["finished"]), **rest)


def tune(
    scales: ScaleVector,
    windows: int,
    gradient: Callable[[Sequence[int]], Tensor],
    held_out_loss: Callable[[], float],
    schedule: Schedule,
    *,
    state: TuningState | None = None,
    save: Callable[[TuningState], None] = lambda _: None,
    tick: Callable[[], None] = lambda: None,
) -> TuningState:
    """Minimise a loss over the scales, and leave the best ones that the held-out loss has seen in place.

    Args:
        scales: start and destination.
        windows: how many there are to train on.
        gradient: of the mean loss of some windows with respect to the scales, ``[scales]``.
        held_out_loss: of the scales in place.
        schedule: steps, rates, evaluations.
        state: to go on from; None to begin.
        save: receives the state after each evaluation.
        tick: called after each step.

    Returns:
        The final state; ``scales.values`` are its ``best``, which are the start's where nothing was better.
    """
    if state is None:
        state = TuningState.begin(scales.values)
        state.note(0, held_out_loss(), scales.values)
        save(state)
    state = state.to(scales.values.device)  # one that was kept comes from a file
    scales.multiply(state.logarithms)
    while not state.finished:
        slope = gradient(schedule.windows(state.step, windows)) * scales.values  # with respect to the logarithms
        _adam(state, slope, schedule.rate(state.step), scales.pace)
        state.step += 1
        scales.multiply(state.logarithms)
        tick()
        if schedule.is_evaluated(state.step):
            state.note(state.step, held_out_loss(), scales.values)
            state.finished = state.step == schedule.steps or state.is_stale(schedule.patience)
            save(state)
    scales.values.copy_(state.best)
    return state


def _adam(state: TuningState, gradient: Tensor, rate: float, pace: Tensor) -> None:
    """One step of Adam (Kingma and Ba, arXiv 1412.6980) on the logarithms, each at its own pace."""
    first, second = _BETAS
    state.first_moment.lerp_(gradient, 1 - first)
    state.second_moment.lerp_(gradient.square(), 1 - second)
    count = state.step + 1
    mean = state.first_moment / (1 - first**count)
    deviation = (state.second_moment / (1 - second**count)).sqrt_()
    state.logarithms.sub_(mean.div_(deviation.add_(_EPSILON)).mul_(pace), alpha=rate)


def mean_gradient(workers: Workers, gradient: Callable[[int], Tensor], windows: Sequence[int]) -> Tensor:
    """Mean of ``gradient(window)`` over some windows, added up in their order."""
    total: Tensor | None = None
    for each in workers.map(gradient, windows):
        total = each if total is None else total.add_(each)
    assert total is not None
    return total.div_(len(windows))


class ModelObjective:
    """Mean KL(full || slice) in nats a token, of a whole model.

    Args:
        student: the model whose ``TunedLinear`` layers are trained.
        head: its output head.
        scales: of those layers.
        training, held_out: what the full model says.
        workers: that windows are shared out among.
    """

    def __init__(
        self,
        student: Any,
        head: OutputHead,
        scales: ScaleVector,
        training: Teacher,
        held_out: Teacher,
        workers: Workers = INLINE,
    ) -> None:
        self.student, self.head, self.scales = student, head, scales
        self.training, self.held_out, self.workers = training, held_out, workers
        self._normalizers: dict[int, Tensor] = {}  # of the full model's logits, by window

    def gradient(self, windows: Sequence[int]) -> Tensor:
        """Of the mean over some windows of the training text, ``[scales]``."""
        with MEDIUM_PRECISION:  # the output heads
            return mean_gradient(self.workers, self._gradient, windows)

    @torch.enable_grad()
    def _gradient(self, window: int) -> Tensor:
        tokens = self.training.windows[window : window + 1].to(self.student.device)
        hidden = last_hidden(self.student, tokens)[0]
        full = Predictor(self.training.head, self.training.hidden[window].to(hidden.device))
        if window not in self._normalizers:
            self._normalizers[window] = normalizers(full)
        change = kl_gradient(full, self._normalizers[window], Predictor(self.head, hidden.detach()))
        return self.scales.gradient(hidden, change)

    def held_out_loss(self) -> float:
        """Mean KL over the held-out windows, exact products."""
        windows = self.held_out.windows.to(self.student.device)
        return self.held_out.mean_kl(
            lambda index: last_hidden(self.student, windows[index : index + 1])[0], self.head, self.workers
        )
