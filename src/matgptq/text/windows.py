"""Text to token windows.

    ``calibration_windows``  documents shuffled by seed, packed without padding; several texts in turns
    ``evaluation_windows``   windows from the start of the text, no special tokens added

Both return ``Windows``: the tokens, and in words how they came about, to be printed beside every number that was
measured on them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor, nn

from matgptq.errors import CalibrationError, ConfigurationError
from matgptq.progress import Counted
from matgptq.text.order import shuffled
from matgptq.text.packing import check_counts, pack_windows
from matgptq.text.self_text import generate_windows
from matgptq.text.sources import open_text
from matgptq.text.tokens import CHARACTERS_PER_TOKEN, TextProtocol, evaluation_tokens, text_prefix, tokenize_document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenRows = Tensor | Sequence[Sequence[int]] | Sequence[Tensor]

SELF = "self"
# Evaluation on a model's own text must not see the text that it was calibrated on, which has the plain seed. The
# offset is not a multiple of 2^32, because torch's generator looks at the low 32 bits of a seed only.
_SELF_EVALUATION_SEED = 0x45564131


@dataclass(frozen=True)
class Windows:
    """Token windows and how they were made.

    Attributes:
        tokens: token ids, ``torch.int64`` ``[windows, seqlen]``, on the CPU.
        protocol: one line for the reader of a result: window, source, order, joins, special tokens.
        stride: windows overlap, and all but the first are scored on their last ``stride`` tokens only; ``None``: no
            overlap.
    """

    tokens: Tensor
    protocol: str
    stride: int | None = None


def calibration_windows(
    dataset: str | Path | TokenRows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    nsamples: int | None,
    seqlen: int,
    seed: int,
    model: nn.Module | None = None,
    cache_dir: str | Path | None = None,
    progress: Counted | None = None,
) -> Windows:
    """Windows for calibration.

    Documents are shuffled by ``seed``, tokenized with the special tokens that the tokenizer adds by default (so a
    model with BOS sees it where a document starts), closed with EOS if the tokenizer has one, concatenated, and cut
    into windows without padding: a document runs on into the next window, and no token between two windows is lost.
    Every window starts as a prompt does, with the BOS that the tokenizer puts in front of a text: Gemma without it is
    another model than the one that is served. No more documents are tokenized than the windows need. Conversations go
    through the chat template, which writes its own special tokens.

    Args:
        dataset: a file (``.txt``, ``.jsonl``, ``.jsonl.gz``, ``.json.gz``, ``.parquet``), a data set by name
            (``wikitext2``, ``c4``, ``fineweb-edu``, ``owner/name`` on the Hugging Face Hub), ``self`` for text that
            ``model`` generates, or token ids ready for use, integers ``[windows, seqlen]``, taken in their order.
            Several names with commas between them give equally many windows each, in turns.
        tokenizer: the model's tokenizer.
        nsamples: number of windows, or ``None`` for all that the text fills (not with ``self``).
        seqlen: tokens in a window.
        seed: of the order of the documents, or of the generation.
        model: needed for ``self``; where given, token ids are checked against its embedding.
        cache_dir: where ``self`` keeps generated text; see ``generate_windows``.
        progress: called with (tokens done, tokens in all); not called when ``nsamples`` is ``None``.

    Raises:
        CalibrationError: the text cannot be read, is malformed or too short, or the ids do not fit the model.
        ConfigurationError: ``nsamples`` or ``seqlen`` is not positive, or there are fewer windows than texts.
    """
    check_counts(nsamples, seqlen)
    if not isinstance(dataset, (str, Path)):
        return _given_windows(dataset, tokenizer, nsamples, seqlen, model)
    names = text_names(dataset)
    if len(names) > 1:
        load = partial(
            calibration_windows, tokenizer=tokenizer, seqlen=seqlen, seed=seed, model=model, cache_dir=cache_dir
        )
        return _mixed_windows(names, load, nsamples, seqlen, progress)
    if dataset == SELF:
        return _self_windows(tokenizer, nsamples, seqlen, seed, model, cache_dir, progress)

    source = open_text(dataset, split="train")
    budget = math.inf if nsamples is None else nsamples * seqlen * CHARACTERS_PER_TOKEN
    documents = (tokenize_document(tokenizer, each) for each in shuffled(source.parts, seed, budget))
    prefix = _prefix(tokenizer, seqlen)
    tokens, available = pack_windows(documents, nsamples=nsamples, seqlen=seqlen, prefix=prefix, progress=progress)
    _check_enough(source.name, tokens, available, nsamples, seqlen, prefix)
    _check_vocabulary(tokens, source.name, tokenizer, model)
    joins = "joined by EOS" if tokenizer.eos_token_id is not None else "joined without a separator"
    return Windows(
        tokens,
        f"{_count(len(tokens), seqlen)} from {source.title}: documents shuffled with seed {seed}, the "
        f"tokenizer's special tokens, {joins}, packed without padding{_prefix_words(tokenizer, prefix)}",
    )


def text_names(dataset: str | Path) -> list[str | Path]:
    """The texts that a data set consists of: those between commas, unless there is a file of the whole name."""
    if isinstance(dataset, Path) or "," not in dataset or os.path.exists(dataset):
        return [dataset]
    names = [name.strip() for name in dataset.split(",")]
    if not all(names):
        raise CalibrationError(f"{dataset}: there must be the name of a text before and after every comma")
    return list(names)


def takes_self(dataset: str | Path | TokenRows) -> bool:
    """Whether the model has to write some of the text."""
    return isinstance(dataset, (str, Path)) and SELF in map(str, text_names(dataset))


def check_texts(dataset: str | Path | TokenRows, nsamples: int | None) -> None:
    """Refuse texts that are not there, or more than there are windows; reads none of them.

    Raises:
        CalibrationError: a text cannot be opened.
        ConfigurationError: there are fewer windows than texts.
    """
    if isinstance(dataset, (str, Path)):
        _check_texts(text_names(dataset), nsamples)


def _check_texts(names: Sequence[str | Path], nsamples: int | None) -> None:
    if nsamples is not None and nsamples < len(names):
        raise ConfigurationError(f"{len(names)} texts need at least {len(names)} windows, not {nsamples}")
    for name in names:
        if name != SELF:
            open_text(name, split="train")


def _mixed_windows(
    names: Sequence[str | Path],
    load: Callable[..., Windows],
    nsamples: int | None,
    seqlen: int,
    progress: Counted | None,
) -> Windows:
    """Windows of several texts in turns; the first texts give one more where they cannot all give as many."""
    _check_texts(names, nsamples)  # before the model writes its own, which takes long
    parts: list[Windows] = []
    for index, name in enumerate(names):
        if nsamples is None:
            parts.append(load(name, nsamples=None))
            continue
        before = sum(len(part.tokens) for part in parts) * seqlen

        def report(tokens: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + tokens, nsamples * seqlen)

        share = nsamples // len(names) + (index < nsamples % len(names))
        parts.append(load(name, nsamples=share, progress=report))
    turns = zip_longest(*(part.tokens for part in parts))
    tokens = torch.stack([window for turn in turns for window in turn if window is not None])
    return Windows(
        tokens, f"{len(tokens)} windows in turns from {len(parts)} texts: " + "; ".join(part.protocol for part in parts)
    )


def evaluation_windows(
    dataset: str | Path | TokenRows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int | None,
    seqlen: int,
    stride: int | None = None,
    protocol: TextProtocol = "bos",
    seed: int = 0,
    model: nn.Module | None = None,
    cache_dir: str | Path | None = None,
    progress: Counted | None = None,
) -> Windows:
    """Windows for evaluation: the text from its start, tokenized as one string, the remainder left out.

    The text is a ``.txt`` file exactly as it is; for ``wikitext2`` the rows of the test split joined by two newlines;
    otherwise the documents in file order joined by two newlines. Data sets of the hub give their test or validation
    split where they have one, and of their documents the first 1100 if all windows are asked for. ``self`` generates
    other text than ``calibration_windows`` does with the same seed.

    With the protocol ``bos`` every window starts as a prompt does: with the BOS that the tokenizer puts in front of a
    text, if it does, in place of a window's last token. With ``plain`` no special tokens are added; on ``wikitext2``
    and ``c4`` this is how EvoPress (arXiv 2410.14649) measures, and MatGPTQ with it. ``gptq`` is the code of the GPTQ
    papers (arXiv 2210.17323, its ``c4-new``): the tokenizer adds its special tokens, a BOS before the whole text for
    most models, and the first 1100 documents of C4 are joined by blanks, of which the first 256 windows count.

    Args:
        dataset, tokenizer, model, cache_dir, progress: as for ``calibration_windows``.
        windows: number of windows, or ``None`` for all that the text fills (not with ``self``).
        seqlen: tokens in a window.
        stride: tokens from the start of a window to the start of the next, ``None`` for windows that do not overlap.
        protocol: ``bos``, ``plain`` or ``gptq``.
        seed: of ``self`` only.

    Raises:
        CalibrationError: the text cannot be read, is malformed or too short, or the ids do not fit the model.
        ConfigurationError: ``windows`` or ``seqlen`` is not positive, ``stride`` is not from 1 to ``seqlen``, an
            unknown protocol, or an option that has no meaning for ``self`` or for token ids.
    """
    check_counts(windows, seqlen)
    check_cut(dataset, seqlen, stride, protocol)
    if stride == seqlen:
        stride = None
    if not isinstance(dataset, (str, Path)):
        return _given_windows(dataset, tokenizer, windows, seqlen, model)
    if dataset == SELF:
        return _self_windows(tokenizer, windows, seqlen, seed + _SELF_EVALUATION_SEED, model, cache_dir, progress)

    source = open_text(dataset, split="test")
    prefix = _prefix(tokenizer, seqlen) if protocol == "bos" else []
    if stride is not None and stride >= seqlen - len(prefix):
        stride = None
    text_is, ids = evaluation_tokens(source, tokenizer, protocol, windows, seqlen, stride or seqlen)
    tokens, available = pack_windows(
        [ids], nsamples=windows, seqlen=seqlen, stride=stride, prefix=prefix, progress=progress
    )
    _check_enough(source.name, tokens, available, windows, seqlen, prefix, stride)
    _check_vocabulary(tokens, source.name, tokenizer, model)
    added = "no special tokens added" + _prefix_words(tokenizer, prefix, " but")
    if protocol == "gptq":
        added = "special tokens as the tokenizer adds them"
    overlap = (
        "no overlap"
        if stride is None
        else f"a window every {stride} tokens, of which all but the first are scored on their last {stride} tokens"
    )
    return Windows(
        tokens,
        f"{_count(len(tokens), seqlen)} from the start of {source.title}: {text_is}, {added}, {overlap}",
        stride,
    )


def check_cut(dataset: str | Path | TokenRows, seqlen: int, stride: int | None, protocol: TextProtocol) -> None:
    """Refuse options of ``evaluation_windows`` that contradict each other; raises ``ConfigurationError``."""
    if protocol not in get_args(TextProtocol):
        raise ConfigurationError(f"protocol must be {', '.join(get_args(TextProtocol))}, not {protocol!r}")
    if stride is not None and not 1 <= stride <= seqlen:
        raise ConfigurationError(f"stride must be from 1 to the {seqlen} tokens of a window, not {stride}")
    is_text = isinstance(dataset, (str, Path)) and dataset != SELF
    if not is_text and (stride is not None or protocol == "gptq"):
        raise ConfigurationError("stride and protocol are ways to cut a text; 'self' and token ids are cut already")


def _prefix(tokenizer: PreTrainedTokenizerBase, seqlen: int) -> list[int]:
    """What windows of a text start with: as a prompt, or nothing where no token of the text would be left."""
    prefix = text_prefix(tokenizer)
    return prefix if len(prefix) < seqlen else []


def _prefix_words(tokenizer: PreTrainedTokenizerBase, prefix: list[int], joint: str = ",") -> str:
    if not prefix:
        return ""
    return f"{joint} {' '.join(map(str, tokenizer.convert_ids_to_tokens(prefix)))} in front of every window"


def _check_enough(
    name: str,
    tokens: Tensor,
    available: int,
    windows: int | None,
    seqlen: int,
    prefix: Sequence[int],
    stride: int | None = None,
) -> None:
    wanted = 1 if windows is None else windows
    if len(tokens) >= wanted:
        return
    read = seqlen - len(prefix)
    needed = read + (wanted - 1) * (stride or read)
    fit = f"take at most {len(tokens)} windows, or " if len(tokens) else ""
    raise CalibrationError(
        f"{name}: too little text: {available} tokens, but {wanted} windows of {seqlen} need {needed}; "
        f"{fit}make the windows shorter, or give a longer text"
    )


def _vocabulary_size(tokenizer: PreTrainedTokenizerBase, model: nn.Module | None) -> int:
    if model is None:
        return len(tokenizer)
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def _check_vocabulary(tokens: Tensor, name: str, tokenizer: PreTrainedTokenizerBase, model: nn.Module | None) -> None:
    size = _vocabulary_size(tokenizer, model)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= size:
        raise CalibrationError(
            f"{name}: token id {low if low < 0 else high} is outside the vocabulary of {size}; "
            f"was it made with the tokenizer of this model?"
        )


def _given_windows(
    rows: TokenRows, tokenizer: PreTrainedTokenizerBase, windows: int | None, seqlen: int, model: nn.Module | None
) -> Windows:
    name = "the given token ids"
    try:
        if isinstance(rows, Tensor):
            tokens = rows
        elif len(rows) and isinstance(rows[0], Tensor):
            # Tensors [seqlen] or, as other quantizers keep them, [1, seqlen].
            tokens = torch.stack([torch.as_tensor(row).reshape(-1) for row in rows])
        else:
            tokens = torch.tensor(rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(
            f"{name} must be integers [windows, {seqlen}], all rows equally long: {error}"
        ) from error
    if tokens.dtype == torch.bool or tokens.is_floating_point() or tokens.is_complex():
        raise CalibrationError(f"{name} must be integers, not {tokens.dtype}")
    if tokens.dim() != 2 or tokens.shape[1] != seqlen:
        raise CalibrationError(f"{name} must have the shape [windows, {seqlen}], not {list(tokens.shape)}")
    wanted = 1 if windows is None else windows
    if len(tokens) < wanted:
        raise CalibrationError(
            f"{name} are {len(tokens)} windows, but {wanted} are needed; give more, or ask for fewer"
        )
    tokens = tokens[:windows].to("cpu", torch.int64, copy=True)
    _check_vocabulary(tokens, name, tokenizer, model)
    return Windows(tokens, f"{_count(len(tokens), seqlen)}, given as ids")


def _self_windows(
    tokenizer: PreTrainedTokenizerBase,
    windows: int | None,
    seqlen: int,
    seed: int,
    model: nn.Module | None,
    cache_dir: str | Path | None,
    progress: Counted | None,
) -> Windows:
    if model is None:
        raise CalibrationError("'self' is text that the model generates: pass the model, or name a text")
    if windows is None:
        raise CalibrationError("'self' has no end: give the number of windows")
    tokens = generate_windows(
        model, tokenizer, nsamples=windows, seqlen=seqlen, seed=seed, cache_dir=cache_dir, progress=progress
    )
    return Windows(
        tokens,
        f"{_count(windows, seqlen)} sampled from the model itself at temperature 1 with seed {seed}",
    )


def _count(windows: int, seqlen: int) -> str:
    return f"{windows} window{'' if windows == 1 else 's'} of {seqlen} tokens"
