"""Which tensor-parallel sizes a checkpoint can be served with: numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matgptq.checkpoints.checkpoint import LayerInfo
from matgptq.errors import UnsupportedModelError
from matgptq.models.families import find_family
from matgptq.models.model_config import attention_heads


def shard_obstacle(in_features: int, group_size: int, ranks: int) -> str | None:
    """Why a layer cannot be cut along its input features into ``ranks`` shards; None if it can.

    A scale serves ``group_size`` columns, and no two ranks can share one.
    """
    if in_features % ranks:
        return f"{ranks} ranks do not divide its {in_features} input features"
    columns = in_features // ranks
    if columns % group_size:
        share = f"{ranks} ranks would get {columns} of its {in_features} input features each"
        return f"{share}, which splits a group of {group_size}"
    return None


def fitting_sizes(config: Mapping[str, Any], layers: Mapping[str, LayerInfo]) -> list[int]:
    """Tensor-parallel sizes that fit, 1 among them.

    Attention heads and the rows of MLP layers are dealt out to the ranks; key and value heads, too, or else each is
    repeated on several ranks; the layers that add to the residual stream are cut along their input features. That is
    how vLLM shards the architectures of ``matgptq.models.families``.

    Args:
        config: parsed ``config.json``.
        layers: shapes and group sizes of the quantized layers.

    Raises:
        UnsupportedModelError: an architecture that is no entry of ``matgptq.models.families``, or whose heads are not
            known.
    """
    family = find_family(str(config.get("model_type")))
    known = attention_heads(config)
    if known is None:
        raise UnsupportedModelError("transformers cannot tell from config.json how many attention heads the model has")
    heads, kv_heads = known
    paths = [(family.place(name)[1], info) for name, info in layers.items()]
    inputs = {(info.in_features, info.group_size) for path, info in paths if family.writes(path)}
    rows = {info.out_features for path, info in paths if family.is_hidden(path)}
    return [
        ranks
        for ranks in range(1, heads + 1)
        if heads % ranks == 0
        and (kv_heads % ranks == 0 or ranks % kv_heads == 0)
        and all(out_features % ranks == 0 for out_features in rows)
        and all(shard_obstacle(*shape, ranks) is None for shape in inputs)
    ]
