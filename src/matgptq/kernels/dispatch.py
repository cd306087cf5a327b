"""Products with slices: ``matmul``, several at once, and what PyTorch has to see of them.

The one place through which weights are multiplied; ``matgptq.kernels.kernel_choice`` decides how.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from matgptq import native
from matgptq.kernels.kernel_choice import Product, choose, fuses
from matgptq.kernels.packed_weight import AnyWeight, PackedWeight, dequantize, form_of, remembered
from matgptq.native import Activations

# What may be going on around a product, asked where PyTorch keeps it: its own questions take several times as long.
_casts = torch._C._is_any_autocast_enabled
_modes = torch._C._len_torch_dispatch_stack  # fake tensors, counters of operations, make_fx
_traces = torch._C._is_tracing  # torch.jit.trace
_transformation = torch._C._functorch.peek_interpreter_stack  # torch.func


def matmul(
    x: Tensor, weight: AnyWeight, bits: int, bias: Tensor | None = None, *, activations: Activations = "exact"
) -> Tensor:
    """``x @ w_r^T + bias`` for the slice of ``bits`` bits.

    Args:
        x: floating ``[..., in]``, any leading shape, also empty.
        weight: codes and scales, or their packed form.
        bits: width, 2..8; a packed slice holds only one.
        bias: floating ``[out]`` or None.
        activations: ``exact``, or ``int8`` to round x to 8 bits per row and stretch of columns (CPU only).

    Returns:
        ``[..., out]`` in the dtype of ``x``; differentiable in x and bias.

    Raises:
        ConfigurationError: the kernel that ``MATGPTQ_KERNEL`` names refuses the product.
    """
    if isinstance(weight, PackedWeight) and (torch.compiler.is_compiling() or not is_plain(x, bias)):
        return _multiply_openly(x, weight, bits, bias, activations)
    return _multiply(x, weight, bits, bias, activations)


def _multiply_openly(
    x: Tensor, weight: PackedWeight, bits: int, bias: Tensor | None, activations: Activations
) -> Tensor:
    """``matmul`` as operations that PyTorch sees, so that it can record, differentiate, cast and transform them."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:  # as for nn.Linear
        x = x.to(torch.get_autocast_dtype(kind))
    if not torch.compiler.is_compiling() and (_transformation() is not None or forward_ad._current_level >= 0):
        # Forward derivatives and vmap know PyTorch's own operations only.
        dense = _packed_weight(weight.key, bits, x.dtype)
        return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))
    result: Tensor = _packed_matmul(x, weight.key, bits, bias, activations)
    return result


def _multiply(x: Tensor, weight: AnyWeight, bits: int, bias: Tensor | None, activations: Activations) -> Tensor:
    """``matmul`` by whichever kernel is chosen."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    product = Product(form_of(weight), x.device.type, x.dtype, len(rows), activations)
    result = choose(product).run(rows, weight, bits, bias, activations)
    return result.view(*x.shape[:-1], result.shape[1])


def is_plain(x: Tensor, bias: Tensor | None = None) -> bool:
    """Whether only the numbers of x and bias matter: no gradient is due, nothing records, casts or transforms.

    Kernels read memory by its address, which PyTorch does not notice. This is asked for every product.
    """
    return (
        type(x) is Tensor
        and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and not x.is_neg()
        and not _casts()
        and not _modes()
        and not _traces()
        and _transformation() is None
        and forward_ad._current_level < 0
    )


class Operand(NamedTuple):
    """What an input is multiplied by: a weight, the width to use, a bias ``[out]`` or None."""

    weight: AnyWeight
    bits: int
    bias: Tensor | None


def matmul_shared(x: Tensor, operands: Sequence[Operand], *, activations: Activations = "exact") -> list[Tensor]:
    """``matmul`` of one input with several operands, as one call where the kernel that would run can.

    Takes and raises what ``matmul`` does; widths may differ.
    """
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    fitting = all(isinstance(weight, native.Weight) and is_plain(x, bias) for weight, _, bias in operands)
    if not fitting or not fuses(Product("native", x.device.type, x.dtype, len(rows), activations)):
        return [matmul(x, *operand, activations=activations) for operand in operands]
    results = native.matmul_many(
        rows,
        [operand.weight for operand in operands],  # type: ignore[misc]
        [operand.bits for operand in operands],
        [None if operand.bias is None else operand.bias.float() for operand in operands],
        activations=activations,
    )
    return [result.view(*x.shape[:-1], result.shape[1]) for result in results]


class JoinedProduct:
    """``matmul_shared`` with its results side by side, for operands that do not change any more.

    Without a copy, and with little work in front of the product, where the fused native kernel runs. For inference: no
    gradient passes through it.

    Args:
        operands: weights with one ``in``.
        activations: as for ``matmul``.
    """

    def __init__(self, operands: Sequence[Operand], *, activations: Activations = "exact") -> None:
        self._operands = list(operands)
        self._activations: Activations = activations
        self._native = join(operands, activations)
        self._fused: dict[tuple[int, torch.dtype, str], bool] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., sum of out]`` in the dtype of ``x`` ``[..., in]``."""
        rows = x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
        if self._native is not None:
            kind = (rows.shape[0], x.dtype, x.device.type)
            fused = self._fused.get(kind)
            if fused is None:
                fused = fuses(Product("native", kind[2], kind[1], kind[0], self._activations))
                self._fused[kind] = fused
            if fused:
                joined = self._native(rows)
                return joined if x.ndim == 2 else joined.view(*x.shape[:-1], joined.shape[1])
        results = [matmul(x, *operand, activations=self._activations) for operand in self._operands]
        return results[0] if len(results) == 1 else torch.cat(results, -1)


def join(operands: Sequence[Operand], activations: Activations) -> native.Joined | None:
    """Operands prepared for one native call after the other; None if the native library holds not all of them."""
    weights = [operand.weight for operand in operands if isinstance(operand.weight, native.Weight)]
    if len(weights) < len(operands):
        return None
    bits = [operand.bits for operand in operands]
    biases = [None if operand.bias is None else operand.bias.float() for operand in operands]
    return native.Joined(weights, bits, biases, activations=activations)


@torch.library.custom_op("matgptq::packed_matmul", mutates_args=())
def _packed_matmul(x: Tensor, key: int, bits: int, bias: Tensor | None, activations: str) -> Tensor:
    return _multiply(x, remembered(key), bits, bias, activations)  # type: ignore[arg-type]


@_packed_matmul.register_fake
def _(x: Tensor, key: int, bits: int, bias: Tensor | None, activations: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], remembered(key).out_features)


@torch.library.custom_op("matgptq::packed_weight", mutates_args=())
def _packed_weight(key: int, bits: int, dtype: torch.dtype) -> Tensor:
    return dequantize(remembered(key), bits, dtype)


@_packed_weight.register_fake
def _(key: int, bits: int, dtype: torch.dtype) -> Tensor:
    weight = remembered(key)
    return torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=weight.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.key, ctx.bits, bias, _ = inputs
    ctx.weight = remembered(ctx.key)  # alive until the gradient is computed
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
    """Of what x and bias were; rounding activations to 8 bits counts as not rounding them."""
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = gradient @ _packed_weight(ctx.key, ctx.bits, gradient.dtype)
    if ctx.needs_input_grad[3]:
        of_bias = gradient.sum_to_size(gradient.shape[-1]).to(ctx.bias_dtype)
    return of_x, None, None, of_bias, None


_packed_matmul.register_autograd(_differentiate, setup_context=_keep)
