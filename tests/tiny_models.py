"""Tiny random models of every supported family, saved as a user would have them on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from matgptq.models.blocks import Block, find_blocks
from matgptq.models.experts import unfuse_experts
from matgptq.models.families import find_family

VOCAB = 288  # 256 bytes and a few specials, and more rows than the tokenizer has tokens, as real models have
GROUP_SIZE = 64  # divides some layers below; the others fall back to 32

# Of MODELS those whose next tokens take the short way on a CPU, and those whose blocks do so each by itself.
PLAIN = ("llama", "llama-biased", "mistral", "qwen2", "qwen3", "gemma")
WINDOWED = ("gemma3_text", "gemma3")

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
    "mixtral": (
        "mixtral",
        {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    ),
    "qwen3_moe": (  # the first block has no experts
        "qwen3_moe",
        {
            **_LLAMA_LIKE,
            "head_dim": 32,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "moe_intermediate_size": 32,
            "mlp_only_layers": [0],
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **_LLAMA_LIKE,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "tie_word_embeddings": False,
        },
    ),
    "olmoe": (
        "olmoe",
        {**_LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": None, "tie_word_embeddings": False},
    ),
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
    "gemma3": (
        "gemma3",
        {
            "text_config": {
                **_LLAMA_LIKE,
                "sliding_window": 8,
                "query_pre_attn_scalar": 16,
                "layer_types": ["sliding_attention", "full_attention"],
                "max_position_embeddings": 64,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "boi_token_index": 284,
            "eoi_token_index": 285,
            "image_token_index": 286,
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
    common = {
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if "text_config" in settings:
        settings = {**settings, "text_config": {**common, **settings["text_config"], **overrides}}
    else:
        settings = {**common, **settings, **overrides}
    config = CONFIG_MAPPING[model_type](**settings)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(config)
    if dtype == torch.float64 and hasattr(config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the other one has no products in float64
    with torch.no_grad():
        for parameter in model.parameters():
            # Loud enough that the logits differ between tokens and a wrong weight shows.
            scale = 0.15 if parameter.dim() >= 2 else 0.3  # experts are fused in three dimensions
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise if parameter.dim() >= 2 else parameter + noise)
    return model.to(dtype).eval()


def blocks_of(model: Any) -> list[Block]:
    """The blocks of a model, whose experts become layers of their own."""
    family = find_family(model.config.model_type)
    unfuse_experts(model, family)
    return find_blocks(model, family)


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
    name: str,
    directory: Path,
    dtype: torch.dtype = torch.float32,
    num_hidden_layers: int = 2,
    shape: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Save model and tokenizer, and a few more files that a model on the hub has."""
    model = build_model(name, dtype, num_hidden_layers=num_hidden_layers, **(shape or {}))
    model.save_pretrained(directory, **options)
    make_tokenizer().save_pretrained(directory)
    (directory / "LICENSE").write_text("made of dice\n")
    (directory / "vocab.bin.txt").write_bytes(b"\x00\xff not text, and named like a weight\n")
    return directory


def token_ids(windows: int = 4, seqlen: int = 16, seed: int = 0) -> torch.Tensor:
    """Calibration or test tokens, specials left out."""
    return torch.randint(2, VOCAB, (windows, seqlen), generator=torch.Generator().manual_seed(seed))
