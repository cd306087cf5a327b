"""Tiny random models of every supported family, saved as a user would have them on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 288  # 256 bytes and a few specials, and more rows than the tokenizer has tokens, as real models have
GROUP_SIZE = 64  # divides some layers below; the others fall back to 32

_LLAMA_LIKE = {
    "hidden_size": 64,
    "intermediate_size": 96,  # not a multiple of 64: down_proj falls back to groups of 32
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
# {name: (model_type, settings)}; the names double as test ids.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_LLAMA_LIKE, "tie_word_embeddings": False}),
    "llama-tied": ("llama", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "llama-biased": (
        "llama",
        {**_LLAMA_LIKE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "mistral": ("mistral", {**_LLAMA_LIKE, "tie_word_embeddings": False, "sliding_window": 8}),
    "qwen2": ("qwen2", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_LLAMA_LIKE, "head_dim": 32, "tie_word_embeddings": True}),
    "gemma": ("gemma", {**_LLAMA_LIKE}),
    "gemma2": ("gemma2", {**_LLAMA_LIKE, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3_text": (
        "gemma3_text",
        {
            **_LLAMA_LIKE,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("phi3", {**_LLAMA_LIKE, "tie_word_embeddings": False, "pad_token_id": 0}),
    "opt": (
        "opt",
        {
            "hidden_size": 64,
            "word_embed_proj_dim": 32,  # project_in and project_out are Linears outside the blocks
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "tie_word_embeddings": False,
        },
    ),
}


def build_model(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A model whose every parameter is random: norms, biases and embeddings included."""
    model_type, settings = MODELS[name]
    config = CONFIG_MAPPING[model_type](
        **{
            "vocab_size": VOCAB,
            "max_position_embeddings": 64,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            **settings,
            **overrides,
        }
    )
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Loud enough that the logits differ between tokens and a wrong weight shows.
            scale = 0.15 if parameter.dim() == 2 else 0.3
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise if parameter.dim() == 2 else parameter + noise)
    return model.to(dtype).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens."""
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    return tokenizer


def save_model(
    name: str, directory: Path, dtype: torch.dtype = torch.float32, num_hidden_layers: int = 2, **options: Any
) -> Path:
    """Save model and tokenizer, and a few more files that a model on the hub has."""
    build_model(name, dtype, num_hidden_layers=num_hidden_layers).save_pretrained(directory, **options)
    make_tokenizer().save_pretrained(directory)
    (directory / "LICENSE").write_text("made of dice\n")
    (directory / "vocab.bin.txt").write_bytes(b"\x00\xff not text, and named like a weight\n")
    return directory


def token_ids(windows: int = 4, seqlen: int = 16, seed: int = 0) -> torch.Tensor:
    """Calibration or test tokens, specials left out."""
    return torch.randint(2, VOCAB, (windows, seqlen), generator=torch.Generator().manual_seed(seed))
