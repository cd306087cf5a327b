"""What to serve: the wishes of whoever started vLLM, checked against the checkpoint. Knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from matgptq.checkpoints.allocation_scales import has_own_scales
from matgptq.checkpoints.allocation_store import find_allocation
from matgptq.checkpoints.checkpoint import Checkpoint
from matgptq.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from matgptq.inference.loading import check_held
from matgptq.native import Activations
from matgptq.slicing import check_bits

BITS = "MATGPTQ_BITS"
ALLOCATION = "MATGPTQ_ALLOCATION"
ACTIVATIONS = "MATGPTQ_ACTIVATIONS"
# Some models of vLLM (Qwen3-MoE with a dense block) say too late that they stack these.
_USUAL_STACKS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Choice:
    """What was asked for at start.

    Attributes:
        bits: width of all layers, or of those that the allocation does not name; None for the checkpoint's own.
        allocation: name of a stored one, a file, or ``{layer: bits}``; None for one width.
        activations: as in ``matgptq.load``.
    """

    bits: int | None = None
    allocation: str | Mapping[str, int] | None = None
    activations: Activations = "exact"


def read_choice(record: Mapping[str, Any], environment: Mapping[str, str]) -> Choice:
    """Read the wishes from the environment and from a ``quantization_config``.

    Args:
        record: of ``config.json``, or what ``--hf-overrides`` put in its place; only ``bits``, ``allocation`` and
            ``activations`` are read.
        environment: ``MATGPTQ_BITS``, ``MATGPTQ_ALLOCATION`` and ``MATGPTQ_ACTIVATIONS`` take precedence.

    Raises:
        ConfigurationError: no width from 2 to 8, or another kind of activations.
    """
    bits: Any = record.get("bits")
    if environment.get(BITS):
        text = environment[BITS].strip()
        if not text.isdecimal():
            raise ConfigurationError(f"{BITS} must be a width from 2 to 8, not {text!r}")
        bits = int(text)
    allocation = environment.get(ALLOCATION) or record.get("allocation")
    if allocation is not None and not isinstance(allocation, str | Mapping):
        raise ConfigurationError(f"allocation must be a name, a file or an object, not {allocation!r}")
    activations: Any = environment.get(ACTIVATIONS) or record.get("activations", "exact")
    if activations not in get_args(Activations):
        raise ConfigurationError(f"{ACTIVATIONS} must be exact or int8, not {activations!r}")
    return Choice(None if bits is None else check_bits(bits), allocation, activations)


class ServedLayer(NamedTuple):
    """One of the checkpoint's layers: the width to serve, and columns per scale."""

    bits: int
    group_size: int


def chosen_layers(choice: Choice, checkpoint: Checkpoint) -> dict[str, ServedLayer]:
    """What to serve of every layer.

    Raises:
        AllocationError: no such allocation, or one for another checkpoint, or a width that a slice does not hold.
        UnsupportedModelError: the allocation has scales of its own, which vLLM does not load.
    """
    settings = checkpoint.settings
    allocation: dict[str, int] = {}
    if choice.allocation is not None:
        allocation = find_allocation(checkpoint, choice.allocation, choice.bits)
        if has_own_scales(checkpoint, choice.allocation):
            raise UnsupportedModelError(
                f"allocation {choice.allocation} has scales of its own, which vLLM does not load; serve what "
                f"'matgptq export {checkpoint.path} --allocation {choice.allocation} --format matgptq-slice' writes"
            )
    if settings.is_slice:
        check_held(checkpoint.path, settings, choice.bits, allocation)
        allocation = {layer: settings.bits_of(layer) for layer in checkpoint.layers}
    default = choice.bits or settings.bits
    return {
        layer: ServedLayer(allocation.get(layer, default), info.group_size) for layer, info in checkpoint.layers.items()
    }


def held_layers(
    prefix: str, stacks: Mapping[str, Sequence[str]], layers: Mapping[str, ServedLayer], plain: Collection[str]
) -> dict[str, ServedLayer] | None:
    """The checkpoint's layers that one of vLLM's holds, in order.

    Args:
        prefix: vLLM's name of its layer.
        stacks: which names it stacks under which; layers that it does not stack are named as the checkpoint's.
        layers: what is served of each quantized layer.
        plain: layers at full precision.

    Returns:
        Empty if all of them are at full precision, None if the checkpoint does not have them.

    Raises:
        CheckpointError: some of a stack are quantized, and not all.
    """
    names = [prefix]
    if prefix not in layers and prefix not in plain:
        parent, _, leaf = prefix.rpartition(".")
        stacked = stacks.get(leaf) or _USUAL_STACKS.get(leaf, ())
        names = [f"{parent}.{name}" if parent else name for name in stacked]
    held = {name: layers[name] for name in names if name in layers}
    if held and len(held) < len(names):
        lost = next(name for name in names if name not in held)
        raise CheckpointError(f"layer {lost}: vLLM stacks it with {next(iter(held))}, but it is not quantized")
    if not held and not (names and all(name in plain for name in names)):
        return None
    return held
