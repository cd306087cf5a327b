"""Documents to tokens: special tokens, joins and chat templates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Literal

from matgptq.errors import CalibrationError
from matgptq.text.sources import Document, TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How a text becomes windows: each starts as a prompt does, with the BOS that the tokenizer puts in front of one
# (``bos``), or no special tokens are added (``plain``), or the code of the GPTQ papers is followed (``gptq``).
TextProtocol = Literal["bos", "plain", "gptq"]

# Characters read ahead for each token that is needed; too few costs a second pass over the file, nothing else.
CHARACTERS_PER_TOKEN = 8
# Text beyond the last window that evaluation tokenizes, so that cutting the text cannot change a token inside.
_SLACK_TOKENS = 256


def evaluation_tokens(
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
        texts = [_text_of(tokenizer, each) for each in islice(source.documents(), count)]
        ids = _tokenize_text(tokenizer, source.gptq_separator.join(texts), special)
        if source.gptq_windows is not None:
            ids = ids[: source.gptq_windows * seqlen]
        return f"{first} joined by {json.dumps(source.gptq_separator)}", ids
    if windows is None:
        return f'{first} joined by "\\n\\n"', _tokenize_joined(tokenizer, islice(source.documents(), count), math.inf)
    needed = seqlen + (windows - 1) * stride
    return 'documents in file order joined by "\\n\\n"', _tokenize_joined(tokenizer, source.documents(), needed)


def text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of a text: BOS, more, or nothing."""
    plain, whole = (_tokenize_text(tokenizer, "a", special) for special in (False, True))
    starts = (start for start in range(len(whole)) if plain and whole[start : start + len(plain)] == plain)
    return whole[: next(starts, 0)]


def _text_of(tokenizer: PreTrainedTokenizerBase, document: Document) -> str:
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


def tokenize_document(tokenizer: PreTrainedTokenizerBase, document: Document) -> list[int]:
    """A document for calibration: with the tokenizer's special tokens, closed with EOS if it has one."""
    text = _text_of(tokenizer, document)
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
    characters, enough = 0, needed * CHARACTERS_PER_TOKEN
    for document in documents:
        texts.append(_text_of(tokenizer, document))
        characters += len(texts[-1])
        if characters >= enough:
            ids = _tokenize_text(tokenizer, "\n\n".join(texts))
            if len(ids) >= needed + _SLACK_TOKENS:
                return ids
            enough = 2 * characters
    return _tokenize_text(tokenizer, "\n\n".join(texts))
