"""Which models the kernels serve packed, and what packing one consists of: its layers, its blocks, its head."""

from __future__ import annotations

from typing import Any

import torch

from matgptq.errors import ConfigurationError
from matgptq.inference.block_stack import decode_in_one_call
from matgptq.inference.decoding import decode_in_rows
from matgptq.inference.nested_linear import nested_layers, pack_layers
from matgptq.inference.output_head import pack_head, quicken_head
from matgptq.kernels import packed_weight
from matgptq.models.families import Family, known_family
from matgptq.native import Activations


def pack_model(
    model: Any,
    *,
    resident: bool = True,
    activations: Activations = "exact",
    head_bits: int | None = None,
) -> bool:
    """Pack a model for the kernels of its device, if they take it; returns whether they do.

    Args:
        model: has nested layers, all on one device.
        resident, activations, head_bits: see ``matgptq.load``.

    Raises:
        ConfigurationError: something was asked for that only kernels can do, and they do not take the model.
    """
    layers = nested_layers(model)
    device: torch.device = model.device
    native = packed_weight.packed_form(device) == "native"
    obstacle = packed_weight.obstacle(device, model.dtype)
    if activations != "exact" and not native:
        raise ConfigurationError(f"activations={activations!r} needs the native kernels: the model is on {device}")
    wishes = {
        "resident=False": not resident,
        f"activations={activations!r}": activations != "exact",
        f"head_bits={head_bits}": head_bits is not None,
    }
    if obstacle is not None:
        wish = next((wish for wish, wanted in wishes.items() if wanted), None)
        if wish is not None:
            raise ConfigurationError(f"{wish} needs the {'native' if native else 'Triton'} kernels: {obstacle}")
        return False
    resident = resident and all(layer.is_complete for layer in layers.values())  # others serve one width anyway
    family = known_family(model.config.model_type)
    pack_layers(model, resident=resident, activations=activations, shared=_shared_inputs(model, family))
    if native and family is not None and family.plain_blocks is not None:
        blocks = family.blocks.removeprefix(_left_out(model))
        decode_in_rows(model, blocks, family.plain_blocks)
        decode_in_one_call(model, blocks)
    if head_bits is not None:
        pack_head(model, head_bits, activations)
    elif native:
        quicken_head(model)
    return True


def _shared_inputs(model: Any, family: Family | None) -> list[tuple[str, ...]]:
    if family is None:
        return []
    prefix = _left_out(model)
    groups = family.shared_inputs(prefix + name for name in nested_layers(model))
    return [tuple(name.removeprefix(prefix) for name in group) for group in groups]


def _left_out(model: Any) -> str:
    """What a causal language model's names begin with and those of a base model loaded alone do not."""
    prefix: str = model.base_model_prefix
    return "" if not prefix or hasattr(model, prefix) else f"{prefix}."


def can_pack(model: Any) -> bool:
    """Whether all of a model's nested layers are in memory and on one device, moved there by nothing else.

    Layers that accelerate brings from elsewhere whenever they are needed must stay what their files hold.
    """
    layers = nested_layers(model).values()
    devices = {layer.codes.device for layer in layers}
    return (
        len(devices) == 1
        and devices != {torch.device("meta")}
        and all(type(layer.codes) is torch.Tensor for layer in layers)  # no part of one spread over devices
        and not any(hasattr(module, "_hf_hook") for module in model.modules())
    )
