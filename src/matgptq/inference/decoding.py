"""Transformer blocks that take one token of each sequence, which is what decoding is made of, in few calls.

Between the products of a block transformers runs some thirty small operations, which for one token take longer than
they compute: in a small model longer than the products. Here a block of the plain kind (Llama's and its likes) is two
calls of the native library, between which keys and values join the cache, with the same rounding as in transformers'
own code; only attention's order of sums may differ. Whatever is not this case goes to the block's own code: more than a
token of a sequence, more sequences than the fused kernel is the fastest for, a mask that hides something, gradients, a
graph that is being compiled, a hook, another module or another ``forward`` in the block.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks as _global_hooks
from torch.nn.modules.module import _global_forward_pre_hooks as _global_pre_hooks
from transformers.activations import GELUTanh, SiLUActivation

from matgptq import native
from matgptq.inference.mixed_classes import Mixin, mix_in
from matgptq.inference.nested_linear import NestedLinear
from matgptq.kernels import dispatch, kernel_choice
from matgptq.kernels.shared_input import memory_state
from matgptq.models.families import PlainBlocks
from matgptq.models.kv_cache import CACHE_ARGUMENT, append_positions
from matgptq.native import DTYPES, BlockCalls, Gate, RMSNorm

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_HEAD_NORMS = ("q_norm", "k_norm")
_GATES: dict[type[nn.Module], Gate] = {SiLUActivation: "silu", nn.SiLU: "silu", GELUTanh: "gelu_tanh"}


class DecodesRows(Mixin):
    """Mixed into the class of a block: the next token of each sequence takes the short way."""

    row_block: RowBlock

    def forward(self, hidden_states: Tensor, *positional: Any, **keywords: Any) -> Tensor:
        """What the block computes."""
        if not positional and not torch.compiler.is_compiling() and self.row_block.takes(hidden_states, keywords):
            row = self.row_block.run(hidden_states, keywords)
            if row is not None:
                return row
        result: Tensor = super().forward(hidden_states, *positional, **keywords)  # type: ignore[misc]
        return result


def decode_in_rows(model: nn.Module, blocks: str, kind: PlainBlocks) -> int:
    """Let the blocks of a model decode next tokens the short way where they can; returns how many do.

    Args:
        model: on the CPU, its nested layers packed for the native library.
        blocks: module path of the list of blocks.
        kind: what they are like.
    """
    changed = 0
    for block in model.get_submodule(blocks).children():
        row_block = _row_block(block, kind)
        if row_block is None:
            continue
        block.__dict__["row_block"] = row_block
        if not isinstance(block, DecodesRows):
            mix_in(DecodesRows, block)
        changed += 1
    return changed


def _row_block(block: Any, kind: PlainBlocks) -> RowBlock | None:
    attention: Any = getattr(block, "self_attn", None)
    mlp: Any = getattr(block, "mlp", None)
    names = {block: (*kind.norms, *kind.update_norms), attention: _ATTENTION, mlp: (*_MLP, "act_fn")}
    if any(owner is None or not hasattr(owner, name) for owner, wanted in names.items() for name in wanted):
        return None
    linears = [getattr(owner, name) for owner, wanted in ((attention, _ATTENTION), (mlp, _MLP)) for name in wanted]
    if (
        getattr(block, kind.norms[0]).weight.dtype not in DTYPES
        or any(not isinstance(linear, NestedLinear) or linear.packed is None for linear in linears)
        or type(mlp.act_fn) not in _GATES
    ):
        return None
    return RowBlock(block, kind)


class RowBlock:
    """One block's way for the next token of each sequence.

    Args:
        block: of the plain kind.
        kind: which that is.

    Attributes:
        dtype: of what goes through it.
        watch: what must stay as it is.
    """

    def __init__(self, block: Any, kind: PlainBlocks) -> None:
        attention, mlp = block.self_attn, block.mlp
        self._attention = attention
        self._kind = kind
        self._gate = _GATES[type(mlp.act_fn)]
        self._norms = [
            *(getattr(block, name) for name in kind.norms),
            *(getattr(attention, name, None) for name in _HEAD_NORMS),
            *([getattr(block, name) for name in kind.update_norms] or [None, None]),
        ]
        owners = [(attention, name) for name in _ATTENTION] + [(mlp, name) for name in _MLP]
        self._linears: list[NestedLinear] = [getattr(owner, name) for owner, name in owners]
        self._prepared: _Prepared | None = None
        self._fused: tuple[str, int, native.Activations] | None = None  # what the fused kernel is known to take
        self._size: int = attention.head_dim
        self.dtype: torch.dtype = self._norms[0].weight.dtype
        self.watch = Watch([block, attention, mlp], block)

    def takes(self, hidden: Tensor, keywords: dict[str, Any]) -> bool:
        """Whether a call is the one that ``run`` is for."""
        return (
            _sees_all(keywords.get("attention_mask"))
            and keywords.get(CACHE_ARGUMENT) is not None
            and (position := keywords.get("position_embeddings")) is not None
            and self.fits(hidden, position)
            and self.watch.untouched()
        )

    def fits(self, hidden: Tensor, position: tuple[Tensor, Tensor], tokens: int = 1) -> bool:
        """Whether so many tokens of each sequence are what the block can take in rows, in the attention that it has."""
        sequences = hidden.shape[0]
        return (
            hidden.ndim == 3
            and hidden.shape[1] == tokens
            and sequences > 0
            and hidden.dtype == self.dtype
            and not torch.is_grad_enabled()
            and dispatch.is_plain(hidden)
            and hidden.is_cpu
            and position[0].shape in ((1, tokens, self._size), (sequences, tokens, self._size))
            and position[0].dtype == self.dtype
            and self._attention.config._attn_implementation == "sdpa"
            and not (self._attention.training and self._attention.attention_dropout)
        )

    def run(self, hidden: Tensor, keywords: dict[str, Any]) -> Tensor | None:
        """The block's output ``[sequences, 1, hidden]``; None where the fused kernel does not take it at present."""
        sequences = len(hidden)
        ready = self.ready(kernel_choice.forced_kernel(), sequences)
        if ready is None:
            return None
        calls, _weights = ready  # which stay alive until the calls are made
        cosine, sine = (of_each(part, sequences) for part in keywords["position_embeddings"])
        residual = rows_of(hidden)
        qkv = calls.start(residual, cosine, sine)
        attention, cache = self._attention, keywords[CACHE_ARGUMENT]
        held = None
        if self.attends:
            layers, vectors = [attention.layer_idx], (calls.key_heads, self._size, self.dtype)
            held = append_positions([cache], layers, sequences, *vectors, windows=True)
        if held is not None:
            calls.attend(residual, qkv, *held[0][0], append=True)
            return residual.view(hidden.shape)
        key = qkv.narrow(1, calls.heads, calls.key_heads)
        value = qkv.narrow(1, calls.heads + calls.key_heads, calls.key_heads)
        keys, values = cache.update(key, value, attention.layer_idx)
        if self.attends and calls.reads(keys) and calls.reads(values):
            calls.attend(residual, qkv, keys, values)
        else:
            attended = nn.functional.scaled_dot_product_attention(
                qkv.narrow(1, 0, calls.heads),
                keys,
                values,
                scale=attention.scaling,
                enable_gqa=calls.heads != calls.key_heads,
            )
            calls.finish(residual, attended.reshape(sequences, -1))
        return residual.view(hidden.shape)

    @property
    def attends(self) -> bool:
        """Whether attention is part of the calls: for most sizes of heads it is."""
        return native.attends(self._size)

    @property
    def layer_index(self) -> int:
        """Of the cache."""
        index: int = self._attention.layer_idx
        return index

    def ready(self, forced: str, rows: int) -> tuple[BlockCalls, list[native.Weight]] | None:
        """The calls for the block as it is, and the weights that must live while they are made; None if there are none.

        Args:
            forced: the kernel that ``MATGPTQ_KERNEL`` names.
            rows: that are multiplied, one for each token.
        """
        asked = forced, rows, self._linears[0].activations
        if asked != self._fused:
            if not kernel_choice.fuses(kernel_choice.Product("native", "cpu", self.dtype, *asked[1:])):
                return None
            self._fused = asked
        prepared = self._prepared
        weights = None if prepared is None else prepared.weights(forced)
        if prepared is None or weights is None:
            made = self._prepare(forced)
            if made is None:
                return None
            prepared, weights = made
            self._prepared = prepared
        return prepared.calls, weights

    def _prepare(self, forced: str) -> tuple[_Prepared, list[native.Weight]] | None:
        """The calls for the block as it is at present, and the weights that they need."""
        latest = NestedLinear.latest_change  # before the layers are looked at
        linears, attention, kind = self._linears, self._attention, self._kind
        activations = linears[0].activations
        if any(linear.activations != activations for linear in linears):
            return None
        weights: list[native.Weight] = []
        known_linears, known_norms = [], []
        for linear in linears:
            weight, bits, bias = linear.operand  # read once: another thread may set another width
            if not isinstance(weight, native.Weight):
                return None
            weights.append(weight)
            known_linears.append((linear, bits, bias))
        for norm in self._norms:
            if norm is None:
                continue
            scale = norm._parameters.get("weight")  # it may have been cast since; the library takes an address
            if scale is None or scale.dtype is not self.dtype or not scale.is_cpu or not scale.is_contiguous():
                return None
            known_norms.append((norm, scale, scale.data_ptr(), getattr(norm, kind.eps)))
        calls = BlockCalls(
            self.dtype,
            weights,
            [bits for _, bits, _ in known_linears],
            [bias for _, _, bias in known_linears],
            [None if norm is None else RMSNorm(norm.weight.detach(), getattr(norm, kind.eps)) for norm in self._norms],
            attention.head_dim,
            attention.scaling,
            activations=activations,
            gate=self._gate,
            norms_from_one=not kind.norm_unit,
        )
        prepared = _Prepared(
            calls=calls,
            forced=forced,
            latest_change=latest,
            activations=activations,
            scaling=(attention, attention.scaling),
            linears=known_linears,
            owned=[weakref.ref(weight) for weight in weights],
            biases=[
                (linear._parameters, bias, memory_state(bias), bias.detach())
                for linear, _, bias in known_linears
                if bias is not None
            ],
            norms=known_norms,
            eps=kind.eps,
        )
        return prepared, weights


def _sees_all(mask: Tensor | None) -> bool:
    """Whether a mask of attention, as a block is given it, hides nothing; a layer with a full window has such a one."""
    return mask is None or (type(mask) is Tensor and mask.dtype is torch.bool and bool(mask.all()))


def rows_of(hidden: Tensor) -> Tensor:
    """``[sequences, tokens, hidden]`` as the calls take it and write to it, a copy ``[sequences * tokens, hidden]``."""
    return hidden.clone(memory_format=torch.contiguous_format).flatten(0, 1)


def of_each(part: Tensor, sequences: int) -> Tensor:
    """Cosine or sine ``[1 or sequences, tokens, size]`` for each sequence, contiguous."""
    return part.expand(sequences, -1, -1).contiguous()


class Watch:
    """What a short way passes over: if a module is replaced, hooked or gets another ``forward``, it is not to be taken.

    Args:
        parents: modules whose children it passes over.
        owner: the module whose own ``forward`` the short way stands for.
    """

    def __init__(self, parents: Sequence[Any], owner: Any) -> None:
        self._children = [(parent._modules, tuple(parent._modules.values())) for parent in parents]
        self._known = [module for _, children in self._children for module in children if module is not None]
        self._hooks = [hooks for module in self._known for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        kinds = {kind for module in (*self._known, owner) for kind in type(module).__mro__}
        self._forwards = {kind: kind.__dict__["forward"] for kind in kinds if "forward" in kind.__dict__}

    def include(self, others: Iterable[Watch]) -> None:
        """Watch what they watch, too."""
        for other in others:
            self._children += other._children
            self._known += other._known
            self._hooks += other._hooks
            self._forwards |= other._forwards

    def untouched(self) -> bool:
        """Whether all is as it was. Of hundreds of modules, for every token: what C does in one step is done so."""
        if _global_hooks or _global_pre_hooks or any(self._hooks):
            return False
        for kind, forward in self._forwards.items():
            if kind.__dict__.get("forward") is not forward:
                return False
        for modules, children in self._children:
            if tuple(modules.values()) != children:
                return False
        # A module of which accelerate, say, wraps the method has one of its own.
        return not any("forward" in module.__dict__ for module in self._known)


@dataclass
class _Prepared:
    """Calls that are made again for as long as the block's state is the same."""

    calls: BlockCalls  # keeps the memory of the norms, so that nothing else can get its address
    forced: str
    latest_change: object  # of nested layers, up to which the calls are what they should be
    activations: native.Activations
    scaling: tuple[Any, float]  # the attention and its scale
    # What is multiplied by. The layers own their weights: they let go of them to leave the CPU, say.
    linears: list[tuple[NestedLinear, int, Tensor | None]]
    owned: list[weakref.ref[native.Weight]]
    # Of which layer, their state, and their memory, to keep it.
    biases: list[tuple[dict[str, Any], Tensor, tuple[int, int], Tensor]]
    norms: list[tuple[Any, Tensor, int, float]]
    eps: str  # what the norms call it

    def weights(self, forced: str) -> list[native.Weight] | None:
        """The weights of the block, or None if it is not any more as it was; ``forced`` as of ``RowBlock.ready``."""
        latest = NestedLinear.latest_change
        if self.forced != forced or self.scaling[0].scaling != self.scaling[1]:
            return None
        weights = [known() for known in self.owned]
        if latest is not self.latest_change:
            for (linear, bits, bias), weight in zip(self.linears, weights, strict=True):
                if weight is None or not linear.multiplies_by(weight, bits, bias, self.activations):
                    return None
            self.latest_change = latest
        for parameters, own, state, _ in self.biases:
            if parameters.get("bias") is not own or memory_state(own) != state:
                return None
        for norm, scale, address, eps in self.norms:
            if (
                norm._parameters.get("weight") is not scale
                or scale.data_ptr() != address
                or getattr(norm, self.eps) != eps
            ):
                return None
        return None if None in weights else weights  # type: ignore[return-value]

    def __deepcopy__(self, _: object) -> None:
        """Nothing: a copied block has biases and norms of its own."""
