"""Load a checkpoint for inference at any width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch

from matgptq.allocation import complete_allocation, read_allocation
from matgptq.checkpoints.allocation_scales import find_scales
from matgptq.checkpoints.allocation_store import find_allocation
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.checkpoints.format import Settings, parse_settings
from matgptq.errors import (
    AllocationError,
    CheckpointError,
    ConfigurationError,
    MatGPTQError,
    SourceError,
)
from matgptq.inference.nested_linear import nested_layers
from matgptq.inference.packing import pack_model
from matgptq.kernels.kernel_choice import check_forced
from matgptq.machine.devices import resolve_device, resolve_dtype
from matgptq.models.model_config import attention_options
from matgptq.native import Activations
from matgptq.slicing import check_bits


def load(
    path: str | Path,
    bits: int | None = None,
    allocation: Mapping[str, int] | str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    resident: bool = True,
    activations: Activations = "exact",
    head_bits: int | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a checkpoint as an ordinary transformers model whose width can be changed at any time.

    Args:
        path: a checkpoint directory, or the hub id of one; or a slice that was exported from one, which serves no
            other width.
        bits: width of all layers, 2..8; default: the one that ``config.json`` names.
        allocation: ``{layer: bits}``, the name of an allocation that lies with the checkpoint (``matgptq.search``), or
            a file; layers that it does not name get ``bits``. One whose scales were tuned (``matgptq.refine``) is
            served with those, and widths are fixed.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: of activations and of everything that is not quantized; ``auto`` is float32 on the CPU and the
            checkpoint's own on a GPU.
        resident: keep all planes of the parent in memory, so that any width can be served. Otherwise only the slices
            asked for stay, in the memory of their width, and widths are fixed. Needs packed weights.
        activations: ``exact``, or ``int8`` to round activations to 8 bits inside the products: faster on a CPU at
            batch 1, at a cost in quality that ``matgptq eval --activations int8`` measures.
        head_bits: serve the output head from a copy rounded to so many bits, 2..8; the head is read whole for every
            token, and at full precision it is half of what a small model reads. None keeps it exact.
        trust_remote_code: allow code in the checkpoint to run. Off unless asked for.

    Returns:
        The model in eval mode, its parameters frozen; adapters around its layers can be trained.
        ``model.set_bits(3)`` or ``model.set_bits({layer: 3, ...})`` changes widths at once, without reading the disk.

    Raises:
        ConfigurationError: ``MATGPTQ_KERNEL`` names no kernel; ``resident=False``, int8 activations or ``head_bits``
            where no kernels can do it.
        CheckpointError: damaged or foreign files.
        AllocationError: unknown layers or widths, or a width that a slice does not hold.
    """
    from transformers import AutoModelForCausalLM

    import matgptq.inference.transformers_integration  # noqa: F401 - registers the format

    check_forced()
    for width in (bits, head_bits):
        if width is not None:
            check_bits(width)
    local = Path(path).expanduser()
    scales = None
    if local.exists():
        checkpoint = open_checkpoint(local, slices=True)  # names what is wrong before transformers gets to see it
        if allocation is not None:
            widths = find_allocation(checkpoint, allocation, bits)
            scales, allocation = find_scales(checkpoint, allocation, widths), widths
        path = local
    elif isinstance(allocation, str | Path):
        allocation = read_allocation(allocation)
    if activations not in get_args(Activations):
        raise ConfigurationError(f"activations must be exact or int8, not {activations!r}")
    target = resolve_device(device)
    config = load_config(path, trust_remote_code=trust_remote_code)
    record = getattr(config, "quantization_config", None)
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: has no quantization_config, so it is not a matgptq checkpoint")
    settings = parse_settings(record, f"{path}/config.json")
    if settings.is_slice:
        check_held(path, settings, bits, allocation or {})
    elif bits is not None:
        record["bits"] = bits
    record["packed"] = False  # but below, once the model is where it goes and has the widths that it gets
    stored = str(config.dtype).removeprefix("torch.") if config.dtype is not None else None
    run_dtype = resolve_dtype(dtype, target, stored)
    with _reading(path):
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=run_dtype,
            trust_remote_code=trust_remote_code,
            **attention_options(config.to_dict()),
        )
    model = model.to(target).eval().requires_grad_(False)
    if allocation is not None and not settings.is_slice:
        layers = nested_layers(model)
        default = next(iter(layers.values())).bits
        model.set_bits(complete_allocation(allocation, layers, default))
        for name, own in (scales or {}).items():
            layers[name].adopt_scales(own)
    pack_model(model, resident=resident, activations=activations, head_bits=head_bits)
    return model


def load_config(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a checkpoint as transformers reads it; raises ``SourceError`` when it cannot."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # what a configuration class makes of values that make no sense
        raise SourceError(f"{path}: transformers cannot read its config: {_reason(error)}") from error


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Name the checkpoint in whatever transformers raises over it; memory that runs out is no fault of the files."""
    try:
        yield
    except (MatGPTQError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path}: transformers cannot build the model that config.json describes: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def check_held(path: str | Path, settings: Settings, bits: int | None, allocation: Mapping[str, int]) -> None:
    """Refuse widths that a slice does not hold."""
    held = f"{settings.bits} bits" if not settings.layer_bits else f"one allocation, {settings.bits} bits and others"
    advice = f"{path}: holds only the slice of {held}; load the checkpoint that it was exported from"
    if bits is not None and bits != settings.bits:
        raise AllocationError(f"bits {bits}: {advice}")
    for layer, width in allocation.items():
        if settings.bits_of(layer) != width:
            raise AllocationError(f"layer {layer} at {width} bits: {advice}")
