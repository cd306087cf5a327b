"""A tokenizer in the terms of llama.cpp, or a refusal: a wrong one would ruin every answer without an error.

llama.cpp has two kinds that our families use. ``gpt2`` is byte-level BPE: tokens, merges, and the name of a
pre-tokenizer, which stands for regular expressions compiled into llama.cpp. ``llama`` is SentencePiece's BPE: tokens
and scores; the two neighbours whose union has the highest score are merged first.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matgptq.errors import ExportError

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_SPACE = "▁"  # SentencePiece's
_UNREACHED = -1e6  # below the score of every merge; no vocabulary has so many

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What a pre-tokenizer does, step by step, and whether a word that is a token stays whole -> llama.cpp's name for it.
# GPT-2's own expression is the one that ByteLevel has built in.
_PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    (("gpt-2",), False): "gpt-2",
    (("digits", "gpt-2"), False): "smollm",
    ((_CONTRACTIONS + _WORDS + r"|\p{N}" + _REST,), False): "qwen2",
    ((_CONTRACTIONS + _WORDS + r"|\p{N}{1,3}" + _REST,), True): "llama-bpe",
    ((_CASED,), True): "tekken",
}
# What is done to spaces before SentencePiece's BPE -> whether one is put in front of the text.
_SPACES: dict[tuple[str, ...], bool] = {
    ("prepend", "replace"): True,
    ("replace",): False,
    ("replace", "split at spaces"): False,  # Gemma's, where no space is left to split at
    ("metaspace",): True,  # what transformers makes of Llama 2's
    ("metaspace without prefix",): False,
}


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, vocab_size: int, name: str) -> None:
    """Write a tokenizer's keys.

    Args:
        writer: of the GGUF file.
        tokenizer: a fast tokenizer of transformers.
        vocab_size: rows of the embedding; the token list is filled up to it.
        name: of the checkpoint, for errors.

    Raises:
        ExportError: llama.cpp has no tokenizer that does the same.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"{name}: gguf needs a fast tokenizer (tokenizer.json); {type(tokenizer).__name__} is none")
    record = json.loads(backend.to_str())
    model = record["model"]
    if model["type"] != "BPE":
        raise ExportError(f"{name}: gguf exports hold BPE tokenizers, not {model['type']}")
    for marks in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(marks):
            raise ExportError(f"{name}: llama.cpp's BPE has no {marks} ({model[marks]!r})")
    added = {token["id"]: token for token in record["added_tokens"]}
    largest = max([*model["vocab"].values(), *added])
    if largest >= vocab_size:
        raise ExportError(f"{name}: token {largest} lies outside the embedding of {vocab_size} rows")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"] or ()]
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    if _is_byte_level(record):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(record, name))
        writer.add_token_merges([" ".join(merge) for merge in merges])
    elif model.get("byte_fallback"):
        scores = _scores(model["vocab"], added, merges, name)
        for token, number in model["vocab"].items():
            if _is_byte(token):
                types[number] = BYTE
        if tokenizer.unk_token_id is not None:
            types[tokenizer.unk_token_id] = UNKNOWN
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([scores.get(number, _UNREACHED) for number in range(vocab_size)])
        writer.add_add_space_prefix(_adds_space(record, name))
    else:
        raise ExportError(f"{name}: its tokenizer is neither byte-level nor SentencePiece with bytes to fall back on")
    for number, token in added.items():
        # llama.cpp looks for these in the raw text, before spaces become anything else.
        text = token["content"] if token["special"] else token["content"].replace(_SPACE, " ")
        if types[number] != UNKNOWN:
            tokens[number], types[number] = text, CONTROL if token["special"] else USER_DEFINED
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special(writer, tokenizer)


def _add_special(writer: GGUFWriter, tokenizer: Any) -> None:
    for role in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{role}_token_id")
        if number is not None:
            getattr(writer, f"add_{role}_token_id")(number)
    encoded = tokenizer("a")["input_ids"]  # none, if it does not know the letter
    writer.add_add_bos_token(encoded[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(encoded[-1:] == [tokenizer.eos_token_id])
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = [{"name": role, "template": text} for role, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _is_byte_level(record: Mapping[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(record["pre_tokenizer"], "pretokenizers"))


def _steps(part: Mapping[str, Any] | None, children: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[children]) if part["type"] == "Sequence" else [part]


def _pre_tokenizer(record: Mapping[str, Any], name: str) -> str:
    done = []
    for step in _steps(record["pre_tokenizer"], "pretokenizers"):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False}:
                done += ["gpt-2"] if step.get("use_regex", True) else []
            case {"type": "Digits", "individual_digits": True}:
                done.append("digits")
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                done.append(pattern)
            case _:
                done.append(json.dumps(step))
    known = _PRE_TOKENIZERS.get((tuple(done), bool(record["model"].get("ignore_merges"))))
    # Composing characters (NFC) is the one normalization that llama.cpp's converter leaves out as well.
    if known is None or {step["type"] for step in _steps(record["normalizer"], "normalizers")} - {"NFC"}:
        raise ExportError(
            f"{name}: llama.cpp's tokenizers that gguf exports know ({', '.join(_PRE_TOKENIZERS.values())}) do not "
            f"split text as this one does: {'; '.join(done)}"
        )
    return known


def _scores(
    vocab: Mapping[str, int], added: Collection[int], merges: Sequence[tuple[str, ...]], name: str
) -> dict[int, float]:
    """Scores, by token, whose order is the order of the merges.

    SentencePiece merges any two neighbours whose union is a token, so that the list of merges must be complete.
    """
    scores: dict[int, float] = {}
    for rank, (left, right) in enumerate(merges):
        scores.setdefault(vocab[left + right], -float(rank))
    known = set(merges)
    for token, number in vocab.items():
        if number in added or _is_byte(token):
            continue
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair[0] in vocab and pair[1] in vocab and pair not in known:
                raise ExportError(
                    f"{name}: llama.cpp would merge {pair[0]!r} and {pair[1]!r}, which this tokenizer does not"
                )
    return scores


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _adds_space(record: Mapping[str, Any], name: str) -> bool:
    done = []
    steps = _steps(record["normalizer"], "normalizers"), _steps(record["pre_tokenizer"], "pretokenizers")
    for step in itertools.chain.from_iterable(steps):
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                done.append("prepend")
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                done.append("replace")
            case {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}:
                done.append("split at spaces")
            case {"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}:
                done.append("metaspace without prefix" if scheme == "never" else "metaspace")
            case _:
                done.append(json.dumps(step, ensure_ascii=False))
    adds = _SPACES.get(tuple(done))
    if adds is None:
        raise ExportError(
            f"{name}: before it merges tokens, llama.cpp's SentencePiece only makes {_SPACE} of spaces and puts one in "
            f"front, not what this tokenizer does: {'; '.join(done) or 'nothing'}"
        )
    return adds
