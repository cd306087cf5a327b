"""The text that scales are tuned on: what the user names, or that of the calibration, or what the model writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from matgptq.checkpoints.checkpoint import Checkpoint
from matgptq.errors import CalibrationError
from matgptq.models.model_config import check_window, longest_window
from matgptq.models.source import load_tokenizer
from matgptq.progress import Progress, counting_steps
from matgptq.text.windows import SELF, Windows, calibration_windows, takes_self, text_names

DEFAULT_SEQLEN = 512
DEFAULT_NSAMPLES = 128
SELF_NSAMPLES = 32  # text that the model must write first is dear
HELD_OUT = 4  # windows, beside those trained on


def load_tuning_text(
    checkpoint: Checkpoint,
    full: Any,
    dataset: str | Path | Tensor | None,
    *,
    nsamples: int | None,
    seqlen: int | None,
    seed: int,
    trust_remote_code: bool,
    progress: Progress,
) -> Windows:
    """Windows to train on, and after them the ``HELD_OUT`` that are not.

    Args:
        checkpoint: whose scales are tuned.
        full: the full model; it writes the text that is ``self``.
        dataset: what the user named, if anything.
        nsamples: windows to train on; default 128 or what a shorter text has, 32 for ``self``.
        seqlen: tokens in each; default 512 or the model's context.
        seed: of the choice of windows.
        trust_remote_code: allow code in the checkpoint's directory to run.
        progress: receives the stage, and a note where the text of the calibration is gone.

    Raises:
        CalibrationError: the text cannot be read, or is too short.
        ConfigurationError: windows are longer than the model's context.
    """
    if seqlen is None:
        longest = longest_window(full.config) or DEFAULT_SEQLEN
        seqlen = dataset.shape[-1] if isinstance(dataset, Tensor) else min(DEFAULT_SEQLEN, longest)
    check_window(full.config, seqlen)
    tokenizer = None
    if not isinstance(dataset, Tensor):
        tokenizer = load_tokenizer(checkpoint.path, trust_remote_code=trust_remote_code)
    reader = _Reader(full, tokenizer, nsamples, seqlen, seed, progress)
    if dataset is not None:
        return reader.read_enough(dataset)
    known = _calibration_text(checkpoint)
    if known is not None:
        try:
            return reader.read_enough(known)
        except CalibrationError as error:
            progress.note(
                f"the text of the calibration cannot be used again, the model writes its own (--dataset): {error}"
            )
    return reader.read_enough(SELF)


def _calibration_text(checkpoint: Checkpoint) -> str | None:
    """What the checkpoint was calibrated with and can be read again; what the model wrote of it is left out."""
    recorded = checkpoint.settings.calibration.get("dataset")
    if not isinstance(recorded, str) or recorded == "token ids":
        return None
    return ",".join(name for name in map(str, text_names(recorded)) if name != SELF) or None


@dataclass(frozen=True)
class _Reader:
    full: Any
    tokenizer: Any
    nsamples: int | None
    seqlen: int
    seed: int
    progress: Progress

    def read_enough(self, dataset: str | Path | Tensor) -> Windows:
        """As many windows as were asked for, or as the kind of text makes sensible."""
        if self.nsamples is not None:
            return self._read(dataset, self.nsamples + HELD_OUT)
        if isinstance(dataset, Tensor):
            return self._read(dataset, None)
        if takes_self(dataset):
            return self._read(dataset, SELF_NSAMPLES + HELD_OUT)
        try:
            return self._read(dataset, DEFAULT_NSAMPLES + HELD_OUT)
        except CalibrationError:  # a shorter text will do as well
            return self._read(dataset, None)

    def _read(self, dataset: str | Path | Tensor, count: int | None) -> Windows:
        self.progress.start("tuning text", count or 1)
        text = calibration_windows(
            dataset,
            self.tokenizer,
            nsamples=count,
            seqlen=self.seqlen,
            seed=self.seed,
            model=self.full,
            progress=counting_steps(self.progress, count or 1),
        )
        if len(text.tokens) <= HELD_OUT:
            raise CalibrationError(
                f"too little text: {len(text.tokens)} windows of {self.seqlen} tokens, of which {HELD_OUT} are held "
                "out; make the windows shorter, or give a longer text"
            )
        return text
