"""Texts, a tokenizer and a model that tests of text share."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

BOS, EOS = 0, 1
SPECIAL = ["<s>", "</s>", "<|user|>"]
TEMPLATE = "{{ '<s>' }}{% for m in messages %}{{ m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"


def make_tokenizer(
    *, adds_bos: bool = False, adds_eos: bool = False, has_eos: bool = True, template: str | None = None
):
    """Bytes as tokens: every text has a known number of tokens, and ids can be read back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos or adds_eos:
        single = ("<s> " if adds_bos else "") + "$A" + (" </s>" if adds_eos else "")
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>" if adds_bos else None,
        eos_token="</s>" if has_eos else None,
        additional_special_tokens=SPECIAL,
    )
    tokenizer.chat_template = template
    return tokenizer


def decode(tokenizer, tokens) -> str:
    return tokenizer.decode(torch.as_tensor(tokens).flatten().tolist(), clean_up_tokenization_spaces=False)


def texts_of(tokenizer, tokens) -> list[str]:
    return [text for text in decode(tokenizer, tokens).split("</s>") if text]


def write_parquet(path: Path, columns: dict, row_group_size: int | None = None) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


def write_json_lines(path: Path, records) -> Path:
    raw = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def make_model(seed: int = 0, **changes) -> LlamaForCausalLM:
    options = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 272,  # 13 rows more than the tokenizer has
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "initializer_range": 0.3,
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**options)).eval()
