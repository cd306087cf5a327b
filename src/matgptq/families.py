"""Model families as data: where the blocks are, and which layers in a block share an input."""

from __future__ import annotations

from dataclasses import dataclass

from matgptq.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_types: values of ``config.model_type`` that it serves.
        blocks: module path of the list of blocks in the causal language model.
        inputs: the quantizable layers of a block, grouped by the input they share, in the order of the forward pass.
            A group is solved as one matrix with one Hessian.
    """

    model_types: tuple[str, ...]
    blocks: str
    inputs: tuple[tuple[str, ...], ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Quantizable layers of a block, by their path inside the block."""
        return tuple(layer for group in self.inputs for layer in group)

    def shared_inputs(self, num_blocks: int) -> list[tuple[str, ...]]:
        """Layers that see one input, by their full names, over all blocks."""
        return [
            tuple(f"{self.blocks}.{block}.{layer}" for layer in group)
            for block in range(num_blocks)
            for group in self.inputs
            if len(group) > 1
        ]


FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
        blocks="model.layers",
        inputs=(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ),
    ),
    Family(
        model_types=("phi3",),
        blocks="model.layers",
        inputs=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
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
