"""Model families as data: where the blocks are, which layers in a block share an input, what a rotation changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from matgptq.errors import UnsupportedModelError


@dataclass(frozen=True)
class RotationSites:
    """Where the modules lie that a rotation of the residual stream and of the value heads changes.

    Paths of ``norms``, ``writers``, ``values`` and ``outputs`` are inside a block. One with a ``*`` stands for the
    same layer of every expert; a family with experts names the layers of all kinds of its blocks, and each block has
    some of them.

    Attributes:
        norms: each RMSNorm of the residual stream, and all Linears (and routers) that read what it puts out.
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
class ChannelSites:
    """Where channels come out of something linear that can be scaled, and who reads them (``channel_scaling``).

    Paths are inside a block, as those of ``RotationSites``.

    Attributes:
        norms: each norm in front of layers, and all Linears (and routers) that read what it puts out.
        pairs: a Linear whose last rows are channels, and the Linear that reads them, one in each kind of block.
        values: the one of them whose channels are the value heads.
        kept: readers that are never quantized.
        norm_unit: as in ``RotationSites``.
    """

    norms: tuple[tuple[str, tuple[str, ...]], ...]
    pairs: tuple[tuple[str, str], ...]
    values: str
    norm_unit: float = 1.0
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExpertSites:
    """The experts of a block: alike, each with a gate, an up and a down projection, and a router that chooses.

    Attributes:
        module: name of the layer with the experts in transformers' block.
        name: its name in files, in vLLM, and in a model that is quantized: layers carry that one.
        gate, up, down: the Linears of an expert, which is ``{name}.experts.{number}``.
        shared: quantizable layers that every token goes through beside the experts, grouped by the input they share;
            paths inside the block.
        kept: Linears inside the block that stay at full precision: what weighs the shared expert.
    """

    module: str = "mlp"
    name: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: tuple[tuple[str, ...], ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """Of the experts inside a block."""
        return f"{self.name}.experts"

    @property
    def router(self) -> str:
        """Path inside a block of what gives each token to experts; always kept at full precision."""
        return f"{self.name}.gate"

    def inputs(self, number: int) -> tuple[tuple[str, ...], ...]:
        """The layers of one expert, grouped by the input they share; paths inside the block."""
        expert = f"{self.path}.{number}"
        return (f"{expert}.{self.gate}", f"{expert}.{self.up}"), (f"{expert}.{self.down}",)

    def belongs(self, path: str) -> bool:
        """Whether a layer, by its path inside the block, is an expert's."""
        return path.startswith(f"{self.path}.")


@dataclass(frozen=True)
class PlainBlocks:
    """Blocks that ``matgptq.inference.decoding`` knows a short way through, and how they differ.

    ``x += attention(norm(x)); x += mlp(norm(x))`` with RMSNorm, rotary embedding of whole heads and a gated MLP, under
    Llama's names.

    Attributes:
        norms: before attention and before the MLP.
        update_norms: of what attention and the MLP add; none where it is added as it is.
        eps: name of what a norm adds to the mean square.
        norm_unit: as in ``RotationSites``; a norm of 1 + weight rounds only its result.
    """

    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    update_norms: tuple[str, str] | tuple[()] = ()
    eps: str = "variance_epsilon"
    norm_unit: float = 1.0


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_types: values of ``config.model_type`` that it serves.
        blocks: module path of the list of blocks in the causal language model.
        inputs: the quantizable layers of a block, grouped by the input they share, in the order of the forward pass:
            what attention reads, its output, what the MLP reads, its output. A group is solved as one matrix with one
            Hessian. In a family with experts, those of a block without any.
        rotation: what a rotation changes, or the reason why none leaves the model the same.
        channels: what can be scaled between its layers; None if that is not known.
        experts: where blocks have experts, if the family has such blocks.
        parts: what a model has beside the language model, all of it kept as it is.
        plain_blocks: what its blocks are like, if they are of the plain kind.
    """

    model_types: tuple[str, ...]
    blocks: str
    inputs: tuple[tuple[str, ...], ...]
    rotation: RotationSites | str
    channels: ChannelSites | None = None
    experts: ExpertSites | None = None
    parts: tuple[str, ...] = ()
    plain_blocks: PlainBlocks | None = None

    @property
    def ordinary_inputs(self) -> tuple[tuple[str, ...], ...]:
        """Groups of all layers that a block may have beside those of its experts."""
        return self.inputs + (self.experts.shared if self.experts else ())

    @property
    def layers(self) -> tuple[str, ...]:
        """Quantizable layers of a block beside those of its experts, by their path inside the block."""
        return tuple(layer for group in self.ordinary_inputs for layer in group)

    def block_inputs(self, num_experts: int | None) -> tuple[tuple[str, ...], ...]:
        """Groups of quantizable layers of a block with so many experts, or of one that has none."""
        if self.experts is None or num_experts is None:
            return self.inputs
        dense = f"{self.experts.name}."
        attention = tuple(group for group in self.inputs if not group[0].startswith(dense))
        experts = tuple(group for number in range(num_experts) for group in self.experts.inputs(number))
        return attention + self.experts.shared + experts

    def place(self, layer: str) -> tuple[int, str]:
        """Block of a layer and path inside it; block -1 and the whole name for a layer outside the blocks."""
        prefix = f"{self.blocks}."
        index, _, path = layer.removeprefix(prefix).partition(".")
        if not layer.startswith(prefix) or not index.isdecimal() or not path:
            return -1, layer
        return int(index), path

    def shared_inputs(self, layers: Iterable[str]) -> list[tuple[str, ...]]:
        """Those of some layers that see one input, group by group; layers by their full names."""
        first = {path: group[0] for group in self.ordinary_inputs for path in group}
        groups: dict[tuple[int, str], list[str]] = {}
        for layer in layers:
            block, path = self.place(layer)
            if self.experts is not None and self.experts.belongs(path):
                expert, _, leaf = path.rpartition(".")
                key = f"{expert}.{self.experts.gate if leaf == self.experts.up else leaf}"
            else:
                key = first.get(path, path)
            groups.setdefault((block, key), []).append(layer)
        return [tuple(group) for group in groups.values() if len(group) > 1]

    def expert_groups(self, layers: Iterable[str]) -> dict[int, tuple[str, ...]]:
        """Those of some layers that belong to experts, by their block."""
        groups: dict[int, list[str]] = {}
        for layer in layers:
            block, path = self.place(layer)
            if self.experts is not None and self.experts.belongs(path):
                groups.setdefault(block, []).append(layer)
        return {block: tuple(group) for block, group in groups.items()}

    def routers(self, layers: Iterable[str]) -> list[str]:
        """Full names of the routers of all blocks that have expert layers among these."""
        if self.experts is None:
            return []
        return [f"{self.blocks}.{block}.{self.experts.router}" for block in self.expert_groups(layers)]

    def writes(self, path: str) -> bool:
        """Whether a layer, by its path inside the block, adds to the residual stream."""
        if self.experts is not None and self.experts.belongs(path):
            return path.endswith(f".{self.experts.down}")
        return any(path in group for group in self.ordinary_inputs[1::2])

    def is_hidden(self, path: str) -> bool:
        """Whether a layer, by its path inside the block, makes the hidden channels of an MLP or of an expert."""
        if self.experts is not None and self.experts.belongs(path):
            return not path.endswith(f".{self.experts.down}")
        return any(path in group for group in self.ordinary_inputs[2::2])


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


def _with_experts(sites: RotationSites, experts: ExpertSites) -> RotationSites:
    """Rotation sites of blocks of which some or all have experts in the place of the MLP."""
    attention, (norm, dense) = sites.norms
    expert = f"{experts.path}.*"
    readers = (*dense, experts.router, f"{expert}.{experts.gate}", f"{expert}.{experts.up}", *experts.kept)
    shared = [group for group in experts.shared if group[0].endswith(f".{experts.gate}")]
    readers += tuple(path for group in shared for path in group)
    writers = tuple(path for group in experts.shared if group not in shared for path in group)
    return replace(
        sites, norms=(attention, (norm, readers)), writers=(*sites.writers, f"{expert}.{experts.down}", *writers)
    )


def _channels(rotation: RotationSites, *hidden: tuple[str, str], experts: ExpertSites | None = None) -> ChannelSites:
    """Channels of blocks that can be rotated: their norms, value heads, and those between up and down projections."""
    pairs = ((rotation.values, rotation.outputs), *hidden)
    kept: tuple[str, ...] = ()
    if experts is not None:
        pairs += ((f"{experts.path}.*.{experts.up}", f"{experts.path}.*.{experts.down}"),)
        kept = (experts.router, *experts.kept)
    return ChannelSites(rotation.norms, pairs, rotation.values, rotation.norm_unit, kept)


_DENSE_CHANNELS = ("mlp.up_proj", "mlp.down_proj")


_MIXTRAL = ExpertSites(name="block_sparse_moe", gate="w1", up="w3", down="w2")
_QWEN_MOE = ExpertSites()
_QWEN2_MOE = ExpertSites(
    shared=(
        ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        ("mlp.shared_expert.down_proj",),
    ),
    kept=("mlp.shared_expert_gate",),
)
_NORMS_IN_FRONT = (
    "its RMSNorms after attention and MLP weigh each channel of what is added to the residual stream, and have no "
    "Linear after them that could take the weights"
)
_MIXTRAL_ROTATION = _with_experts(
    replace(
        _LLAMA_ROTATION,
        norms=(_LLAMA_ROTATION.norms[0], ("post_attention_layernorm", ())),
        writers=("self_attn.o_proj",),
    ),
    _MIXTRAL,
)
_QWEN_MOE_ROTATION = _with_experts(_LLAMA_ROTATION, _QWEN_MOE)
_QWEN2_MOE_ROTATION = _with_experts(_LLAMA_ROTATION, _QWEN2_MOE)
_GEMMA_ROTATION = replace(_LLAMA_ROTATION, norm_unit=0.0)
_GEMMA2_CHANNELS = replace(
    _channels(_GEMMA_ROTATION, _DENSE_CHANNELS),
    norms=(("input_layernorm", _LLAMA_INPUTS[0]), ("pre_feedforward_layernorm", _LLAMA_INPUTS[2])),
)
_GEMMA3_BLOCKS = PlainBlocks(
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    update_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    eps="eps",
    norm_unit=0.0,
)
_PHI3_ROTATION = RotationSites(
    norms=(
        ("input_layernorm", ("self_attn.qkv_proj",)),
        ("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ),
    writers=("self_attn.o_proj", "mlp.down_proj"),
    values="self_attn.qkv_proj",
    outputs="self_attn.o_proj",
)
_CENTRED = "its LayerNorm subtracts the mean over the channels, which a rotation does not keep"

FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        blocks="model.layers",
        inputs=_LLAMA_INPUTS,
        rotation=_LLAMA_ROTATION,
        channels=_channels(_LLAMA_ROTATION, _DENSE_CHANNELS),
        plain_blocks=PlainBlocks(),
    ),
    Family(
        model_types=("mixtral",),
        blocks="model.layers",
        inputs=_LLAMA_INPUTS[:2],
        rotation=_MIXTRAL_ROTATION,
        channels=_channels(_MIXTRAL_ROTATION, experts=_MIXTRAL),
        experts=_MIXTRAL,
    ),
    Family(
        model_types=("qwen3_moe", "olmoe"),
        blocks="model.layers",
        inputs=_LLAMA_INPUTS,
        rotation=_QWEN_MOE_ROTATION,
        channels=_channels(_QWEN_MOE_ROTATION, _DENSE_CHANNELS, experts=_QWEN_MOE),
        experts=_QWEN_MOE,
    ),
    Family(
        model_types=("qwen2_moe",),
        blocks="model.layers",
        inputs=_LLAMA_INPUTS,
        rotation=_QWEN2_MOE_ROTATION,
        channels=_channels(
            _QWEN2_MOE_ROTATION,
            _DENSE_CHANNELS,
            ("mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"),
            experts=_QWEN2_MOE,
        ),
        experts=_QWEN2_MOE,
    ),
    Family(
        model_types=("gemma",),
        blocks="model.layers",
        inputs=_LLAMA_INPUTS,
        rotation=_GEMMA_ROTATION,
        channels=_channels(_GEMMA_ROTATION, _DENSE_CHANNELS),
        plain_blocks=PlainBlocks(eps="eps", norm_unit=0.0),
    ),
    Family(
        model_types=("gemma2",),  # scores of its attention go through a function of their own
        blocks="model.layers",
        inputs=_LLAMA_INPUTS,
        rotation=_NORMS_IN_FRONT,
        channels=_GEMMA2_CHANNELS,
    ),
    Family(
        model_types=("gemma3_text",),
        blocks="model.layers",
        inputs=_LLAMA_INPUTS,
        rotation=_NORMS_IN_FRONT,
        channels=_GEMMA2_CHANNELS,
        plain_blocks=_GEMMA3_BLOCKS,
    ),
    Family(
        model_types=("gemma3",),
        blocks="model.language_model.layers",
        inputs=_LLAMA_INPUTS,
        rotation=_NORMS_IN_FRONT,
        channels=_GEMMA2_CHANNELS,
        parts=("model.vision_tower", "model.multi_modal_projector"),
        plain_blocks=_GEMMA3_BLOCKS,
    ),
    Family(
        model_types=("phi3",),
        blocks="model.layers",
        inputs=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
        rotation=_PHI3_ROTATION,
        channels=_channels(_PHI3_ROTATION, ("mlp.gate_up_proj", "mlp.down_proj")),
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


def check_parts(config: Mapping[str, Any]) -> None:
    """Refuse a model of several parts whose language model we do not know how to quantize alone.

    Args:
        config: parsed ``config.json``.

    Raises:
        UnsupportedModelError: names the parts, and what to do.
    """
    known = {name for family in FAMILIES for name in family.model_types}
    parts = sorted(key for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping))
    model_type = str(config.get("model_type"))
    if model_type in known or "text_config" not in parts:
        return
    language = config["text_config"].get("model_type")
    advice = "its language model is not known either"
    if language in known:
        advice = (
            f"its language model ({language}) can be quantized: load the model in transformers and save its language "
            "model alone, as a causal language model with its head"
        )
    several = sorted(name for family in FAMILIES if family.parts for name in family.model_types)
    raise UnsupportedModelError(
        f"model type {model_type!r} has several parts ({', '.join(parts)}), which is supported for "
        f"{', '.join(several)} only; {advice}"
    )


def known_family(model_type: object) -> Family | None:
    """The family of a ``config.model_type``, or None: a checkpoint of another program may hold any architecture."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def find_family(model_type: str) -> Family:
    """The family of a ``config.model_type``; raises ``UnsupportedModelError`` naming those that exist."""
    family = known_family(model_type)
    if family is not None:
        return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise UnsupportedModelError(
        f"model type {model_type!r} is not known; supported: {known}. A new one is an entry in matgptq.models.families"
    )
