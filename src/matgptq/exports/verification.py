"""Load an export in the engine at hand and compare it with the slice that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from matgptq.checkpoints.allocation_scales import find_origin
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.checkpoints.format import EXPORT_NAME
from matgptq.errors import AllocationError, ExportError, SourceError
from matgptq.exports.gguf_file import ARCHITECTURES, FILE_NAME, context_length
from matgptq.exports.target import Target
from matgptq.files.json_files import read_json
from matgptq.files.stored_tensors import read_headers, read_tensor
from matgptq.files.tensor_names import match_names
from matgptq.inference.nested_linear import NestedLinear
from matgptq.machine.devices import resolve_dtype
from matgptq.models.experts import unfuse_experts
from matgptq.models.model_config import attention_options, stored_dtype
from matgptq.progress import Progress, Silent

_WINDOWS, _SEQLEN = 2, 32
# Equal weights leave the order of summation; its KL is around 1e-12.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Verification:
    """What the comparison found.

    Attributes:
        format: of the export.
        engine: what loaded it.
        tensors: how many were compared: the weights of all layers and everything that is not quantized.
        different: names of those that are not equal, bit for bit in float32.
        rounded: layers whose weights the engine rounds to the model's dtype when it loads them; they are equal then.
        largest_difference: between two weights, that rounding aside.
        tokens: positions whose logits were compared.
        logit_difference: largest.
        kl: mean KL of the export's distribution to the slice's, nats per token.
    """

    format: str
    engine: str
    tensors: int
    different: tuple[str, ...]
    rounded: tuple[str, ...]
    largest_difference: float
    tokens: int
    logit_difference: float
    kl: float

    @property
    def passed(self) -> bool:
        """Whether the export is the slice."""
        return not self.different and self.kl <= _TOLERANCE

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "different": list(self.different), "rounded": list(self.rounded), "passed": self.passed}


def verify(directory: str | Path, against: str | Path, *, progress: Progress | None = None) -> Verification:
    """Compare an export with the slice of a checkpoint, in float32 on the CPU.

    The engine is transformers with the package that the format needs there (compressed-tensors, gguf), or matgptq for
    its own slices. transformers reads gptq only through packages that are compiled for one machine; its tensors are
    unpacked here, by the definition of the format. Two models are never in memory together.

    Args:
        directory: an export.
        against: the checkpoint that it was made from.
        progress: receives stages.

    Raises:
        ExportError: not an export, of another checkpoint, or one that the engine cannot load.
        CheckpointError: a damaged checkpoint.
    """
    progress = progress or Silent()
    directory = Path(directory)
    target, format = _read_record(directory, Path(against))
    progress.start(f"load {directory}", 1)
    engine, load = _ENGINES[format]
    try:
        model = load(directory, target).eval()
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise ExportError(f"{directory}: cannot be loaded: {error}") from error
    config = target.model_config
    seqlen = min(
        _SEQLEN, context_length(config) if format == "gguf" else config.get_text_config().max_position_embeddings
    )
    tokens = torch.randint(
        config.get_text_config().vocab_size, (_WINDOWS, seqlen), generator=torch.Generator().manual_seed(0)
    )
    found = _log_probabilities(model, tokens)  # first: compressed-tensors unpacks its weights when they are used
    progress.start("compare the weights", len(target.widths))
    compared = _compare(model, target, format, progress.advance)
    del model
    progress.start("compare the logits", 1)
    expected = _log_probabilities(_dense_model(target, _slice_weights(target, format, compared.rounded)).eval(), tokens)
    return Verification(
        format=format,
        engine=engine,
        tensors=compared.tensors,
        different=tuple(compared.different),
        rounded=tuple(compared.rounded),
        largest_difference=compared.largest,
        tokens=tokens.numel(),
        logit_difference=float((found - expected).abs().max()),
        kl=float((expected.exp() * (expected - found)).sum(-1).mean()),
    )


def _read_record(directory: Path, against: Path) -> tuple[Target, str]:
    if not (directory / EXPORT_NAME).is_file():
        raise ExportError(f"{directory}: not an export (no {EXPORT_NAME})")
    checkpoint = open_checkpoint(against)
    try:
        record = read_json(directory / EXPORT_NAME)
        config = read_json(directory / "config.json")
        format, widths = record.get("format"), record.get("layer_bits")
        if format not in _ENGINES or not isinstance(widths, dict):
            raise SourceError(f"{directory / EXPORT_NAME}: no known format in it")
        widths = checkpoint.widths(widths)
    except SourceError as error:
        raise ExportError(str(error)) from error
    except AllocationError as error:
        raise ExportError(f"{directory}: not made from {against}: {error}") from error
    try:
        own_scales = find_origin(checkpoint, record, widths)
    except AllocationError as error:
        raise ExportError(f"{directory}: the scales that it was made with are not found: {error}") from error
    dtype = resolve_dtype(str(stored_dtype(config)), torch.device("meta"), None)
    return Target(checkpoint, widths, dtype, own_scales), str(format)


def _log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.log_softmax(model(input_ids=tokens, use_cache=False).logits.double(), -1)


def _slice_weights(target: Target, format: str, rounded: Collection[str] = ()) -> Callable[[str], Tensor]:
    """The weights that the engine should have: those of the slice, which a dense export or the engine may round."""

    def weights(layer: str) -> Tensor:
        dtype = target.dtype if format == "dense" or layer in rounded else torch.float32
        return target.read(layer).dequantize(dtype).float()

    return weights


@dataclass
class _Compared:
    """Tensors of the engine's model beside those of the slice; see ``Verification``."""

    tensors: int
    different: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)
    largest: float = 0.0


def _compare(model: Any, target: Target, format: str, advance: Callable[[], None]) -> _Compared:
    weights = _slice_weights(target, format)
    # To fuse experts, transformers unpacks those of compressed-tensors, in the dtype of their scales.
    unpacked = {*chain.from_iterable(target.expert_groups)} if format == "compressed-tensors" else set()
    if target.family is not None:
        unfuse_experts(model, target.family)  # layers are then called as in the files
    state = model.state_dict()
    kept = [name for name, quantized in target.parts() if not quantized]
    names = match_names(model, kept)
    shifted = format == "gguf" and ARCHITECTURES[target.model_config.model_type].norms_plus_one
    compared = _Compared(len(target.widths) + len(kept))
    for layer in target.widths:
        found = _weight(model.get_submodule(layer))
        difference = _difference(found, weights(layer))
        if difference and layer in unpacked and not _difference(found, _slice_weights(target, format, (layer,))(layer)):
            compared.rounded.append(layer)
        elif difference:
            compared.different.append(layer)
            compared.largest = max(compared.largest, difference)
        advance()
    for name in kept:
        if name not in names:
            compared.different.append(name)
            continue
        found, stored = state[names[name]].float(), target.read_kept(name).float()
        if shifted and name.endswith("norm.weight"):  # transformers subtracts 1, and adds it again to compute
            found, stored = found + 1, stored + 1
        if _difference(found, stored):
            compared.different.append(name)
    return compared


def _weight(module: nn.Module) -> Tensor:
    if isinstance(module, NestedLinear):
        return module.dequantize(torch.float32)
    weight = module.get_parameter("weight")
    return weight.detach().float()


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max())


def _dense_model(target: Target, weights: Callable[[str], Tensor]) -> Any:
    """The architecture in transformers, with these weights in its quantized layers."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    state = {
        f"{name}.weight" if quantized else name: weights(name) if quantized else target.read_kept(name)
        for name, quantized in target.parts()
    }
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(target.model_config)]
    return _complete(
        *model_class.from_pretrained(
            None,
            config=target.model_config,
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
            **attention_options(target.model_config.to_dict()),
        )
    )


def _complete(model: Any, loading: dict[str, Any]) -> Any:
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ExportError(f"it has no {missing[0]} ({len(missing)} tensors are missing)")
    return model


def _load_directory(directory: Path, target: Target) -> Any:
    from transformers import AutoModelForCausalLM

    options = attention_options(target.model_config.to_dict())
    model = _complete(
        *AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True, **options)
    )
    # Experts that it unpacked are still in the dtype of their scales; its own method refuses quantized models.
    return nn.Module.float(model)


def _load_gguf(directory: Path, target: Target) -> Any:
    """With the checkpoint's own configuration, because transformers reads only a part of it from the file."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = target.model_config
    if config.model_type == "mistral":  # in GGUF it is a Llama
        config = LlamaConfig.from_dict({**config.to_dict(), "model_type": "llama"})
    return _complete(
        *AutoModelForCausalLM.from_pretrained(
            directory,
            gguf_file=FILE_NAME,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            **attention_options(config.to_dict()),
        )
    )


def _load_slice(directory: Path, target: Target) -> Any:
    from matgptq.inference.loading import load

    return load(directory, device="cpu", dtype=torch.float32)


def _load_gptq(directory: Path, target: Target) -> Any:
    headers = read_headers(directory)
    bits = read_json(directory / "config.json")["quantization_config"]["bits"]

    def weights(layer: str) -> Tensor:
        names = ("qweight", "qzeros", "scales", "g_idx")
        return unpack_gptq(bits, *(read_tensor(headers[f"{layer}.{name}"]) for name in names))

    return _dense_model(target, weights)


def unpack_gptq(bits: int, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor) -> Tensor:
    """Weights ``[out, in]`` of a layer in the GPTQ format, version 1, whose stored zero points are one too small.

    Args:
        bits: width, 2, 3, 4 or 8.
        qweight: int32 ``[in * bits / 32, out]``.
        qzeros: int32 ``[groups, out * bits / 32]``.
        scales: ``[groups, out]``.
        g_idx: int32 ``[in]``.
    """
    codes = _unpack_words(qweight.t(), bits)  # [out, in]
    zeros = _unpack_words(qzeros, bits) + 1  # [groups, out]
    group = g_idx.long()
    return scales.float().t()[:, group] * (codes - zeros.t()[:, group]).float()


def _unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 words ``[rows, n * bits / 32]`` to integers ``[rows, n]``; a code may lie across two words."""
    unsigned = words.long() & 0xFFFFFFFF
    first = torch.arange(words.shape[1] * 32 // bits) * bits
    word, shift = first // 32, first % 32
    following = torch.nn.functional.pad(unsigned, (0, 1))[:, word + 1]
    return ((unsigned[:, word] | following << 32) >> shift) & ((1 << bits) - 1)


_ENGINES: dict[str, tuple[str, Callable[[Path, Target], Any]]] = {
    "compressed-tensors": ("transformers with compressed-tensors", _load_directory),
    "gptq": ("transformers with weights unpacked by matgptq", _load_gptq),
    "gguf": ("transformers with gguf", _load_gguf),
    "matgptq-slice": ("matgptq", _load_slice),
    "dense": ("transformers", _load_directory),
}
