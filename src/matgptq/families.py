"""Model families as data: where the blocks are, which layers in a block share an input, what a rotation changes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from matgptq.errors import UnsupportedModelError


@dataclass(frozen=True)
class RotationSites:
    """Where the modules lie that a rotation of the residual stream and of the value heads changes.

    Paths of ``norms``, ``writers``, ``values`` and ``outputs`` are inside a block.

    Attributes:
        norms: each RMSNorm of the residual stream, and all Linears that read what it puts out.
        writers: Linears that add to the residual stream.
        values: the Linear whose last rows are the value heads.
        outputs: the Linear that reads what attention makes of them.
        embedding, final_norm, head: paths in the causal language model.
        norm_unit: weight of an RMSNorm that changes nothing: 0 where the module computes with 1 + weight.
    """

    norms: tuple[tuple[str, tuple[str, ...]], ...]
    writers: tuple[str, ...]
    values: str
    outputs: str
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    norm_unit: float = 1.0


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_types: values of ``config.model_type`` that it serves.
        blocks: module path of the list of blocks in the causal language model.
        inputs: the quantizable layers of a block, grouped by the input they share, in the order of the forward pass:
            what attention reads, its output, what the MLP reads, its output. A group is solved as one matrix with one
            Hessian.
        rotation: what a rotation changes, or the reason why none leaves the model the same.
    """

    model_types: tuple[str, ...]
    blocks: str
    inputs: tuple[tuple[str, ...], ...]
    rotation: RotationSites | str

    @property
    def layers(self) -> tuple[str, ...]:
        """Quantizable layers of a block, by their path inside the block."""
        return tuple(layer for group in self.inputs for layer in group)

    @property
    def writers(self) -> tuple[str, ...]:
        """The layers of a block that add to the residual stream."""
        return tuple(layer for group in self.inputs[1::2] for layer in group)

    def shared_inputs(self, num_blocks: int) -> list[tuple[str, ...]]:
        """Layers that see one input, by their full names, over all blocks."""
        return [
            tuple(f"{self.blocks}.{block}.{layer}" for layer in group)
            for block in range(num_blocks)
            for group in self.inputs
            if len(group) > 1
        ]


_LLAMA_INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_LLAMA_ROTATION = RotationSites(
    norms=(("input_layernorm", _LLAMA_INPUTS[0]), ("post_attention_layernorm", _LLAMA_INPUTS[2])),
    writers=("self_attn.o_proj", "mlp.down_proj"),
    values="self_attn.v_proj",
    outputs="self_attn.o_proj",
)
_CENTRED = "its LayerNorm subtracts the mean over the channels, which a rotation does not keep"

FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        blocks="model.layers",
        inputs=_LLAMA_INPUTS,
        rotation=_LLAMA_ROTATION,
    ),
    Family(
        model_types=("gemma",),
        blocks="model.layers",
        inputs=_LLAMA_INPUTS,
        rotation=replace(_LLAMA_ROTATION, norm_unit=0.0),
    ),
    Family(
        model_types=("gemma2", "gemma3_text"),
        blocks="model.layers",
        inputs=_LLAMA_INPUTS,
        rotation="its RMSNorms after attention and MLP weigh each channel of what is added to the residual stream, "
        "and have no Linear after them that could take the weights",
    ),
    Family(
        model_types=("phi3",),
        blocks="model.layers",
        inputs=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
        rotation=RotationSites(
            norms=(
                ("input_layernorm", ("self_attn.qkv_proj",)),
                ("post_attention_layernorm", ("mlp.gate_up_proj",)),
            ),
            writers=("self_attn.o_proj", "mlp.down_proj"),
            values="self_attn.qkv_proj",
            outputs="self_attn.o_proj",
        ),
    ),
    Family(
        model_types=("opt",),
        blocks="model.decoder.layers",
        inputs=(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.out_proj",),
            ("fc1",),
            ("fc2",),
        ),
        rotation=_CENTRED,
    ),
    Family(
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        inputs=(
            ("attention.query_key_value",),
            ("attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ),
        rotation=_CENTRED,
    ),
)


def find_family(model_type: str) -> Family:
    """The family of a ``config.model_type``; raises ``UnsupportedModelError`` naming those that exist."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise UnsupportedModelError(
        f"model type {model_type!r} is not known; supported: {known}. A new one is an entry in matgptq.families"
    )
