"""Which layers share a width, and what each width costs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from matgptq.checkpoints.checkpoint import LayerInfo
from matgptq.models.families import Family
from matgptq.nested_weight import layer_bits

_EXPERTS = ".experts."


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are given one width.

    Attributes:
        layers: full names, in the order of the forward pass.
        block: index of the transformer block that they are in; 0 for layers outside the blocks.
        kind: what they are inside their block, the same for all blocks: ``self_attn.q_proj+k_proj+v_proj``.
        weights: number of codes.
        scale_bits: bits of the group scales that serving reads, the same at every width.
    """

    layers: tuple[str, ...]
    block: int
    kind: str
    weights: int
    scale_bits: int

    def cost(self, bits: int) -> int:
        """Bits that serving reads at a width, codes and scales."""
        return self.weights * bits + self.scale_bits


def group_layers(layers: Mapping[str, LayerInfo], family: Family, *, fuse: bool = True) -> tuple[LayerGroup, ...]:
    """Groups of layers in the order of the forward pass.

    Serving engines concatenate the matrices that share an input (``Family.inputs``: q, k and v; gate and up) into one
    matrix, and all experts of a block into another, and refuse codes of different widths in it.

    Args:
        layers: the quantized layers of a checkpoint.
        family: its architecture.
        fuse: False gives each layer a group of its own.
    """
    order = {path: position for position, path in enumerate(family.layers)}
    fused = {path: group[0] for group in family.ordinary_inputs for path in group}
    members: dict[tuple[int, int, str], list[tuple[int, str, str]]] = {}
    for layer in layers:
        block, path = family.place(layer)
        position = order.get(path, len(order))
        key = path
        if fuse:
            key = path.partition(_EXPERTS)[0] + _EXPERTS if _EXPERTS in path else fused.get(path, path)
        members.setdefault((block, order.get(key, position), key), []).append((position, path, layer))
    groups = []
    for (block, _, key), found in sorted(members.items()):
        found.sort()
        infos = [layers[layer] for _, _, layer in found]
        groups.append(
            LayerGroup(
                layers=tuple(layer for _, _, layer in found),
                block=max(block, 0),
                kind=key.rstrip(".") if key.endswith(_EXPERTS) else _kind([path for _, path, _ in found]),
                weights=sum(info.out_features * info.in_features for info in infos),
                scale_bits=sum(layer_bits(info.out_features, info.in_features, info.group_size, 0) for info in infos),
            )
        )
    return tuple(groups)


def _kind(paths: list[str]) -> str:
    """``self_attn.q_proj+k_proj`` from paths that share what stands before their last part."""
    parent, _, first = paths[0].rpartition(".")
    names = "+".join([first, *(path.rpartition(".")[2] for path in paths[1:])])
    return f"{parent}.{names}" if parent else names
