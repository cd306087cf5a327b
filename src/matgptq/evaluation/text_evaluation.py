"""How good each width is: perplexity, and divergence from the full-precision model, on the same windows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from matgptq.checkpoints.allocation_scales import has_own_scales
from matgptq.checkpoints.allocation_store import allocation_file, find_allocation, is_stored, stored_allocations
from matgptq.checkpoints.checkpoint import Checkpoint, open_checkpoint
from matgptq.checkpoints.evaluation_results import Evaluation, Result
from matgptq.errors import ConfigurationError, UnsupportedModelError
from matgptq.inference.loading import load, load_config
from matgptq.inference.reference_model import load_optional_reference
from matgptq.machine.devices import exact_products, resolve_device
from matgptq.models.divergence import Predicted, Predictor, compare
from matgptq.models.logits import OutputHead, last_hidden, output_head
from matgptq.models.model_config import check_window, longest_window
from matgptq.models.source import load_tokenizer
from matgptq.native import Activations
from matgptq.progress import Progress, Silent
from matgptq.slicing import PARENT_BITS, check_widths
from matgptq.text.self_text import CPU_SELF_SEQLEN, model_fingerprint
from matgptq.text.sources import open_text
from matgptq.text.tokens import TextProtocol
from matgptq.text.windows import SELF, Windows, check_cut, evaluation_windows

DEFAULT_WIDTHS = (2, 3, 4, 6, 8)
DEFAULT_SEQLEN = 2048
CPU_WINDOWS = 4


@dataclass
class Divergence:
    """Running sums over token positions of one model against a reference."""

    tokens: int = 0
    negative_log_likelihood: float = 0.0
    kl: float = 0.0
    agreements: int = 0

    def add(self, predicted: Predicted, full: Predicted | None) -> None:
        """Add the positions of one window.

        Args:
            predicted: what the model says of them, and of the tokens that follow.
            full: what the full model says, which it was compared with; None if there is none.
        """
        assert predicted.log_probability is not None
        self.negative_log_likelihood -= float(predicted.log_probability.sum())
        if full is not None:
            self.kl += float(predicted.kl.sum())
            self.agreements += int((predicted.most_probable == full.most_probable).sum())
        self.tokens += len(predicted.kl)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood; inf when that overflows."""
        mean = self.negative_log_likelihood / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


def evaluate(
    path: str | Path,
    bits: Iterable[int] | int | None = None,
    *,
    allocation: Mapping[str, int] | str | Path | None = None,
    text: str | Path | Tensor = SELF,
    windows: int | Literal["all"] | None = None,
    seqlen: int | None = None,
    stride: int | None = None,
    protocol: TextProtocol = "bos",
    reference: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    activations: Activations = "exact",
    head_bits: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure widths of a checkpoint against the full-precision model on one text.

    Args:
        path: checkpoint directory.
        bits: widths, 2..8; default 2,3,4,6,8 (of a slice, what it holds), or none if an allocation is given.
        allocation: ``{layer: bits}``, the name of a stored allocation or a file, measured after the widths; layers
            that it does not name get the checkpoint's default width.
        text: a text file, a hub data set, ``self`` (written by the reference model, or else by the parent), or int64
            token ids ``[n, seqlen]``.
        windows: how many, or ``all``; default all of the text, on a CPU 4 unless the protocol is ``gptq``.
        seqlen: tokens per window; default 2048 or the model's context.
        stride: tokens from one window to the next, for windows that overlap: all but the first are then scored on
            their last ``stride`` tokens. Default: no overlap.
        protocol: ``bos``, ``plain`` or ``gptq``; see ``matgptq.text.windows.evaluation_windows``.
        reference: the full-precision model; default the one that the checkpoint was made from, if it is still there.
        device, dtype: of both models.
        activations, head_bits: of the quantized model; see ``matgptq.load``.
        trust_remote_code: allow code in the model's directory to run.
        progress: receives stages and notes.

    Raises:
        MatGPTQError: a subclass that says what is wrong with the checkpoint, the text or the options.
    """
    progress = progress or Silent()
    checkpoint = open_checkpoint(path, slices=True)
    candidates = choose_candidates(checkpoint, bits, allocation)
    run_device = resolve_device(device)
    config = load_config(path, trust_remote_code=trust_remote_code)
    chosen = _settle_text(text, windows, seqlen, stride, protocol, config, run_device, progress)
    progress.start("load the models", 1)
    models = CandidateModels(
        path, candidates, allocation,
        device=run_device, dtype=dtype, activations=activations, head_bits=head_bits,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    full, reference_name = load_optional_reference(
        checkpoint, reference, "KL and top-1 agreement are not measured", progress,
        device=run_device, dtype=dtype, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    progress.start("evaluation text", 1)
    tokens = chosen.read(path, full if full is not None else models.best(), trust_remote_code)

    sums = [Divergence() for _ in candidates]
    full_sum = Divergence()
    heads = {id(model): _Headed.of(model) for model in (full, *models.all) if model is not None}
    asked = len(candidates) + (full is not None)
    progress.start("evaluate", 2 * asked * tokens.tokens.numel())  # as many steps for the blocks as for the heads
    with torch.inference_mode(), exact_products(run_device):
        for number, window in enumerate(tokens.tokens.to(run_device)):
            scored = tokens.stride if tokens.stride is not None and number else len(window) - 1
            predictors = []
            for candidate in (*[None] * (full is not None), *candidates):
                model = full if candidate is None else models.serve(candidate)
                predictors.append(heads[id(model)].predictor(window, scored))
                progress.advance(len(window))
            predicted = compare(predictors, window[-scored:], lambda positions: progress.advance(asked * positions))
            of_full = None
            if full is not None:
                of_full, *predicted = predicted
                full_sum.add(of_full, None)
            for divergence, each in zip(sums, predicted, strict=True):
                divergence.add(each, of_full)
    results = [
        _result(checkpoint, candidate, divergence, full is not None)
        for candidate, divergence in zip(candidates, sums, strict=True)
    ]
    return Evaluation(
        results,
        tokens.protocol,
        reference_name,
        full_sum.perplexity if full is not None else None,
        served_settings(models.first, activations, head_bits),
        _fingerprint(tokens.tokens, full),
    )


def _fingerprint(tokens: Tensor, full: Any) -> str:
    digest = hashlib.sha256(tokens.numpy().tobytes())
    digest.update(b"" if full is None else model_fingerprint(full).encode())
    return digest.hexdigest()[:16]


def served_settings(model: Any, activations: Activations, head_bits: int | None) -> dict[str, Any]:
    """What else than the width changes the figures of a quantized model."""
    return {"dtype": str(model.dtype).removeprefix("torch."), "activations": activations, "head_bits": head_bits}


@dataclass(frozen=True)
class Candidate:
    """What is measured.

    Attributes:
        widths: one for all layers, or ``{layer: width}``.
        allocation: what the latter is called; None for a width, and for what a slice holds.
        own_scales: whether the allocation has scales of its own, which fix a model to it.
    """

    widths: int | dict[str, int]
    allocation: str | None = None
    own_scales: bool = False


class CandidateModels:
    """The models that serve some candidates: one whose widths are set, and one more for scales of an allocation's own.

    Args:
        path: checkpoint directory.
        candidates: to be served.
        allocation: the one among them, as named by the user.
        options: of ``matgptq.load``.

    Attributes:
        all: the models.
        first: one of them.
    """

    def __init__(
        self,
        path: str | Path,
        candidates: Sequence[Candidate],
        allocation: Mapping[str, int] | str | Path | None,
        **options: Any,
    ) -> None:
        kinds = {candidate.own_scales for candidate in candidates}
        self._is_slice = open_checkpoint(path, slices=True).settings.is_slice
        self._settable: Any = load(path, **options) if False in kinds else None
        self._fixed: Any = load(path, allocation=allocation, **options) if True in kinds else None
        self.all = [model for model in (self._settable, self._fixed) if model is not None]
        self.first = self.all[0]

    def best(self) -> Any:
        """The most exact of what they can serve: the parent, but of a slice or of scales of an allocation's own."""
        if self._settable is not None and not self._is_slice:
            self._settable.set_bits(PARENT_BITS)
        return self.first

    def serve(self, candidate: Candidate) -> Any:
        """A model at the candidate's widths, until the next call."""
        if candidate.own_scales:
            return self._fixed
        self._settable.set_bits(candidate.widths)
        return self._settable


def choose_candidates(
    checkpoint: Checkpoint, bits: Iterable[int] | int | None, allocation: Mapping[str, int] | str | Path | None
) -> list[Candidate]:
    """What to measure, in order: widths, then the allocation completed by the checkpoint's default width.

    Raises:
        AllocationError: the allocation names a layer that the checkpoint does not have.
        ConfigurationError: a width outside 2..8.
    """
    widths: Iterable[int | dict[str, int]]
    if bits is not None:
        widths = check_widths(bits)
    elif allocation is not None:
        widths = ()
    else:
        widths = checkpoint.widths_held if checkpoint.settings.is_slice else DEFAULT_WIDTHS
    candidates = [Candidate(each) for each in widths]
    if allocation is not None:
        name = "mapping" if isinstance(allocation, Mapping) else _label(checkpoint, allocation)
        widths_of_layers = find_allocation(checkpoint, allocation)
        candidates.append(Candidate(widths_of_layers, name, has_own_scales(checkpoint, allocation)))
    return candidates


def _label(checkpoint: Checkpoint, allocation: str | Path) -> str:
    """The name of an allocation; of a file elsewhere its own, unless a stored one is called so."""
    name = Path(allocation).name
    stored = is_stored(checkpoint, allocation_file(checkpoint, allocation))
    return str(allocation) if not stored and name in stored_allocations(checkpoint) else name


@dataclass(frozen=True)
class _Headed:
    """A model in two parts.

    Attributes:
        model: the whole.
        head: its output head; of a model that does something unknown with its logits, what leaves them as they are.
        is_known: whether the head is the model's.
    """

    model: Any
    head: OutputHead
    is_known: bool

    @classmethod
    def of(cls, model: Any) -> _Headed:
        try:
            return cls(model, output_head(model), True)
        except UnsupportedModelError:
            return cls(model, OutputHead(nn.Identity(), None), False)

    def predictor(self, window: Tensor, scored: int) -> Predictor:
        """What predicts the last ``scored`` tokens of a window."""
        batch = window.unsqueeze(0)
        if self.is_known:
            states = last_hidden(self.model, batch)
        else:
            states = self.model(input_ids=batch, use_cache=False).logits
        return Predictor(self.head, states[0, -scored - 1 : -1])


def _result(checkpoint: Checkpoint, candidate: Candidate, divergence: Divergence, compared: bool) -> Result:
    return Result(
        bits=checkpoint.average_bits(candidate.widths),
        bits_per_weight=checkpoint.bits_per_weight(candidate.widths),
        bytes=checkpoint.served_bytes(candidate.widths),
        perplexity=divergence.perplexity,
        kl=divergence.kl / divergence.tokens if compared else None,
        top1=divergence.agreements / divergence.tokens if compared else None,
        allocation=candidate.allocation,
    )


@dataclass(frozen=True)
class _Text:
    """What to measure on, every default settled."""

    dataset: str | Path | Tensor
    windows: int | None
    seqlen: int
    stride: int | None
    protocol: TextProtocol

    def read(self, path: str | Path, model: Any, trust_remote_code: bool) -> Windows:
        """The windows; ``model`` writes the text if it is ``self``."""
        tokenizer = None
        if not isinstance(self.dataset, Tensor):
            tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        return evaluation_windows(
            self.dataset,
            tokenizer,
            windows=self.windows,
            seqlen=self.seqlen,
            stride=self.stride,
            protocol=self.protocol,
            model=model,
        )


def _settle_text(
    dataset: str | Path | Tensor,
    windows: int | Literal["all"] | None,
    seqlen: int | None,
    stride: int | None,
    protocol: TextProtocol,
    config: Any,
    device: torch.device,
    progress: Progress,
) -> _Text:
    """Fill in the defaults and refuse what can be refused before a model is loaded."""
    count = None if windows == "all" else windows
    if isinstance(dataset, Tensor):
        seqlen = dataset.shape[-1] if seqlen is None else seqlen
    else:
        on_cpu = device.type == "cpu"
        if seqlen is None:
            wanted = CPU_SELF_SEQLEN if on_cpu and str(dataset) == SELF else DEFAULT_SEQLEN
            seqlen = min(wanted, longest_window(config) or wanted)
        if windows is None and (str(dataset) == SELF or (on_cpu and protocol != "gptq")):
            count = CPU_WINDOWS
            progress.note(f"{count} windows of {seqlen} tokens (--windows, --seqlen)")
        if str(dataset) != SELF:
            open_text(dataset, split="test")
    check_window(config, seqlen)
    if seqlen < 2:
        raise ConfigurationError("a window must have at least 2 tokens: the second is what the first predicts")
    check_cut(dataset, seqlen, stride, protocol)
    return _Text(dataset, count, seqlen, stride, protocol)
