"""A random model of Llama-3.2-1B's shape, as a matgptq checkpoint and as GGUF files.

Only speed is meant to be measured with it: codes and blocks are random bytes, and scales are small and finite.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from matgptq.checkpoints.format import Settings
from matgptq.checkpoints.writer import CheckpointWriter
from matgptq.nested_weight import NestedWeight
from matgptq.slicing import WIDTHS

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_SIZE, MLP, VOCABULARY = 2048, 16, 32, 8, 64, 8192, 128256
CONTEXT, ROPE_BASE, NORM_EPSILON = 2048, 500_000.0, 1e-5
GROUP_SIZE = 64

# {name in transformers: (name in GGUF, out_features, in_features)} of a block's matrices
MATRICES = {
    "self_attn.q_proj": ("attn_q", HEADS * HEAD_SIZE, HIDDEN),
    "self_attn.k_proj": ("attn_k", KV_HEADS * HEAD_SIZE, HIDDEN),
    "self_attn.v_proj": ("attn_v", KV_HEADS * HEAD_SIZE, HIDDEN),
    "self_attn.o_proj": ("attn_output", HIDDEN, HEADS * HEAD_SIZE),
    "mlp.gate_proj": ("ffn_gate", MLP, HIDDEN),
    "mlp.up_proj": ("ffn_up", MLP, HIDDEN),
    "mlp.down_proj": ("ffn_down", HIDDEN, MLP),
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}

# Where a block of each type keeps its float16 scales, and a value that makes weights of a few hundredths of them.
BLOCK_SCALES = {
    Type.Q8_0: {0: 3e-4},
    Type.Q4_0: {0: 5e-3},
    Type.Q6_K: {208: 1e-4},
    Type.Q3_K: {108: 5e-4},
    Type.Q2_K: {80: 2e-3, 82: 3e-3},
}


def write_checkpoint(path: Path, vocabulary: int, layers: int = LAYERS) -> None:
    """Write a checkpoint of that shape, its head tied to the embedding.

    Args:
        path: directory to create.
        vocabulary: rows of the embedding.
        layers: blocks.
    """
    generator = torch.Generator().manual_seed(0)
    settings = Settings(bits=8, target_bits=WIDTHS, scale_bits=(8,), group_size=GROUP_SIZE, ignore=("lm_head",))
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "vocab_size": vocabulary,
        "max_position_embeddings": CONTEXT,
        "rope_theta": ROPE_BASE,
        "rms_norm_eps": NORM_EPSILON,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "quantization_config": settings.to_dict(),
    }

    def weight(out_features: int, in_features: int) -> NestedWeight:
        codes = torch.randint(0, 256, (out_features, in_features), dtype=torch.uint8, generator=generator)
        scales = torch.rand(out_features, in_features // GROUP_SIZE, generator=generator) * 4e-4 + 1e-4
        return NestedWeight(codes, {8: scales.to(torch.bfloat16).to(torch.float16)})

    norm = torch.ones(HIDDEN, dtype=torch.bfloat16)
    with CheckpointWriter(path) as writer:
        writer.write_json("config.json", config)
        embedding = torch.randn(vocabulary, HIDDEN, generator=generator) * 0.02
        writer.add("model.embed_tokens.weight", embedding.to(torch.bfloat16))
        writer.add("model.norm.weight", norm)
        for layer in range(layers):
            for name, (_, out_features, in_features) in MATRICES.items():
                writer.add_layer(f"model.layers.{layer}.{name}", weight(out_features, in_features))
            for name in NORMS:
                writer.add(f"model.layers.{layer}.{name}.weight", norm.clone())
        writer.commit()


def write_gguf(path: Path, matrices: Type, head: Type, vocabulary: int, layers: int = LAYERS) -> None:
    """Write a GGUF file of that shape without a tokenizer.

    Args:
        path: file to create.
        matrices: type of every matrix of the blocks.
        head: type of the embedding, which is the output head, too.
        vocabulary: its rows.
        layers: blocks.
    """
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random weights, {matrices.name}, head {head.name}")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")
    norm = np.ones(HIDDEN, dtype=np.float32)
    writer.add_tensor("token_embd.weight", _blocks(generator, head, vocabulary, HIDDEN), raw_dtype=head)
    writer.add_tensor("output_norm.weight", norm)
    for layer in range(layers):
        for name, out_features, in_features in MATRICES.values():
            blocks = _blocks(generator, matrices, out_features, in_features)
            writer.add_tensor(f"blk.{layer}.{name}.weight", blocks, raw_dtype=matrices)
        for name in NORMS.values():
            writer.add_tensor(f"blk.{layer}.{name}.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _blocks(generator: np.random.Generator, kind: Type, rows: int, columns: int) -> np.ndarray:
    """Random bytes ``[rows, bytes of a row]`` that are valid blocks of a type."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
    for offset, scale in BLOCK_SCALES[kind].items():
        blocks[:, :, offset : offset + 2] = np.frombuffer(np.float16(scale).tobytes(), dtype=np.uint8)
    return blocks.reshape(rows, -1)
