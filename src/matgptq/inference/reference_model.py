"""The full-precision model that a checkpoint was made from, or another that it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from matgptq.checkpoints.checkpoint import Checkpoint
from matgptq.errors import ConfigurationError, SourceError
from matgptq.machine.devices import resolve_dtype
from matgptq.models.model_config import vocabulary_size
from matgptq.models.source import ModelSource, open_source
from matgptq.progress import Progress


def find_reference(
    checkpoint: Checkpoint, reference: str | Path | None, *, trust_remote_code: bool, instead: str = ""
) -> ModelSource:
    """The model that the user named, or else the one that the checkpoint was made from.

    Args:
        checkpoint: which records it.
        reference: what the user named.
        trust_remote_code: allow code in the model's directory to run.
        instead: what else the user could do, for the error.

    Raises:
        ConfigurationError: neither names one, or it has another vocabulary.
        SourceError: it cannot be opened.
    """
    named = reference if reference is not None else checkpoint.settings.source
    if named is None:
        raise ConfigurationError(
            f"{checkpoint.path}: does not say what model it was made from; name it (--reference MODEL{instead})"
        )
    source = open_source(named, trust_remote_code=trust_remote_code)
    _check_vocabulary(source.config, source.name, checkpoint)  # of a GGUF file, which has no config, when it is loaded
    return source


def reference_dtype(
    source: ModelSource, checkpoint: Checkpoint, device: torch.device, dtype: str | torch.dtype
) -> torch.dtype:
    """The precision it runs in; ``auto`` on a GPU is that of its files, or of the checkpoint where they do not say."""
    return resolve_dtype(dtype, device, source.stored_dtype or checkpoint.stored_dtype)


def load_reference(source: ModelSource, checkpoint: Checkpoint, device: torch.device, dtype: str | torch.dtype) -> Any:
    """Load it, in the precision of ``reference_dtype``.

    Raises:
        ConfigurationError: it has another vocabulary than the checkpoint.
    """
    full = source.load_model(reference_dtype(source, checkpoint, device, dtype), device)
    _check_vocabulary(full.config, source.name, checkpoint)
    return full


def _check_vocabulary(config: Any, name: str, checkpoint: Checkpoint) -> None:
    """Refuse a full model whose predictions are of other tokens.

    Args:
        config: the full model's, parsed or as an object.
        name: what the user calls it.
        checkpoint: that it is compared with.

    Raises:
        ConfigurationError: their vocabularies differ in size.
    """
    size, own = vocabulary_size(config), vocabulary_size(checkpoint.config)
    if None not in (size, own) and size != own:
        raise ConfigurationError(
            f"{name}: has {size} tokens in its vocabulary, {checkpoint.path} has {own}; "
            "it is not the model that the checkpoint was made from (--reference MODEL)"
        )


def load_optional_reference(
    checkpoint: Checkpoint,
    reference: str | Path | None,
    without: str,
    progress: Progress,
    *,
    device: torch.device,
    dtype: str | torch.dtype,
    trust_remote_code: bool = False,
) -> tuple[Any, str | None]:
    """The model and its name; (None, None) and a note where nobody named one and the recorded one is gone.

    ``without`` says in the note what there will not be.
    """
    if reference is None and checkpoint.settings.source is None:
        progress.note(f"the checkpoint does not say what model it was made from: {without} (--reference MODEL)")
        return None, None
    try:
        source = find_reference(checkpoint, reference, trust_remote_code=trust_remote_code)
        return load_reference(source, checkpoint, device, dtype), source.name
    except (SourceError, ConfigurationError) as error:
        if reference is not None:
            raise
        progress.note(f"the original model cannot be compared with: {without} (--reference MODEL): {error}")
        return None, None
