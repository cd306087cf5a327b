"""What one loaded checkpoint is served as: a model for each of its widths and allocations, all of the same memory."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from matgptq.checkpoints.allocation_scales import has_own_scales
from matgptq.checkpoints.allocation_store import find_allocation, stored_allocations
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.errors import ConfigurationError
from matgptq.inference.loading import load
from matgptq.inference.nested_linear import SlicedLinear, nested_layers
from matgptq.inference.width_copies import copy_at
from matgptq.models.source import load_tokenizer
from matgptq.slicing import WIDTHS

Widths = int | Mapping[str, int]


class UnknownModelError(ConfigurationError):
    """Nothing is served under a name."""


class ServedModels:
    """A model and its copies at other widths, by the names that clients ask for.

    Args:
        model: of ``matgptq.load``; answers to ``name`` and to ``name:own``.
        tokenizer: of the same checkpoint.
        name: of the checkpoint.
        own: what the model is set to: a width, or the name of an allocation.
        others: ``{width or name of an allocation: what it sets}``, served as ``name:choice``.

    Attributes:
        names: all that is served, the checkpoint's own name first.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, own: str, others: Mapping[str, Widths]) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self._model = model
        self._others = {f"{name}:{choice}": widths for choice, widths in others.items() if choice != own}
        self._made = {name: model, f"{name}:{own}": model}
        self._lock = threading.Lock()
        self.names = [*self._made, *self._others]

    def get(self, name: str) -> Any:
        """The model of a name, made when it is first asked for.

        Raises:
            UnknownModelError: there is none.
        """
        with self._lock:
            if name not in self._made:
                if name not in self._others:
                    raise UnknownModelError(f"no model {name!r} is served here; there are {', '.join(self.names)}")
                self._made[name] = copy_at(self._model, self._others[name])
            return self._made[name]


def open_models(
    path: str | Path,
    bits: int | None = None,
    allocation: str | Path | None = None,
    *,
    name: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> ServedModels:
    """Load a checkpoint to be served.

    With all its planes in memory every width is served, and every stored allocation that has no scales of its own.
    Otherwise (``resident=False``, a slice, an allocation with scales of its own) only what was asked for is.

    Args:
        path: a checkpoint directory, a slice, or a hub id.
        bits, allocation: of the model that answers to the checkpoint's name alone; default: the checkpoint's width.
        name: of the checkpoint; default: its directory's, or the hub id.
        trust_remote_code, options: see ``matgptq.load``.

    Raises:
        ConfigurationError, CheckpointError, AllocationError, SourceError: as ``matgptq.load``.
    """
    local = Path(path).expanduser()
    # In a thread that ends: OpenMP has workers for each thread that ever computed, and lets those of the thread that
    # answers requests sleep between any two products once all of them together are more than there are processors.
    with ThreadPoolExecutor(1) as aside:
        model = aside.submit(load, path, bits, allocation, trust_remote_code=trust_remote_code, **options).result()
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    layers = nested_layers(model)
    widths = {layer.bits for layer in layers.values()}
    own = str(widths.pop()) if len(widths) == 1 else "mixed"  # the slice of an allocation
    if allocation is not None:
        own = Path(allocation).stem
    others: dict[str, Widths] = {}
    if all(layer.is_complete and not isinstance(layer, SlicedLinear) for layer in layers.values()):
        others = {str(width): width for width in WIDTHS}
        if local.exists():
            others = _allocations(local) | others
    return ServedModels(model, tokenizer, name or (local.resolve().name if local.exists() else str(path)), own, others)


def _allocations(path: Path) -> dict[str, Widths]:
    """Those that lie with a checkpoint and are served with the scales of its widths."""
    checkpoint = open_checkpoint(path)
    found: dict[str, Widths] = {}
    for name in stored_allocations(checkpoint):
        if not has_own_scales(checkpoint, name):
            found[name] = find_allocation(checkpoint, name)
    return found
