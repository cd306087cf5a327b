"""What a run holds in memory at the same time, stage by stage: in the system's, and in a GPU's where it runs on one.

Computed from the shapes of the model and the text. What these do not say (what PyTorch takes for itself, how much of a
block a backward pass wants again) was measured: docs/scale.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from matgptq.calibration.block_hessians import MOST_EXPERTS_PER_TOKEN
from matgptq.core.joined_rows import MOVED_ELEMENTS
from matgptq.core.output_hessian import count_parts, matrix_bytes
from matgptq.models.blocks import Block
from matgptq.models.logits import CHUNK_ELEMENTS
from matgptq.models.model_config import head_dim, key_value_heads
from matgptq.quantization.activations import Placement
from matgptq.quantization.plan import Plan, output_hessian_bytes
from matgptq.recipe import Recipe
from matgptq.text.self_text import BATCH_SIZE, DOCUMENT_TOKENS
from matgptq.tuning.scales import Schedule
from matgptq.tuning.text import DEFAULT_SEQLEN as TUNED_SEQLEN

# Stages, as the user is told of them.
TEXT, GRADIENTS, BLOCKS, TUNING = (
    "the model writes text",
    "gradients are found",
    "blocks are solved",
    "scales are tuned",
)

_PROGRAM_BYTES = 700_000_000  # Python, PyTorch and its workspaces
# What CUDA's libraries take, and what PyTorch's allocator leaves between pieces: an allowance, not measured.
_GPU_PROGRAM_BYTES = 500_000_000
_BESIDE_A_GPU = {(GRADIENTS, "output Hessians")}  # what a run on a GPU keeps in the system's memory
_HESSIAN_COPIES = 7  # as collected, prepared, in processing order, factored, and what a factorization works in
_OUTPUT_HESSIAN_COPIES = 4  # damped, factored, how rows pull each other, and what a factorization works in
_LEFT_COPIES = 2  # of what is left of rows that are solved together, counting what moves them
_SWEEP_BYTES = 60_000_000  # of one piece of rows
_WINDOW_COPIES = 6  # of the widest activations of a window that goes through a block
# Of what the layers of a block put out, to what a backward pass through the block keeps and makes: of Llama, Qwen 3,
# Phi-3 and GPT-NeoX 1.3 to 1.6 are kept.
_GRAPH_COPIES = 2
_LOGIT_COPIES = 4
_LEVEL_BYTES = 3  # of a weight whose scales are tuned: its code as it is read and as it is served, and its level
_STATES_BYTES = 1 << 29  # between all blocks: what more windows at a time gain is little where blocks stay in memory
MEMORY_SHARE = 4  # what has a choice of its place stays in memory up to a quarter of it, each thing by itself


@dataclass(frozen=True)
class StageMemory:
    """The stages of one run.

    Attributes:
        network: the model; may be without weights.
        plan: of the run.
        recipe: of the run.
        streamed: blocks are read one by one, but for text that the model writes itself and for tuning.
        activations: where those are kept.
        output_hessians: where they are summed.
        threads: that windows and rows are shared out among.
        writes_text: the model writes its own text first.
        writes_in_a_copy: for that its weights are rounded to 16 bits.
        on_gpu: blocks are run on a GPU, and almost everything lies in its memory.
        windows_together: whose gradients are found at a time, see ``with_windows``.
    """

    network: Any
    plan: Plan
    recipe: Recipe
    streamed: bool
    activations: Placement
    output_hessians: Placement
    threads: int
    writes_text: bool
    writes_in_a_copy: bool
    on_gpu: bool = False
    windows_together: int = 1

    def stages(self) -> dict[str, dict[str, int]]:
        """Bytes of the system's memory in each stage by what they are for; those of a stage are needed together."""
        found = {}
        for stage, parts in self._stages().items():
            if self.on_gpu:
                parts = {name: count for name, count in parts.items() if (stage, name) in _BESIDE_A_GPU}
                parts["tensors between files and GPU"] = self._on_the_way
            found[stage] = {"program": _PROGRAM_BYTES, **parts}
        return found

    def gpu_stages(self) -> dict[str, dict[str, int]]:
        """Bytes of a GPU's memory in each stage by what they are for; of no stage if the run needs none."""
        if not self.on_gpu:
            return {}
        return {stage: self._on_gpu(stage, parts) for stage, parts in self._stages().items()}

    def _stages(self) -> dict[str, dict[str, int]]:
        stages = {}
        if self.writes_text:
            stages[TEXT] = self._of_text()
        if self.plan.nsamples and self.recipe.saliency:
            stages[GRADIENTS] = self._of_gradients()
        stages[BLOCKS] = self._of_blocks()
        if self.recipe.tuned_bits:
            stages[TUNING] = self._of_tuning()
        return stages

    def _on_gpu(self, stage: str, parts: Mapping[str, int]) -> dict[str, int]:
        there = {name: count for name, count in parts.items() if (stage, name) not in _BESIDE_A_GPU}
        return {"libraries": _GPU_PROGRAM_BYTES, **there}

    def with_windows(self, free: int | None) -> StageMemory:
        """The same with as many windows at a time in the gradients' stage as are good; results do not depend on it.

        As many as half a gigabyte holds the states of, and one for each thread. Where blocks are read from files, which
        is done anew for every part of the windows: as many as there is room for. There is never room for more than a
        quarter of memory, or than the rest of the stage leaves, but for one window.

        Args:
            free: bytes of memory where blocks are run, if that is known.
        """
        of_one = max(1, states_bytes(self.network, self.plan) + self._kept_gradients(1))  # without text there are none
        most = max(self.threads, _STATES_BYTES // max(1, states_bytes(self.network, self.plan)))
        if free is not None:
            threads = min(self.threads, self.plan.nsamples)
            parts = replace(self, windows_together=threads)._of_gradients()
            parts = self._on_gpu(GRADIENTS, parts) if self.on_gpu else {"program": _PROGRAM_BYTES, **parts}
            busy = sum(parts.values()) - threads * of_one
            room = min(free // MEMORY_SHARE, free - busy) // of_one
            most = room if self.streamed else min(most, room)
        return replace(self, windows_together=max(1, min(most, self.plan.nsamples)))

    def _of_text(self) -> dict[str, int]:
        config = self.network.config.get_text_config()
        tokens = min(DOCUMENT_TOKENS, self.plan.seqlen)
        documents = min(self.threads * BATCH_SIZE, -(-self.plan.nsamples * self.plan.seqlen // tokens))
        of_token = 2 * key_value_heads(config) * head_dim(config) * len(self.plan.blocks)
        parts = {"model": self._model}
        if self.streamed:
            parts["around the blocks"] = self._weights()["around the blocks"]
        itemsize = self._itemsize
        if self.writes_in_a_copy:
            itemsize = 2
            parts["the same in 16 bits"] = self._model // 2
        parts["keys and values"] = documents * tokens * of_token * itemsize
        return parts

    def _of_gradients(self) -> dict[str, int]:
        plan, together = self.plan, self.windows_together
        parts = {
            **self._weights(),
            "states between blocks": together * states_bytes(self.network, plan),
            "working memory": min(self.threads, together) * (self._graph(plan.seqlen) + self._logits(plan.seqlen)),
        }
        if plan.rows_together:
            parts["gradients of a block"] = self._kept_gradients(together)
            if self.output_hessians == "memory":
                parts["output Hessians"] = output_hessian_bytes(plan.blocks, plan.rows_together)
        return parts

    def _kept_gradients(self, windows: int) -> int:
        """Those in the outputs of a block's layers, where rows are solved together: as they are, and weighed."""
        if not self.plan.rows_together:
            return 0
        rows = max(sum(sum(group.values()) for group in block.joined_rows()) for block in self.plan.blocks)
        return 2 * windows * self.plan.seqlen * rows * self._itemsize

    def _of_blocks(self) -> dict[str, int]:
        plan = self.plan
        parts = dict(self._weights())
        if plan.nsamples:
            states = plan.nsamples * entering_bytes(self.network, plan)
            of_window = plan.seqlen * self._widest * 4 * _WINDOW_COPIES
            parts["Hessians"] = max(map(_hessian_bytes, plan.blocks))
            parts["working memory"] = self.threads * _SWEEP_BYTES + min(self.threads, plan.nsamples) * of_window
            if plan.rows_together:
                parts["output Hessians"] = max(self._joined_bytes(block) for block in plan.blocks)
            parts["activations"] = states if self.activations == "memory" else states // plan.nsamples * 2
        return parts

    def _of_tuning(self) -> dict[str, int]:
        plan = self.plan
        tuned = sum(layer.in_features * layer.out_features for layer in plan.layers.values())
        at_a_time = min(self.threads, Schedule.windows_per_step)
        graphs = len(plan.blocks) * self._graph(TUNED_SEQLEN) + self._logits(TUNED_SEQLEN)
        whole = {
            "model": self._model,
            "working memory": self.threads * TUNED_SEQLEN * self._widest * 4 * _WINDOW_COPIES,
        }
        parts = {
            "levels and codes": tuned * _LEVEL_BYTES,
            "around the layers": 2 * (self._model - tuned * self._itemsize),  # the head of the full model, too
            "working memory": at_a_time * (graphs + 2 * self._largest_layer * 4),
        }
        return max(whole, parts, key=lambda each: sum(each.values()))

    def _weights(self) -> dict[str, int]:
        if not self.streamed:
            return {"model": self._model}
        of_blocks = [_bytes(block.module) for block in self.plan.blocks]
        return {"largest block": max(of_blocks), "around the blocks": self._model - sum(of_blocks)}

    def _graph(self, seqlen: int) -> int:
        """What a backward pass through a block takes for a window."""
        config = self.network.config.get_text_config()
        of_token = _GRAPH_COPIES * max(_outputs_of_token(block, config) for block in self.plan.blocks)
        if config._attn_implementation == "eager":
            of_token += _GRAPH_COPIES * config.num_attention_heads * seqlen
        return seqlen * of_token * self._itemsize

    def _logits(self, seqlen: int) -> int:
        vocabulary = len(self.network.get_input_embeddings().weight)
        return _LOGIT_COPIES * 4 * min(CHUNK_ELEMENTS, seqlen * vocabulary)

    def _joined_bytes(self, block: Block) -> int:
        """Output Hessians of a block, and what solving the rows of its largest group by them takes."""
        read, solving = 0, 0.0
        for group in block.ordinary_inputs():
            rows = [layer.out_features for _, layer in group]
            matrices = matrix_bytes(rows, self.plan.rows_together)
            left = sum(rows) * group[0][1].in_features * len(self.recipe.target_bits) * 4
            # of many blocks on the diagonal some are solved at a time
            share = max(1 / count_parts(rows, self.plan.rows_together), min(1.0, 4 * MOVED_ELEMENTS / left))
            read += matrices
            solving = max(solving, share * (_OUTPUT_HESSIAN_COPIES * matrices + _LEFT_COPIES * left))
        return read + int(solving)

    @cached_property
    def _model(self) -> int:
        """All parameters; rotated, a head is no longer one tensor with the embedding."""
        network = self.network
        embedding = network.get_input_embeddings().weight
        tied = self.recipe.rotate and network.get_output_embeddings().weight is embedding
        return _bytes(network) + (embedding.numel() * embedding.element_size() if tied else 0)

    @property
    def _on_the_way(self) -> int:
        """The largest of what is read or written at a time: a tensor, or a block."""
        tensor = max(int(each.numel() * each.element_size()) for each in self.network.parameters())
        return max(tensor, *(_bytes(block.module) for block in self.plan.blocks))

    @property
    def _itemsize(self) -> int:
        return int(self.network.dtype.itemsize)

    @property
    def _widest(self) -> int:
        return max(max(layer.in_features, layer.out_features) for layer in self.plan.layers.values())

    @property
    def _largest_layer(self) -> int:
        return max(layer.in_features * layer.out_features for layer in self.plan.layers.values())


def entering_bytes(network: Any, plan: Plan) -> int:
    """What a window leaves before a block."""
    return plan.seqlen * int(network.get_input_embeddings().weight.shape[1]) * int(network.dtype.itemsize)


def states_bytes(network: Any, plan: Plan) -> int:
    """What a window leaves before all blocks and behind the last."""
    return entering_bytes(network, plan) * (len(plan.blocks) + 1)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _hessian_bytes(block: Block) -> int:
    sizes = [group[0][1].in_features ** 2 * 4 for group in block.inputs]
    return sum(sizes) + max(sizes, default=0) * (_HESSIAN_COPIES - 1)


def _outputs_of_token(block: Block, config: Any) -> int:
    """Numbers that the layers of a block make of a token."""
    ordinary = sum(layer.out_features for group in block.ordinary_inputs() for _, layer in group)
    experts = block.expert_layers()
    if not experts:
        return ordinary
    every = sum(layer.out_features for _, layer in block.layers())
    of_token = getattr(config, "num_experts_per_tok", None) or MOST_EXPERTS_PER_TOKEN
    return ordinary + (every - ordinary) // len(experts) * int(of_token)
