"""What a model's ``config.json`` says, wherever a model type puts it.

Functions take the parsed file; those that also take a configuration object of transformers say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matgptq.errors import ConfigurationError


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What concerns the language model: a model of several parts has a section for it."""
    section = config.get("text_config")
    return {**config, **section} if isinstance(section, Mapping) else config


def attention_heads(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Heads of queries, and of keys and values; None where transformers cannot tell.

    A file need not name what is the default of its model type, and models of several parts often do not.
    """
    from transformers import CONFIG_MAPPING

    try:
        complete = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).get_text_config()
        return int(complete.num_attention_heads), key_value_heads(complete)
    except Exception:  # what a configuration class makes of values that make no sense
        return None


def key_value_heads(config: Any) -> int:
    """Heads of keys and values, by the configuration object of a language model."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_dim(config: Any) -> int:
    """Numbers in a head, by the configuration object of a language model."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def stored_dtype(config: Mapping[str, Any]) -> str | None:
    """Name of the dtype that the weights are stored in, if the file names one; older files call it ``torch_dtype``."""
    value = config.get("dtype") or config.get("torch_dtype")
    return value if isinstance(value, str) else None


def attention_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of ``from_pretrained`` and ``from_config`` by which transformers computes attention as the model asks.

    Some versions that we support (5.19) run Gemma 2 with an attention that leaves out its bound on scores.
    """
    bounded = language_config(config).get("attn_logit_softcapping") is not None
    return {"attn_implementation": "eager"} if bounded else {}


def longest_window(config: Any) -> int | None:
    """Tokens that the model can take at a time, None where it does not say; also of a configuration object."""
    return _number(config, "max_position_embeddings")


def vocabulary_size(config: Any) -> int | None:
    """Tokens that the model knows, None where it does not say; also of a configuration object."""
    return _number(config, "vocab_size")


def _number(config: Any, name: str) -> int | None:
    if isinstance(config, Mapping):
        found = language_config(config).get(name)
    else:
        found = getattr(config.get_text_config(), name, None)
    return None if found is None else int(found)


def check_window(config: Any, seqlen: int) -> None:
    """Refuse windows that the model cannot take; ``config`` as for ``longest_window``.

    Raises:
        ConfigurationError: they are longer than its context.
    """
    longest = longest_window(config)
    if longest is not None and seqlen > longest:
        raise ConfigurationError(f"--seqlen {seqlen} is longer than the model's context of {longest} tokens")
