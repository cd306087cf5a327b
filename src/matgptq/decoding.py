"""Transformer blocks that take one token, which is what decoding is made of, in few calls.

Between the products of a block transformers runs some thirty small operations, which for one token take longer than
they compute: in a small model longer than the products. Here a block of the plain kind (Llama's and its likes) is four
products, attention, and five calls of the native library, with the same rounding as in transformers' own code; only
attention's order of sums may differ. Whatever is not this case goes to the block's own code: more than a token, a mask,
gradients, a graph that is being compiled, a hook, another module or another ``forward`` inside the block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks as _global_hooks
from torch.nn.modules.module import _global_forward_pre_hooks as _global_pre_hooks

from matgptq import kernels
from matgptq.mixed_classes import Mixin, mix_in
from matgptq.native import DTYPES, RowSteps
from matgptq.nested_linear import NestedLinear
from matgptq.shared_input import SharedInput

_NORMS = ("input_layernorm", "post_attention_layernorm")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_HEAD_NORMS = ("q_norm", "k_norm")


class DecodesRows(Mixin):
    """Mixed into the class of a block: a single token takes the short way."""

    _row_block: RowBlock

    def forward(self, hidden_states: Tensor, *positional: Any, **keywords: Any) -> Tensor:
        """What the block computes."""
        if not positional and not torch.compiler.is_compiling() and self._row_block.takes(hidden_states, keywords):
            row = self._row_block.run(hidden_states, keywords)
            if row is not None:
                return row
        result: Tensor = super().forward(hidden_states, *positional, **keywords)  # type: ignore[misc]
        return result


def decode_in_rows(model: nn.Module, blocks: str) -> int:
    """Let the blocks of a model decode single tokens the short way where they can; returns how many do.

    Args:
        model: on the CPU, its nested layers packed for the native library. Its blocks must be of the plain kind
            (``Family.plain_blocks``): ``x += attention(norm(x)); x += mlp(norm(x))`` with RMSNorm, rotary embedding of
            whole heads and a gated MLP, under Llama's names.
        blocks: module path of the list of blocks.
    """
    changed = 0
    for block in model.get_submodule(blocks).children():
        row_block = _row_block(block)
        if row_block is None:
            continue
        block.__dict__["_row_block"] = row_block
        if not isinstance(block, DecodesRows):
            mix_in(DecodesRows, block)
        changed += 1
    return changed


def _row_block(block: Any) -> RowBlock | None:
    attention: Any = getattr(block, "self_attn", None)
    mlp: Any = getattr(block, "mlp", None)
    names = {block: _NORMS, attention: _ATTENTION, mlp: _MLP}
    if any(owner is None or not hasattr(owner, name) for owner, wanted in names.items() for name in wanted):
        return None
    linears = [getattr(owner, name) for owner in (attention, mlp) for name in names[owner]]
    dtype = block.input_layernorm.weight.dtype
    if (
        dtype not in DTYPES
        or any(not isinstance(linear, NestedLinear) or linear.packed is None for linear in linears)
        or attention.config.hidden_act not in ("silu", "swish")
    ):
        return None
    return RowBlock(block, RowSteps(dtype))


class RowBlock:
    """One block's way for a single token.

    Args:
        block: of the plain kind.
        steps: for its dtype.
    """

    def __init__(self, block: Any, steps: RowSteps) -> None:
        self._steps = steps
        attention, mlp = block.self_attn, block.mlp
        self._attention = attention
        self._first_norm, self._second_norm = (getattr(block, name) for name in _NORMS)
        self._head_norms = [getattr(attention, name, None) for name in _HEAD_NORMS]
        self._qkv: list[NestedLinear] = [getattr(attention, name) for name in _ATTENTION[:3]]
        self._out: list[NestedLinear] = [attention.o_proj]
        self._gate_up: list[NestedLinear] = [mlp.gate_proj, mlp.up_proj]
        self._down: list[NestedLinear] = [mlp.down_proj]
        self._norms = [self._first_norm, self._second_norm, *filter(None, self._head_norms)]
        self._size: int = attention.head_dim
        self._dtype = self._first_norm.weight.dtype
        # What the short way passes over: if one of them is replaced or watched, it is not taken.
        passed = [(block, name) for name in ("self_attn", "mlp", *_NORMS)]
        passed += [(attention, name) for name in (*_ATTENTION, *_HEAD_NORMS) if hasattr(attention, name)]
        passed += [(mlp, name) for name in (*_MLP, "act_fn")]
        self._passed = [(owner._modules, name, owner._modules[name]) for owner, name in passed]
        known = [module for _, _, module in self._passed]
        self._hooks = [hooks for module in known for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._forwards = [(kind, kind.forward) for kind in {type(module) for module in (*known, block)}]

    def takes(self, hidden: Tensor, keywords: dict[str, Any]) -> bool:
        """Whether a call is the one that ``run`` is for."""
        if hidden.shape[:-1] != (1, 1) or hidden.dtype != self._dtype or torch.is_grad_enabled():
            return False
        if not kernels.is_plain(hidden):
            return False
        if (
            not hidden.is_cpu
            or keywords.get("attention_mask") is not None
            or keywords.get("past_key_values") is None
            or (position := keywords.get("position_embeddings")) is None
            or position[0].shape != (1, 1, self._size)
            or position[0].dtype != self._dtype
            or self._attention.config._attn_implementation != "sdpa"
        ):
            return False
        for norm in self._norms:  # which may have been cast since; the library takes an address
            weight = norm._parameters.get("weight")
            if weight is None or weight.dtype is not self._dtype or not weight.is_cpu or not weight.is_contiguous():
                return False
        if _global_hooks or _global_pre_hooks or any(self._hooks):
            return False
        for kind, forward in self._forwards:
            if kind.forward is not forward:
                return False
        try:
            for modules, name, known in self._passed:
                if modules[name] is not known or "forward" in known.__dict__:  # wrapped in a hook of accelerate's, say
                    return False
        except KeyError:  # it is there no more
            return False
        return True

    def run(self, hidden: Tensor, keywords: dict[str, Any]) -> Tensor | None:
        """The block's output ``[1, 1, hidden]``; None where the kernels cannot multiply a row at present."""
        rows = [_shared(layers) for layers in (self._qkv, self._out, self._gate_up, self._down)]
        if any(row is None for row in rows):
            return None
        qkv_row, out_row, gate_up_row, down_row = (row.row for row in rows if row is not None)
        steps, norm = self._steps, self._first_norm
        residual = hidden.reshape(1, -1).clone()
        qkv = qkv_row(steps.rms_norm(residual, norm.weight, norm.variance_epsilon))
        if qkv is None:
            return None
        attended = self._attend(qkv, keywords)
        norm = self._second_norm
        update = _certain(out_row, attended)
        gate_up = _certain(gate_up_row, steps.rms_norm(residual, norm.weight, norm.variance_epsilon, update))
        steps.add(residual, _certain(down_row, steps.silu_product(gate_up)))
        return residual.view(hidden.shape)

    def _attend(self, qkv: Tensor, keywords: dict[str, Any]) -> Tensor:
        """``[1, heads * size]``; the row's key and value join the cache."""
        steps, size = self._steps, self._size
        sizes = [layer.out_features for layer in self._qkv]
        query, key, value = torch.split(qkv, sizes, 1)
        for part, norm in zip((query, key), self._head_norms, strict=True):
            if norm is not None:
                part.copy_(steps.rms_norm(part, norm.weight, norm.variance_epsilon))
        cosine, sine = keywords["position_embeddings"]
        steps.rotate(query, cosine, sine)
        steps.rotate(key, cosine, sine)
        shape = (1, -1, 1, size)
        keys, values = keywords["past_key_values"].update(key.view(shape), value.view(shape), self._attention.layer_idx)
        attended = steps.attend(query, keys, values, self._attention.scaling)
        if attended is not None:
            return attended
        output = nn.functional.scaled_dot_product_attention(
            query.view(shape), keys, values, scale=self._attention.scaling, enable_gqa=len(set(sizes)) > 1
        )
        return output.reshape(1, -1)


def _shared(layers: list[NestedLinear]) -> SharedInput | None:
    """The one call that multiplies by all of these layers in their order, if there is one."""
    shared = layers[0].shared_input
    return shared if shared is not None and shared.is_of(layers) else None


def _certain(row: Callable[[Tensor], Tensor | None], inputs: Tensor) -> Tensor:
    product = row(inputs)
    assert product is not None  # the first product of the block was not refused, and these are alike
    return product
