"""Text to token windows, for calibration and for evaluation.

    ``load_windows``        calibration: documents shuffled by seed, packed without padding; several texts in turns
    ``evaluation_windows``  evaluation: windows from the start of the text, no special tokens added
    ``first_tokens``        calibration: tokens that a sequence may begin with

The first two return ``Windows``: the tokens, and in words how they came about, to be printed beside every number that
was measured on them.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from matgptq.errors import CalibrationError, ConfigurationError
from matgptq.progress import Counted
from matgptq.self_text import check_counts, generate_windows
from matgptq.text_sources import Document, Reader, TextSource, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TokenRows = Tensor | Sequence[Sequence[int]] | Sequence[Tensor]

# How a text becomes windows: ``plain`` adds no special tokens; ``gptq`` follows the code of the GPTQ papers.
TextProtocol = Literal["plain", "gptq"]

SELF = "self"
# Evaluation on a model's own text must not see the text that it was calibrated on, which has the plain seed. The
# offset is not a multiple of 2^32, because torch's generator looks at the low 32 bits of a seed only.
_SELF_EVALUATION_SEED = 0x45564131
# Characters read ahead for each token that is needed; too few costs a second pass over the file, nothing else.
_CHARACTERS_PER_TOKEN = 8
# Text beyond the last window that evaluation tokenizes, so that cutting the text cannot change a token inside.
_SLACK_TOKENS = 256


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


def load_windows(
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
    No more documents are tokenized than the windows need. Conversations go through the chat template, which writes
    its own special tokens.

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
        load = partial(load_windows, tokenizer=tokenizer, seqlen=seqlen, seed=seed, model=model, cache_dir=cache_dir)
        return _mixed_windows(names, load, nsamples, seqlen, progress)
    if dataset == SELF:
        return _self_windows(tokenizer, nsamples, seqlen, seed, model, cache_dir, progress)

    source = open_source(dataset, split="train")
    budget = math.inf if nsamples is None else nsamples * seqlen * _CHARACTERS_PER_TOKEN
    documents = (_tokenize_document(tokenizer, each) for each in _shuffled(source.parts, seed, budget))
    tokens, available = pack_windows(documents, nsamples=nsamples, seqlen=seqlen, progress=progress)
    _check_enough(source.name, tokens, available, nsamples, seqlen)
    _check_vocabulary(tokens, source.name, tokenizer, model)
    joins = "joined by EOS" if tokenizer.eos_token_id is not None else "joined without a separator"
    return Windows(
        tokens,
        f"{len(tokens)} windows of {seqlen} tokens from {source.title}: documents shuffled with seed {seed}, the "
        f"tokenizer's special tokens, {joins}, packed without padding",
    )


def text_names(dataset: str | Path) -> list[str | Path]:
    """The texts that a data set consists of: those between commas, unless there is a file of the whole name."""
    if isinstance(dataset, Path) or "," not in dataset or Path(dataset).exists():
        return [dataset]
    names = [name.strip() for name in dataset.split(",")]
    if not all(names):
        raise CalibrationError(f"{dataset}: there must be the name of a text before and after every comma")
    return list(names)


def takes_self(dataset: str | Path | TokenRows) -> bool:
    """Whether the model has to write some of the text."""
    return isinstance(dataset, (str, Path)) and SELF in map(str, text_names(dataset))


def _mixed_windows(
    names: Sequence[str | Path],
    load: Callable[..., Windows],
    nsamples: int | None,
    seqlen: int,
    progress: Counted | None,
) -> Windows:
    """Windows of several texts in turns; the first texts give one more where they cannot all give as many."""
    if nsamples is not None and nsamples < len(names):
        raise ConfigurationError(f"{len(names)} texts need at least {len(names)} windows, not {nsamples}")
    for name in names:  # refused before the model writes its own, which takes long
        if name != SELF:
            open_source(name, split="train")
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
    protocol: TextProtocol = "plain",
    seed: int = 0,
    model: nn.Module | None = None,
    cache_dir: str | Path | None = None,
    progress: Counted | None = None,
) -> Windows:
    """Windows for evaluation: the text from its start, tokenized as one string, the remainder left out.

    The text is a ``.txt`` file exactly as it is; for ``wikitext2`` the rows of the test split joined by two newlines;
    otherwise the documents in file order joined by two newlines. Data sets of the hub give their test or validation
    split where they have one, and of their documents the first 1100 if all windows are asked for. ``self`` generates
    other text than ``load_windows`` does with the same seed.

    With the protocol ``plain`` no special tokens are added; on ``wikitext2`` and ``c4`` this is how EvoPress
    (arXiv 2410.14649) measures, and MatGPTQ with it. ``gptq`` is the code of the GPTQ papers (arXiv 2210.17323, its
    ``c4-new``): the tokenizer adds its special tokens, a BOS before the whole text for most models, and the first
    1100 documents of C4 are joined by blanks, of which the first 256 windows count.

    Args:
        dataset, tokenizer, model, cache_dir, progress: as for ``load_windows``.
        windows: number of windows, or ``None`` for all that the text fills (not with ``self``).
        seqlen: tokens in a window.
        stride: tokens from the start of a window to the start of the next, ``None`` for windows that do not overlap.
        protocol: ``plain`` or ``gptq``.
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

    source = open_source(dataset, split="test")
    text_is, ids = _evaluation_tokens(source, tokenizer, protocol, windows, seqlen, stride or seqlen)
    tokens, available = pack_windows([ids], nsamples=windows, seqlen=seqlen, stride=stride, progress=progress)
    _check_enough(source.name, tokens, available, windows, seqlen, stride)
    _check_vocabulary(tokens, source.name, tokenizer, model)
    added = "no special tokens added" if protocol == "plain" else "special tokens as the tokenizer adds them"
    overlap = (
        "no overlap"
        if stride is None
        else f"a window every {stride} tokens, of which all but the first are scored on their last {stride} tokens"
    )
    return Windows(
        tokens,
        f"{len(tokens)} windows of {seqlen} tokens from the start of {source.title}: {text_is}, {added}, {overlap}",
        stride,
    )


def check_cut(dataset: str | Path | TokenRows, seqlen: int, stride: int | None, protocol: TextProtocol) -> None:
    """Refuse options of ``evaluation_windows`` that contradict each other; raises ``ConfigurationError``."""
    if protocol not in get_args(TextProtocol):
        raise ConfigurationError(f"protocol must be {' or '.join(get_args(TextProtocol))}, not {protocol!r}")
    if stride is not None and not 1 <= stride <= seqlen:
        raise ConfigurationError(f"stride must be from 1 to the {seqlen} tokens of a window, not {stride}")
    is_text = isinstance(dataset, (str, Path)) and dataset != SELF
    if not is_text and (stride is not None or protocol != "plain"):
        raise ConfigurationError("stride and protocol are ways to cut a text; 'self' and token ids are cut already")


def _evaluation_tokens(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    protocol: TextProtocol,
    windows: int | None,
    seqlen: int,
    stride: int,
) -> tuple[str, list[int]]:
    """What the text is, in words, and its tokens: all of them, or at least as many as the windows need."""
    special = protocol == "gptq"
    if source.whole_text is not None:
        return source.whole_text_is, _tokenize_text(tokenizer, source.whole_text(), special)
    count = source.evaluation_documents
    first = "documents" if count is None else f"the first {count} documents"
    if special:
        texts = [_document_text(tokenizer, each) for each in islice(source.documents(), count)]
        ids = _tokenize_text(tokenizer, source.gptq_separator.join(texts), special)
        if source.gptq_windows is not None:
            ids = ids[: source.gptq_windows * seqlen]
        return f"{first} joined by {json.dumps(source.gptq_separator)}", ids
    if windows is None:
        return f'{first} joined by "\\n\\n"', _tokenize_joined(tokenizer, islice(source.documents(), count), math.inf)
    needed = seqlen + (windows - 1) * stride
    return 'documents in file order joined by "\\n\\n"', _tokenize_joined(tokenizer, source.documents(), needed)


def first_tokens(windows: Tensor, count: int, bos: int | None, seed: int) -> Tensor:
    """One-token sequences that show a model its first position, as ``Recipe.sink_weight`` needs them.

    Text that was cut anywhere begins with any of its tokens, and a prompt begins with BOS: half of the sequences are
    the one, half are the other.

    Args:
        windows: int64 ``[n, seqlen]``, calibration windows.
        count: number of sequences.
        bos: the model's BOS token if it has one; without it, all sequences are tokens of the text.
        seed: of the choice of tokens.

    Returns:
        int64 ``[count, 1]`` token ids.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = windows.flatten()[torch.randint(windows.numel(), (count,), generator=generator)]
    if bos is not None:
        tokens[: count // 2] = bos
    return tokens.unsqueeze(1)


def pack_windows(
    documents: Iterable[Sequence[int]],
    *,
    nsamples: int | None,
    seqlen: int,
    stride: int | None = None,
    progress: Counted | None = None,
) -> tuple[Tensor, int]:
    """Concatenate token sequences and cut windows of ``seqlen`` tokens from the result, one every ``stride`` tokens.

    No more of ``documents`` is consumed than ``nsamples`` windows need. Without a stride windows do not overlap.

    Returns:
        The windows, ``torch.int64`` ``[at most nsamples, seqlen]``, and the number of tokens consumed.
    """
    stride = seqlen if stride is None else stride
    wanted = None if nsamples is None else seqlen + (nsamples - 1) * stride
    stream: list[int] = []
    for ids in documents:
        stream.extend(ids)
        if wanted is not None:
            if progress is not None:
                progress(min(len(stream), wanted), wanted)
            if len(stream) >= wanted:
                break
    if len(stream) < seqlen:
        return torch.empty(0, seqlen, dtype=torch.int64), len(stream)
    tokens = torch.tensor(stream[:wanted], dtype=torch.int64).unfold(0, seqlen, stride).contiguous()
    return tokens, len(stream)


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_enough(
    name: str, tokens: Tensor, available: int, windows: int | None, seqlen: int, stride: int | None = None
) -> None:
    wanted = 1 if windows is None else windows
    if len(tokens) >= wanted:
        return
    needed = seqlen + (wanted - 1) * (stride or seqlen)
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
    return Windows(tokens, f"{len(tokens)} windows of {seqlen} tokens, given as ids")


# --- documents to tokens ---------------------------------------------------------------------------------------------


def _document_text(tokenizer: PreTrainedTokenizerBase, document: Document) -> str:
    if isinstance(document.content, str):
        return document.content
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{document.where}: `messages` need a chat template and this tokenizer has none; "
            f"give documents with a `text` field"
        )
    try:
        return str(tokenizer.apply_chat_template(document.content, tokenize=False))
    except Exception as error:
        # A template is a program of the model's author: it raises whatever it likes on messages that it rejects.
        raise CalibrationError(f"{document.where}: the chat template rejects these messages: {error}") from error


def _tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    # verbose=False: being longer than the model's context is no fault of a text that is cut into windows.
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def _tokenize_document(tokenizer: PreTrainedTokenizerBase, document: Document) -> list[int]:
    text = _document_text(tokenizer, document)
    eos = tokenizer.eos_token_id
    if not isinstance(document.content, str):
        # The template has written BOS and the ends of turns already; adding them again would double them.
        ids = _tokenize_text(tokenizer, text)
        return ids if eos is None or eos in ids else [*ids, eos]
    ids = tokenizer(text, verbose=False)["input_ids"]
    return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]


def _tokenize_joined(tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document], needed: float) -> list[int]:
    """Tokens of the documents joined by two newlines: all of them, or enough that the first ``needed`` are final."""
    texts: list[str] = []
    characters, enough = 0, needed * _CHARACTERS_PER_TOKEN
    for document in documents:
        texts.append(_document_text(tokenizer, document))
        characters += len(texts[-1])
        if characters >= enough:
            ids = _tokenize_text(tokenizer, "\n\n".join(texts))
            if len(ids) >= needed + _SLACK_TOKENS:
                return ids
            enough = 2 * characters
    return _tokenize_text(tokenizer, "\n\n".join(texts))


def _shuffled(parts: Sequence[Reader], seed: int, budget: float) -> Iterator[Document]:
    """Documents in an order that depends on ``seed`` only: parts shuffled, and documents within their part.

    About ``budget`` characters are held in memory; a caller who needs more causes another pass over the part.
    """
    rng = random.Random(seed)
    order = list(parts)
    rng.shuffle(order)
    for part in order:
        part_seed, part_budget, yielded = rng.getrandbits(64), budget, 0
        while True:
            kept, whole = _smallest_keys(part(), random.Random(part_seed), part_budget)
            yield from kept[yielded:]
            if whole:
                break
            yielded, part_budget = len(kept), 4 * part_budget


def _smallest_keys(documents: Iterator[Document], rng: random.Random, budget: float) -> tuple[list[Document], bool]:
    """Sort documents by a random key each, and keep the shortest prefix of at least ``budget`` characters.

    The order does not depend on the budget: a larger one gives a longer prefix of the same permutation.

    Returns:
        The documents, and whether they are all there are.
    """
    heap: list[tuple[float, int, Document]] = []  # largest key on top
    total, whole = 0, True
    for number, document in enumerate(documents):
        heappush(heap, (-rng.random(), number, document))
        total += document.size
        while total - heap[0][2].size >= budget:
            total -= heappop(heap)[2].size
            whole = False
    return [document for _, _, document in sorted(heap, key=lambda item: (-item[0], item[1]))], whole


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
        f"{windows} windows of {seqlen} tokens sampled from the model itself at temperature 1 with seed {seed}",
    )
