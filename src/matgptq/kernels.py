"""The one place that decides how a product with a slice is computed.

    reference      PyTorch: dequantize the slice, multiply. Defines the result; runs anywhere
    native-fused   native library, few rows: codes are unpacked in registers, so a product costs the bytes of its width
    native-tiled   native library, many rows: stretches of rows are dequantized into cache and multiplied by PyTorch
    triton-fused   GPU, few rows: as native-fused, on tensor cores
    triton-tiled   GPU, many rows: as native-tiled

A kernel says what it refuses and why; the first that refuses nothing runs. ``MATGPTQ_KERNEL=name`` forces one.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from matgptq import native
from matgptq.errors import ConfigurationError
from matgptq.gpu import layout as gpu_layout
from matgptq.gpu import support as gpu_support
from matgptq.gpu.layout import PlaneWeight
from matgptq.nested_weight import NestedWeight
from matgptq.slicing import WIDTHS

Activations = Literal["exact", "int8"]
PackedWeight = native.Weight | PlaneWeight
AnyWeight = NestedWeight | PackedWeight
Form = Literal["codes", "native", "planes"]

GROUP_UNIT = 32
# Above this many rows PyTorch's matrix product on dequantized tiles wins; see benchmarks/results/cpu_kernels.json.
# A float32 product has no matrix unit to run on and loses later than a bfloat16 one.
FUSED_ROWS = {torch.float32: 32, torch.bfloat16: 16}
_TILE_BYTES = 1 << 20  # a dequantized tile has to stay in the second-level cache until it has been multiplied
# The same on a GPU. By reasoning, not yet by measurement: unpacking once for every 32 rows against writing and reading
# the weights once in 16 bits.
TRITON_FUSED_ROWS = 128
_TRITON_TILE_BYTES = 64 << 20  # bounds the memory that a product takes beside its result
_TENSOR_CORE_DTYPES = (torch.float16, torch.bfloat16)

# What may be going on around a product, asked where PyTorch keeps it: its own questions take several times as long.
_casts = torch._C._is_any_autocast_enabled
_modes = torch._C._len_torch_dispatch_stack  # fake tensors, counters of operations, make_fx
_traces = torch._C._is_tracing  # torch.jit.trace
_transformation = torch._C._functorch.peek_interpreter_stack  # torch.func


@dataclass(frozen=True)
class Product:
    """What is to be computed, as far as the choice of a kernel depends on it."""

    form: Form
    device: str
    dtype: torch.dtype
    rows: int
    activations: str


@dataclass(frozen=True)
class Kernel:
    """One way to compute ``x @ w_r^T + bias``.

    Attributes:
        name: as ``MATGPTQ_KERNEL`` takes it.
        refusal: why it cannot compute a product, or None if it can.
        drawback: why another kernel would be faster, or None; not asked when this one is forced.
        run: ``(x [rows, in], weight, bits, bias, activations) -> [rows, out]``.
    """

    name: str
    refusal: Callable[[Product], str | None]
    drawback: Callable[[Product], str | None]
    run: Callable[[Tensor, Any, int, Tensor | None, Activations], Tensor]


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


def fuses(product: Product) -> bool:
    """Whether a product runs on the fused kernel, which takes several weights in one call."""
    return choose(product).run is _run_fused


@functools.lru_cache(maxsize=1024)
def _choose(product: Product, forced: str) -> Kernel:
    candidates = [kernel for kernel in KERNELS if forced in ("", kernel.name)]
    if not candidates:
        names = ", ".join(kernel.name for kernel in KERNELS)
        raise ConfigurationError(f"MATGPTQ_KERNEL: no kernel {forced!r}; there are {names}")
    refusals = {}
    for kernel in candidates:
        refusals[kernel.name] = kernel.refusal(product) or (None if forced else kernel.drawback(product))
        if refusals[kernel.name] is None:
            return kernel
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    raise ConfigurationError(f"no kernel computes this product ({reasons})")


def choose(product: Product) -> Kernel:
    """The kernel that will compute a product."""
    return _choose(product, os.environ.get("MATGPTQ_KERNEL", ""))


def form_of(weight: AnyWeight) -> Form:
    """How a weight lies in memory."""
    if isinstance(weight, NestedWeight):
        return "codes"
    return "native" if isinstance(weight, native.Weight) else "planes"


def dequantize(weight: AnyWeight, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights ``[out, in]`` of one slice, whatever form the weight has."""
    if isinstance(weight, native.Weight):
        return native.dequantize_rows(weight, bits).to(dtype)
    if isinstance(weight, PlaneWeight):
        return gpu_layout.dequantize(weight, bits, dtype)
    return weight.dequantize(bits, dtype)


def packed_form(device: torch.device) -> Literal["native", "planes"]:
    """The form for which weights on a device are packed: on a CPU ``native``, unless a Triton kernel is forced."""
    forced = os.environ.get("MATGPTQ_KERNEL", "").startswith("triton-")
    return "planes" if device.type != "cpu" or forced else "native"


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why weights on a device cannot be packed for activations of a dtype; None if they can."""
    if packed_form(device) == "planes":
        return gpu_support.obstacle(device.type)
    if dtype not in FUSED_ROWS:
        return f"the native kernels compute in float32 and bfloat16, not in {dtype}"
    return None if native.available() else native.reason()


def group_obstacle(group_size: int, in_features: int) -> str | None:
    """Why weights with groups of this size cannot be packed; None if they can."""
    if group_size % GROUP_UNIT == 0 or group_size == in_features:
        return None
    return f"the kernels take groups that are multiples of {GROUP_UNIT}, or one per row, not groups of {group_size}"


def new_arena(device: torch.device) -> native.Arena | None:
    """Memory for the packed weights of a model on a device, where their form uses one."""
    return native.Arena() if packed_form(device) == "native" else None


def pack(weight: NestedWeight, bits: int | None = None, *, arena: native.Arena | None = None) -> PackedWeight:
    """Pack a weight in the form that its device calls for.

    Args:
        weight: codes and scales.
        bits: pack this slice only; None keeps the whole parent.
        arena: memory for the native form.

    Raises:
        ConfigurationError: no kernels for that device, or the group size is none that they take.
    """
    scales = {width: weight.scales_for(width) for width in (WIDTHS if bits is None else (bits,))}
    if packed_form(weight.codes.device) == "planes":
        half = {id(scale): scale.half() for scale in scales.values()}
        placed = {width: half[id(scale)] for width, scale in scales.items()}
        if bits is None:
            return remember(gpu_layout.pack_parent(weight.codes, placed))
        return remember(gpu_layout.pack_slice(weight.codes, placed[bits], bits))
    if bits is None:
        return remember(native.pack_parent(weight.codes, scales, arena=arena))
    return remember(native.pack_slice(weight.codes, scales[bits], bits, arena=arena))


def _run_reference(x: Tensor, weight: AnyWeight, bits: int, bias: Tensor | None, activations: Activations) -> Tensor:
    return torch.nn.functional.linear(x, dequantize(weight, bits, x.dtype), None if bias is None else bias.to(x.dtype))


def _refuses_natively(product: Product) -> str | None:
    if product.form != "native":
        return "the weight is not packed for it (matgptq.load packs it on a CPU)"
    if product.device != "cpu":
        return f"the activations are on {product.device}"
    if product.dtype not in FUSED_ROWS:
        return f"activations of {product.dtype}; float32 and bfloat16 are supported"
    return None


def _run_fused(x: Tensor, weight: native.Weight, bits: int, bias: Tensor | None, activations: Activations) -> Tensor:
    return native.matmul(x, weight, bits, None if bias is None else bias.float(), activations=activations)


def _refuses_tiled(product: Product) -> str | None:
    if product.activations != "exact":
        return "multiplies exact activations only"
    return _refuses_natively(product)


def _run_tiled(x: Tensor, weight: native.Weight, bits: int, bias: Tensor | None, activations: Activations) -> Tensor:
    out_features = weight.out_features
    result = x.new_empty(len(x), out_features)
    step = max(16, _TILE_BYTES // (weight.in_features * x.element_size()) // 16 * 16)
    tile = x.new_empty(min(step, out_features), weight.in_features)
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        rows = native.dequantize_rows(weight, bits, start, stop, dtype=x.dtype, out=tile[: stop - start])
        torch.mm(x, rows.T, out=result[:, start:stop])
    return result if bias is None else result.add_(bias.to(x.dtype))


def _refuses_on_gpu(product: Product) -> str | None:
    if product.form != "planes":
        return "the weight is not packed for it (matgptq.load packs it on a GPU)"
    if product.activations != "exact":
        return "multiplies exact activations only"
    return gpu_support.obstacle(product.device)


def _refuses_on_tensor_cores(product: Product) -> str | None:
    if product.dtype not in _TENSOR_CORE_DTYPES:
        return f"activations of {product.dtype}; float16 and bfloat16 are supported"
    return _refuses_on_gpu(product)


def _many_rows_on_gpu(product: Product) -> str | None:
    return f"tiles are faster for {product.rows} rows" if product.rows > TRITON_FUSED_ROWS else None


def _run_triton_fused(x: Tensor, weight: PlaneWeight, bits: int, bias: Tensor | None, _: Activations) -> Tensor:
    from matgptq.gpu import products as gpu_products

    return gpu_products.matmul(x, weight, bits, bias)


def _run_triton_tiled(x: Tensor, weight: PlaneWeight, bits: int, bias: Tensor | None, _: Activations) -> Tensor:
    from matgptq.gpu import products as gpu_products

    result = x.new_empty(len(x), weight.out_features)
    block = gpu_layout.BLOCK_ROWS
    step = max(block, _TRITON_TILE_BYTES // (weight.in_features * x.element_size()) // block * block)
    tile = x.new_empty(min(step, weight.out_features), weight.in_features)
    for start in range(0, weight.out_features, step):
        rows = tile[: weight.out_features - start]
        gpu_products.dequantize_blocks(weight, bits, start // block, rows)
        torch.mm(x, rows.T, out=result[:, start : start + len(rows)])
    return result if bias is None else result.add_(bias.to(x.dtype))


def _refuses_reference(product: Product) -> str | None:
    return None if product.activations == "exact" else "multiplies exact activations only"


def _many_rows(product: Product) -> str | None:
    if product.activations == "exact" and product.rows > FUSED_ROWS[product.dtype]:
        return f"tiles are faster for {product.rows} rows"
    return None


def _no_drawback(product: Product) -> None:
    return None


KERNELS: tuple[Kernel, ...] = (
    Kernel("native-fused", _refuses_natively, _many_rows, _run_fused),
    Kernel("native-tiled", _refuses_tiled, _no_drawback, _run_tiled),
    Kernel("triton-fused", _refuses_on_tensor_cores, _many_rows_on_gpu, _run_triton_fused),
    Kernel("triton-tiled", _refuses_on_gpu, _no_drawback, _run_triton_tiled),
    Kernel("reference", _refuses_reference, _no_drawback, _run_reference),
)

_packed: weakref.WeakValueDictionary[int, PackedWeight] = weakref.WeakValueDictionary()


def remember(weight: PackedWeight) -> PackedWeight:
    """Make a packed weight known to compiled graphs, which can hold its key but not the object."""
    _packed[weight.key] = weight
    return weight


def _remembered(key: int) -> PackedWeight:
    weight = _packed.get(key)
    if weight is None:
        raise ConfigurationError("the packed weight that a recorded product reads is gone, and its model with it")
    return weight


@torch.library.custom_op("matgptq::packed_matmul", mutates_args=())
def _packed_matmul(x: Tensor, key: int, bits: int, bias: Tensor | None, activations: str) -> Tensor:
    return _multiply(x, _remembered(key), bits, bias, activations)  # type: ignore[arg-type]


@_packed_matmul.register_fake
def _(x: Tensor, key: int, bits: int, bias: Tensor | None, activations: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], _remembered(key).out_features)


@torch.library.custom_op("matgptq::packed_weight", mutates_args=())
def _packed_weight(key: int, bits: int, dtype: torch.dtype) -> Tensor:
    return dequantize(_remembered(key), bits, dtype)


@_packed_weight.register_fake
def _(key: int, bits: int, dtype: torch.dtype) -> Tensor:
    weight = _remembered(key)
    return torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=weight.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.key, ctx.bits, bias, _ = inputs
    ctx.weight = _packed.get(ctx.key)  # alive until the gradient is computed
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
