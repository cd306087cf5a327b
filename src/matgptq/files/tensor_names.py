"""Which tensor of a file is which tensor of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def match_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Find stored tensors in a model as ``from_pretrained`` does.

    Files may lack the base model's prefix or have it in excess (a base model's file, loaded with a head, or the other
    way round), and transformers renames some tensors while loading: GPT-NeoX files hold ``embed_out.weight``, the
    model calls it ``lm_head.weight``.

    Args:
        model: a transformers model; may be on the meta device.
        stored: names in its files.

    Returns:
        ``{stored name: name in model.state_dict()}``, without the names that the model does not know.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    state = model.state_dict().keys()
    prefix = f"{model.base_model_prefix}."
    # Transformations of the values themselves are left out: a tensor that needs one cannot be kept as it is stored.
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    matched = {}
    for name in stored:
        renamed, _ = rename_source_key(name, renamings, [])
        for candidate in (name, prefix + name, name.removeprefix(prefix), renamed, prefix + renamed):
            if candidate in state:
                matched[name] = candidate
                break
    return matched


def with_tied(model: Any, names: Iterable[str]) -> set[str]:
    """Names of a model's tensors and of those tied to them: files need no more than one of two tied ones."""
    found = set(names)
    for tied, origin in getattr(model, "all_tied_weights_keys", {}).items():
        if found & {tied, origin}:
            found |= {tied, origin}
    return found


def is_derived(name: str) -> bool:
    """Whether a stored tensor is a buffer that old checkpoints carry and models compute by themselves."""
    return name.endswith((".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"))
