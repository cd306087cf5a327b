"""Text to token windows, for calibration and for evaluation.

    ``load_windows``        calibration: documents shuffled by seed, packed without padding
    ``evaluation_windows``  evaluation: windows from the start of the text, no special tokens added
    ``generate_windows``    text that the model itself writes (the data set ``self``), kept in a cache

Both loaders return ``Windows``: the tokens, and in words how they came about, to be printed beside every number that
was measured on them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from matgptq.errors import CalibrationError, ConfigurationError
from matgptq.text_sources import Document, Reader, TextSource, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
TokenRows = Tensor | Sequence[Sequence[int]] | Sequence[Tensor]

SELF = "self"
# Evaluation on a model's own text must not see the text that it was calibrated on, which has the plain seed. The
# offset is not a multiple of 2^32, because torch's generator looks at the low 32 bits of a seed only.
_SELF_EVALUATION_SEED = 0x45564131
# Part of the cache key: raise it when the same arguments would generate other tokens.
_GENERATION_VERSION = 1
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
    """

    tokens: Tensor
    protocol: str


def load_windows(
    dataset: str | Path | TokenRows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    nsamples: int | None,
    seqlen: int,
    seed: int,
    model: nn.Module | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
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
        tokenizer: the model's tokenizer.
        nsamples: number of windows, or ``None`` for all that the text fills (not with ``self``).
        seqlen: tokens in a window.
        seed: of the order of the documents, or of the generation.
        model: needed for ``self``; where given, token ids are checked against its embedding.
        cache_dir: where ``self`` keeps generated text; see ``generate_windows``.
        progress: called with (tokens done, tokens in all); not called when ``nsamples`` is ``None``.

    Raises:
        CalibrationError: the text cannot be read, is malformed or too short, or the ids do not fit the model.
        ConfigurationError: ``nsamples`` or ``seqlen`` is not positive.
    """
    _check_counts(nsamples, seqlen)
    if not isinstance(dataset, (str, Path)):
        return _given_windows(dataset, tokenizer, nsamples, seqlen, model)
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
        f"{len(tokens)} windows of {seqlen} tokens from {source.name}: documents shuffled with seed {seed}, the "
        f"tokenizer's special tokens, {joins}, packed without padding",
    )


def evaluation_windows(
    dataset: str | Path | TokenRows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int | None,
    seqlen: int,
    seed: int = 0,
    model: nn.Module | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Windows:
    """Windows for evaluation: the text from its start, in windows that do not overlap, no special tokens added.

    The text is a ``.txt`` file exactly as it is; for ``wikitext2`` the rows of the test split joined by two newlines,
    as in the GPTQ papers; otherwise the documents in file order joined by two newlines. It is tokenized as one
    string with ``add_special_tokens=False`` and cut every ``seqlen`` tokens; the remainder is left out. Data sets of
    the hub give their test or validation split where they have one. ``self`` generates other text than
    ``load_windows`` does with the same seed.

    Args:
        dataset, tokenizer, model, cache_dir, progress: as for ``load_windows``.
        windows: number of windows, or ``None`` for all that the text fills (not with ``self``).
        seqlen: tokens in a window.
        seed: of ``self`` only.

    Raises:
        CalibrationError: the text cannot be read, is malformed or too short, or the ids do not fit the model.
        ConfigurationError: ``windows`` or ``seqlen`` is not positive.
    """
    _check_counts(windows, seqlen)
    if not isinstance(dataset, (str, Path)):
        return _given_windows(dataset, tokenizer, windows, seqlen, model)
    if dataset == SELF:
        return _self_windows(tokenizer, windows, seqlen, seed + _SELF_EVALUATION_SEED, model, cache_dir, progress)

    source = open_source(dataset, split="test")
    if source.whole_text is not None:
        text_is, ids = source.whole_text_is, _tokenize_text(tokenizer, source.whole_text())
    else:
        needed = math.inf if windows is None else windows * seqlen
        text_is, ids = 'documents in file order joined by "\\n\\n"', _tokenize_joined(tokenizer, source, needed)
    tokens, available = pack_windows([ids], nsamples=windows, seqlen=seqlen, progress=progress)
    _check_enough(source.name, tokens, available, windows, seqlen)
    _check_vocabulary(tokens, source.name, tokenizer, model)
    return Windows(
        tokens,
        f"{len(tokens)} windows of {seqlen} tokens from the start of {source.name}: {text_is}, no special tokens "
        f"added, no overlap",
    )


def pack_windows(
    documents: Iterable[Sequence[int]], *, nsamples: int | None, seqlen: int, progress: Progress | None = None
) -> tuple[Tensor, int]:
    """Concatenate token sequences and cut the result every ``seqlen`` tokens.

    No more of ``documents`` is consumed than ``nsamples`` windows need.

    Returns:
        The windows, ``torch.int64`` ``[at most nsamples, seqlen]``, and the number of tokens consumed.
    """
    wanted = None if nsamples is None else nsamples * seqlen
    stream: list[int] = []
    for ids in documents:
        stream.extend(ids)
        if wanted is not None:
            if progress is not None:
                progress(min(len(stream), wanted), wanted)
            if len(stream) >= wanted:
                break
    count = len(stream) // seqlen
    if nsamples is not None:
        count = min(count, nsamples)
    tokens = torch.tensor(stream[: count * seqlen], dtype=torch.int64)
    return tokens.reshape(count, seqlen), len(stream)


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_counts(windows: int | None, seqlen: int) -> None:
    if windows is not None and windows < 1:
        raise ConfigurationError(f"the number of windows must be at least 1, not {windows}")
    if seqlen < 1:
        raise ConfigurationError(f"seqlen must be at least 1, not {seqlen}")


def _check_enough(name: str, tokens: Tensor, available: int, windows: int | None, seqlen: int) -> None:
    wanted = 1 if windows is None else windows
    if len(tokens) >= wanted:
        return
    fit = f"take at most {len(tokens)} windows, or " if len(tokens) else ""
    raise CalibrationError(
        f"{name}: too little text: {available} tokens, but {wanted} windows of {seqlen} need {wanted * seqlen}; "
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


def _tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: being longer than the model's context is no fault of a text that is cut into windows.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
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


def _tokenize_joined(tokenizer: PreTrainedTokenizerBase, source: TextSource, needed: float) -> list[int]:
    """Tokens of the documents joined by two newlines: all of them, or enough that the first ``needed`` are final."""
    texts: list[str] = []
    characters, enough = 0, needed * _CHARACTERS_PER_TOKEN
    for document in source.documents():
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


# --- the model's own text --------------------------------------------------------------------------------------------


def _self_windows(
    tokenizer: PreTrainedTokenizerBase,
    windows: int | None,
    seqlen: int,
    seed: int,
    model: nn.Module | None,
    cache_dir: str | Path | None,
    progress: Progress | None,
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


def generate_windows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    document_tokens: int = 512,
    batch_size: int = 32,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Sample token windows from the model itself.

    Documents of ``document_tokens`` tokens are sampled side by side and packed into windows as in ``load_windows``;
    many short ones cost a fraction of few long ones. A document starts with BOS if the tokenizer or the model's
    config has one, else with a random token that is not special. EOS does not stop it: the model goes on with what
    it takes to come next. The result is cached, keyed by the model's weights and every argument that changes it.

    Args:
        model: a causal LM of transformers; it is run in eval mode and left in the mode that it had.
        tokenizer: the model's tokenizer.
        nsamples: number of windows.
        seqlen: tokens in a window.
        seed: of the sampling; the global generators are neither used nor changed.
        document_tokens: tokens in a document, cut to ``seqlen``; at most the positions that the model has.
        batch_size: documents sampled at a time; memory for the keys and values of batch_size * document_tokens
            tokens is needed. It changes the tokens drawn, and so is part of the cache key.
        temperature: of the sampling, positive.
        top_k: sample among the ``top_k`` likeliest tokens only.
        top_p: sample among the likeliest tokens that together reach this probability, in (0, 1].
        cache_dir: directory of the cache; by default ``$MATGPTQ_CACHE/self``, else ``$XDG_CACHE_HOME/matgptq/self``,
            else ``~/.cache/matgptq/self``. A cache that cannot be read or written is a warning, not an error.
        progress: called with (tokens done, tokens in all).

    Returns:
        ``torch.int64`` ``[nsamples, seqlen]`` on the CPU.

    Raises:
        CalibrationError: a document exceeds the model's positions, or the model's logits are not finite.
        ConfigurationError: an option is out of range.
    """
    _check_counts(nsamples, seqlen)
    if document_tokens < 1:
        raise ConfigurationError(f"document_tokens must be at least 1, not {document_tokens}")
    if batch_size < 1:
        raise ConfigurationError(f"batch_size must be at least 1, not {batch_size}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigurationError(f"temperature must be positive, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ConfigurationError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigurationError(f"top_p must be in (0, 1], not {top_p}")
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    positions = getattr(config, "max_position_embeddings", None)
    length = min(document_tokens, seqlen)
    if positions is not None and length > positions:
        raise CalibrationError(
            f"the model has {positions} positions and cannot generate documents of {length} tokens; "
            f"set document_tokens to at most {positions}"
        )
    documents = math.ceil(nsamples * seqlen / length)

    size = _vocabulary_size(tokenizer, model)
    # Rows beyond the tokenizer pad the embedding to a round size; no text contains them.
    known = min(size, len(tokenizer))
    first = _first_tokens(tokenizer, config, known)
    options = {
        "version": _GENERATION_VERSION,
        "nsamples": nsamples,
        "seqlen": seqlen,
        "seed": seed,
        "length": length,
        "batch_size": min(batch_size, documents),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "known": known,
        "first": hashlib.sha256(repr(first).encode()).hexdigest(),
    }
    key = hashlib.sha256(json.dumps([model_fingerprint(model), options], sort_keys=True).encode()).hexdigest()
    directory = _default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    path = directory / f"{key[:40]}.safetensors"
    cached = _read_cache(path, key, nsamples, seqlen, size)
    if cached is not None:
        if progress is not None:
            progress(documents * length, documents * length)
        return cached

    sampler = _Sampler(temperature, top_k, top_p, known)
    was_training = model.training
    model.eval()
    try:
        texts = _generate(model, sampler, first, documents, length, seed, batch_size, progress)
    finally:
        model.train(was_training)
    tokens = texts.flatten()[: nsamples * seqlen].reshape(nsamples, seqlen)
    _write_cache(path, key, tokens)
    return tokens


def _first_tokens(tokenizer: PreTrainedTokenizerBase, config: Any, known: int) -> list[int]:
    """Tokens that a document may start with: BOS alone, or every token that is not special."""
    for bos in (tokenizer.bos_token_id, getattr(config, "bos_token_id", None)):
        if isinstance(bos, int) and 0 <= bos < known:
            return [bos]
    special = set(tokenizer.all_special_ids)
    special.update(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    ordinary = [index for index in range(known) if index not in special]
    if not ordinary:
        raise CalibrationError("the tokenizer has special tokens only, so no text can be generated; name a text")
    return ordinary


@dataclass(frozen=True)
class _Sampler:
    """How the next token is drawn; fields as in ``generate_windows``. Ids from ``known`` on are never drawn."""

    temperature: float
    top_k: int | None
    top_p: float | None
    known: int

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Draw one token for each row of ``logits`` [batch, vocabulary]; ``torch.int64`` [batch, 1]."""
        scores = logits[:, : self.known].float() / self.temperature
        if self.top_k is not None and self.top_k < self.known:
            threshold = scores.topk(self.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < threshold, -torch.inf)
        probabilities = scores.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            descending, order = probabilities.sort(dim=-1, descending=True)
            # A token goes if those before it reach top_p already: the likeliest one always stays.
            dropped = descending.cumsum(-1) - descending >= self.top_p
            probabilities = probabilities.scatter(-1, order, descending.masked_fill(dropped, 0.0))
        # Inversion, because torch.multinomial draws a number for every token of the vocabulary: 20 times as long.
        cumulative = probabilities.cumsum(-1)
        total = cumulative[:, -1:]
        if not torch.isfinite(total).all():
            raise CalibrationError(
                "the model's logits are not finite, so it cannot generate text; "
                "check the model and its dtype, or name a text instead of 'self'"
            )
        uniform = torch.rand(total.shape, generator=generator, device=total.device)
        # A hair below 1, or rounding could carry the product up to the total, which is past the last token.
        return torch.searchsorted(cumulative, uniform * (1 - 2**-20) * total, right=True)


@torch.no_grad()
def _generate(
    model: nn.Module,
    sampler: _Sampler,
    first: list[int],
    documents: int,
    length: int,
    seed: int,
    batch_size: int,
    progress: Progress | None,
) -> Tensor:
    """Sample ``documents`` sequences; ``torch.int64`` ``[documents, length]`` on the CPU."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    generator = torch.Generator(device).manual_seed(seed)
    chooser = torch.Generator().manual_seed(seed)
    starts = torch.tensor(first)[torch.randint(len(first), (documents,), generator=chooser)]
    tokens = torch.empty(documents, length, dtype=torch.int64, device=device)
    tokens[:, 0] = starts.to(device)
    done, total = 0, documents * length
    for batch in torch.split(tokens, batch_size):  # views [at most batch_size, length], filled in place
        cache = _growing_cache(model.config, length)
        for position in range(1, length):
            output = model(input_ids=batch[:, position - 1 : position], past_key_values=cache, use_cache=True)
            batch[:, position : position + 1] = sampler.draw(output.logits[:, -1].to(device), generator)
            if progress is not None:
                progress(done + len(batch) * position, total)
        done += len(batch) * length
        if progress is not None:
            progress(done, total)
    return tokens.cpu()


def _growing_cache(config: Any, capacity: int) -> Any:
    """A ``DynamicCache`` whose full-attention layers write into room for ``capacity`` tokens reserved beforehand.

    The layers of transformers concatenate, which copies the whole cache for every token.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class ReservedLayer(DynamicLayer):  # type: ignore[misc]
        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            super().lazy_initialization(key_states, value_states)
            self.room = [
                states.new_empty(*states.shape[:-2], capacity, states.shape[-1])
                for states in (key_states, value_states)
            ]

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            start = self.get_seq_length()
            stop = start + key_states.shape[-2]
            self.room[0][..., start:stop, :] = key_states
            self.room[1][..., start:stop, :] = value_states
            self.keys, self.values = (room[..., :stop, :] for room in self.room)
            return self.keys, self.values

    cache = DynamicCache(config=config)
    # Other kinds of layer (sliding windows, linear attention) stay as they are.
    cache.layers = [ReservedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def model_fingerprint(model: nn.Module) -> str:
    """A hash of a model's config and weights that does not depend on where it was loaded from.

    Of every parameter it takes name, shape, dtype and up to 64 elements spread over it, so that it costs next to
    nothing. Training or quantizing a model changes practically every element, and so the fingerprint.
    """
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    for moves in ("_name_or_path", "_commit_hash", "transformers_version"):
        config.pop(moves, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype};".encode())
        flat = parameter.detach().reshape(-1)
        if flat.numel() and flat.device.type != "meta":
            index = torch.arange(64, device=flat.device) * (flat.numel() - 1) // 63
            digest.update(flat[index].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _default_cache_dir() -> Path:
    if root := os.environ.get("MATGPTQ_CACHE"):
        return Path(root).expanduser() / "self"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "matgptq" / "self"


def _read_cache(path: Path, key: str, nsamples: int, seqlen: int, vocabulary: int) -> Tensor | None:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            matches = (file.metadata() or {}).get("key") == key
            tokens: Tensor = file.get_tensor("tokens")
    except (SafetensorError, OSError, ValueError) as error:
        logger.warning("%s is damaged (%s); generating the text again", path, error)
        return None
    sound = matches and tokens.dtype == torch.int64 and tuple(tokens.shape) == (nsamples, seqlen)
    if not sound or int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        logger.warning("%s does not hold the text that its name says; generating it again", path)
        return None
    return tokens


def _write_cache(path: Path, key: str, tokens: Tensor) -> None:
    from safetensors.torch import save

    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".self-", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            file.write(save({"tokens": tokens.contiguous()}, metadata={"key": key}))
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        logger.warning("generated text cannot be kept in %s (%s); it will be generated again next time", path, error)
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
