"""Which of a model's weights are in memory, and when: all of them, or one block at a time.

A model larger than memory is built without weights; its blocks are filled from the safetensors files when they are
needed and emptied afterwards. What stands around the blocks (embedding, final norm, head) stays. A model that only
comes whole (GGUF, which transformers decodes at once) is used through the same two calls, which then do nothing.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from matgptq.core.finiteness import all_finite
from matgptq.errors import SourceError
from matgptq.files.stored_tensors import TensorInfo, read_tensor
from matgptq.files.tensor_names import match_names, with_tied
from matgptq.models.blocks import Block
from matgptq.models.model_config import attention_options
from matgptq.models.source import ModelSource


class Residency(Protocol):
    """Access to the weights of a model's blocks."""

    network: Any

    def present(self, block: Block) -> AbstractContextManager[None]:
        """Context in which the block's weights are in memory."""

    def change(self, blocks: Sequence[Block], change: Callable[[int, Block], None]) -> None:
        """Change the weights of all blocks: those that are in memory now, others whenever they are filled."""


class Whole:
    """A model that is in memory as a whole; what is done to a block stays done.

    Args:
        network: with all its weights.
    """

    def __init__(self, network: Any) -> None:
        self.network = network

    def change(self, blocks: Sequence[Block], change: Callable[[int, Block], None]) -> None:
        """Change all blocks now."""
        for index, block in enumerate(blocks):
            change(index, block)

    @contextmanager
    def present(self, block: Block) -> Iterator[None]:
        """Nothing has to be done."""
        yield


class Streamed:
    """A model whose blocks are filled from files while they are needed.

    Every time a block is filled its weights are those of the files, changed as ``change`` said; what else was done to
    them in between is lost.

    Args:
        network: of ``build_empty``.
        source: its files.
        blocks: module path of the list of blocks.
        device: where weights go.

    Raises:
        SourceError: the files lack a tensor of the model, or hold one of another shape.
    """

    def __init__(self, network: Any, source: ModelSource, blocks: str, device: torch.device) -> None:
        self.network = network
        self._device = device
        self._prefix = f"{blocks}."
        self._stored = _stored_tensors(network, source)
        self._changes: dict[str, Callable[[], None]] = {}
        self._fill([name for name, _ in _tensors(network) if not name.startswith(self._prefix)])
        network.tie_weights()
        for name, buffer in network.named_buffers():
            if not buffer.is_meta and not name.startswith(self._prefix):
                _set(network, name, buffer.to(device))

    @contextmanager
    def present(self, block: Block) -> Iterator[None]:
        """Fill the block, change it as was said, and empty it again."""
        names = [f"{block.name}.{name}" for name, _ in _tensors(block.module)]
        self._fill(names)
        try:
            if block.name in self._changes:
                self._changes[block.name]()
            yield
        finally:
            for name in names:
                _set(self.network, name, _get(self.network, name).to("meta"))

    def change(self, blocks: Sequence[Block], change: Callable[[int, Block], None]) -> None:
        """Change each block whenever it is filled."""
        self._changes = {block.name: partial(change, index, block) for index, block in enumerate(blocks)}

    def _fill(self, names: Sequence[str]) -> None:
        for name in names:
            empty = _get(self.network, name)
            if name not in self._stored:  # tied to one that is there
                continue
            stored, info = self._stored[name]
            tensor = read_tensor(info).to(self._device, empty.dtype)
            if tensor.is_floating_point() and not all_finite(tensor):
                raise SourceError(f"{info.file}: tensor {stored} holds NaN or Inf")
            _set(self.network, name, tensor)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's; other C libraries have none and need none."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return trim


def return_freed_memory() -> None:
    """Give what has been freed back to the system.

    glibc keeps freed pieces for later ones, which do not fit into all of them: over a hundred blocks the process would
    grow by what a few blocks take.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def build_empty(source: ModelSource, dtype: torch.dtype) -> Any:
    """The causal language model in eval mode without weights: parameters on the meta device, buffers computed.

    Args:
        source: with a configuration; its weights are not touched.
        dtype: of the parameters.

    Raises:
        SourceError: transformers cannot build it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
        with _parameters_on_meta():
            network = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                trust_remote_code=source.trust_remote_code,
                **attention_options(source.config),
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise SourceError(f"{source.name}: transformers cannot build it: {error}") from error
    network.name_or_path = str(source.directory)
    return network.eval().requires_grad_(False)


def can_stream(source: ModelSource) -> bool:
    """Whether blocks can be read one by one: safetensors, and a configuration to build the model from."""
    return source.gguf_file is None and bool(source.config)


def needs_conversion(network: Any, source: ModelSource) -> bool:
    """Whether transformers would do more to the stored tensors than rename and cast them."""
    if getattr(network, "_keep_in_fp32_modules", None) or getattr(network, "_keep_in_fp32_modules_strict", None):
        return True
    missing = _missing(network, match_names(network, source.tensors))
    return bool(missing)


def _missing(network: Any, matched: Mapping[str, str]) -> list[str]:
    """Tensors of the model that the files do not have under any name."""
    found = with_tied(network, matched.values())
    return [name for name in network.state_dict() if name not in found]


def _stored_tensors(network: Any, source: ModelSource) -> dict[str, tuple[str, TensorInfo]]:
    """``{name in the model: (name in the files, where)}``, complete and of the right shapes."""
    matched = match_names(network, source.tensors)
    missing = _missing(network, matched)
    if missing:
        raise SourceError(f"{source.name}: the files hold no {missing[0]} ({len(missing)} tensors are missing)")
    state = network.state_dict()
    stored = {}
    for name, known in matched.items():
        info, shape = source.tensors[name], tuple(state[known].shape)
        if info.shape != shape:
            raise SourceError(f"{info.file}: tensor {name} is {list(info.shape)}, the model wants {list(shape)}")
        stored[known] = name, info
    return stored


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and stored buffers by name; a shared one under each of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    kept = module.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in kept)


def _get(module: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), leaf)
    return tensor


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device; buffers, which they compute, stay real.

    Large layers are made there from the start: made and dropped one after the other they would leave the process with
    address space as large as the model, in pieces that small objects in between keep from being given back.
    """
    register = nn.Module.register_parameter
    made = {kind: kind.__init__ for kind in (nn.Linear, nn.Embedding)}

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    for kind in made:
        kind.__init__ = _made_on_meta(made[kind])  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        for kind, own in made.items():
            kind.__init__ = own  # type: ignore[method-assign]


def _made_on_meta(initialize: Callable[..., None]) -> Callable[..., None]:
    def initialize_there(module: nn.Module, *sizes: Any, **options: Any) -> None:
        initialize(module, *sizes, **{"device": "meta", **options})

    return initialize_there
