"""What of a model goes into a checkpoint unquantized: embeddings, norms, biases, the head, ignored layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from matgptq.core.finiteness import all_finite
from matgptq.errors import SourceError
from matgptq.files.stored_tensors import read_tensor
from matgptq.files.tensor_names import is_derived, match_names
from matgptq.models.blocks import Block
from matgptq.models.source import ModelSource

# Of embeddings and heads that are rotated or come out of a GGUF file, where their weights had about 8 bits. On
# SmolLM2-135M it costs a KL of 4e-7; bfloat16 costs 2e-5 and is no smaller.
SMALL_DTYPE = torch.float16


@dataclass(frozen=True)
class KeptTensor:
    """One tensor that is not quantized.

    Attributes:
        name: in the checkpoint.
        known: in the model.
        stored: in the source's files; None takes it from the model in memory.
        rotated: a rotation changes it, so it is taken from the model and stored in 16 bits.
        scaled: scaling changes it, so it is taken from the model and stored without rounding.
        unpacked: a matrix of a GGUF file, which transformers makes float32 of; stored in 16 bits.
    """

    name: str
    known: str
    stored: str | None
    rotated: bool = False
    scaled: bool = False
    unpacked: bool = False

    @property
    def changed(self) -> bool:
        """Whether it is not the source's any more."""
        return self.rotated or self.scaled

    @property
    def in_16_bits(self) -> bool:
        """Whether it is rounded to 16 bits, where they hold its range."""
        return self.rotated or self.unpacked


@dataclass(frozen=True)
class KeptTensors:
    """All tensors of a model that are not quantized, each in the block that it belongs to, or around the blocks.

    Attributes:
        by_block: for each block, in order.
        ends: the others.
    """

    by_block: tuple[tuple[KeptTensor, ...], ...]
    ends: tuple[KeptTensor, ...]


def find_kept(
    source: ModelSource,
    network: Any,
    blocks: Sequence[Block],
    quantized: frozenset[str],
    rotated: frozenset[str],
    scaled: frozenset[str] = frozenset(),
) -> KeptTensors:
    """Every tensor that is not quantized, under its stored name with the base model's prefix.

    Args:
        source: the files.
        network: the model; may be without weights.
        blocks: all its blocks.
        quantized: weights that are.
        rotated, scaled: parameters that a rotation or scaling will change.

    Raises:
        SourceError: the files lack a tensor of the model, or hold one that the model does not know.
    """
    state = network.state_dict()
    rotated, scaled = rotated & state.keys(), scaled & state.keys()
    unpacked = {name for name, value in state.items() if source.gguf_file and value.dim() > 1} - scaled
    kept: list[tuple[str, str, str | None]]
    if source.gguf_file:
        tied = set(getattr(network, "all_tied_weights_keys", ())) - rotated
        kept = [(name, name, None) for name in state if name not in quantized and name not in tied]
    else:
        kept = _matched_tensors(source, network, quantized)
        found = {known for _, known, _ in kept} | quantized
        kept += [(name, name, None) for name in sorted(rotated - found)]  # a head that was tied
    tensors = [
        KeptTensor(name, known, stored, known in rotated, known in scaled, known in unpacked)
        for name, known, stored in kept
    ]
    by_block = tuple(
        tuple(tensor for tensor in tensors if tensor.known.startswith(f"{block.name}.")) for block in blocks
    )
    inside = {tensor for block in by_block for tensor in block}
    return KeptTensors(by_block, tuple(tensor for tensor in tensors if tensor not in inside))


def read_kept(source: ModelSource, network: Any, tensors: Sequence[KeptTensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors one after the other, exactly as stored, or as the model in memory has them."""
    for tensor in tensors:
        if tensor.in_16_bits:
            yield tensor.name, _in_16_bits(network.get_parameter_or_buffer(tensor.known))
        elif tensor.scaled:
            yield tensor.name, _without_rounding(network.get_parameter(tensor.known))
        elif tensor.stored is None:
            yield tensor.name, network.get_parameter_or_buffer(tensor.known)
        else:
            yield tensor.name, read_tensor(source.tensors[tensor.stored])


def _without_rounding(tensor: Tensor) -> Tensor:
    """A tensor in the smallest dtype that holds its values."""
    for dtype in (torch.bfloat16, torch.float16):
        small = tensor.to(dtype)
        if torch.equal(small.to(tensor.dtype), tensor):
            return small
    return tensor.to(torch.float32)


def _in_16_bits(tensor: Tensor) -> Tensor:
    """A tensor in 16 bits, without rounding if they hold it, or in 32 where a value is out of their range."""
    exact = _without_rounding(tensor)
    small = exact if exact.itemsize == SMALL_DTYPE.itemsize else tensor.to(SMALL_DTYPE)
    return small if all_finite(small) else exact


def _matched_tensors(source: ModelSource, network: Any, quantized: frozenset[str]) -> list[tuple[str, str, str | None]]:
    """The tensors of safetensors files that are kept: name to write, name in the model, name in the files."""
    prefix = f"{network.base_model_prefix}."
    matched = match_names(network, source.tensors)
    kept: list[tuple[str, str, str | None]] = []
    found: set[str] = set()
    for name in source.tensors:
        known = matched.get(name)
        if known is None and is_derived(name):
            continue
        if known is None or known in found:
            raise SourceError(f"{source.name}: tensor {name} has no place in {type(network).__name__}")
        found.add(known)
        if known not in quantized:
            # Layers are named by their module, and the files of a model must agree on the prefix. Other renamings
            # are transformers' own: the stored name is the one that other programs look for.
            only_prefix = name.removeprefix(prefix) == known.removeprefix(prefix)
            kept.append((known if only_prefix else name, known, name))
    lost = sorted(quantized - found)
    if lost:
        raise SourceError(f"{source.name}: {lost[0]} is stored in pieces or another layout, which is not supported")
    return kept
