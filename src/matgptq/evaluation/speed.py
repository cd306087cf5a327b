"""How fast each width decodes and reads prompts, beside the bfloat16 model, in one interleaved run."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matgptq import native
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.errors import ConfigurationError
from matgptq.inference.loading import load
from matgptq.inference.nested_linear import NestedLinear, nested_layers
from matgptq.inference.output_head import DenseHead, PackedHead
from matgptq.inference.reference_model import load_optional_reference
from matgptq.kernels import dispatch, kernel_choice
from matgptq.machine.devices import resolve_device
from matgptq.models.model_config import longest_window
from matgptq.native import Activations
from matgptq.progress import Progress, Silent
from matgptq.slicing import check_widths

DEFAULT_WIDTHS = (2, 3, 4, 8)
REFERENCE_BITS = 16
ROUNDS = 3
_BANDWIDTH_BYTES = 256 << 20  # far beyond any cache that one core can fill


@dataclass(frozen=True)
class Speed:
    """One width at one batch size.

    Attributes:
        bits: width, of a slice with a width for each layer the average; 16 is the full model in bfloat16.
        batch: sequences decoded together.
        decode_tokens_per_second: over all sequences, median of the rounds.
        prompt_tokens_per_second: of one prompt, median of the rounds.
        bytes_per_token: weights that one decoding step reads: codes, scales, output head, norms.
        bandwidth_share: of the machine's read bandwidth, measured in the same run, that decoding achieves.
        overhead_share: of a decoding step that is not spent in the products of the quantized layers: attention, norms,
            head, and the interpreter. None for the full model.
        resident_bytes: memory that weights take while they are served.
    """

    bits: float
    batch: int
    decode_tokens_per_second: float
    prompt_tokens_per_second: float
    bytes_per_token: int
    bandwidth_share: float
    overhead_share: float | None
    resident_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def measure_speed(
    path: str | Path,
    bits: Iterable[int] | int | None = None,
    *,
    batches: Sequence[int] = (1,),
    prompt: int = 512,
    new_tokens: int = 24,
    reference: str | Path | None = None,
    activations: Activations = "exact",
    head_bits: int | None = None,
    resident: bool = True,
    device: str | torch.device = "auto",
    progress: Progress | None = None,
) -> list[Speed]:
    """Time decoding and prompt reading of some widths and of the bfloat16 model.

    Everything runs in bfloat16. The widths take turns in every round, so that a busy moment of the machine hits all of
    them alike; medians are reported.

    Args:
        path: checkpoint directory.
        bits: widths; default 2,3,4,8, of an exported slice the one that it holds.
        batches: numbers of sequences decoded together.
        prompt: tokens of the prompt that is timed.
        new_tokens: decoding steps per round.
        reference: the full model; default the one that the checkpoint was made from, left out if it is gone.
        activations, head_bits, resident: see ``matgptq.load``. Packed slices are loaded one model for each width.
        device: where to run.
        progress: receives stages and notes.

    Raises:
        ConfigurationError: sizes below 1, or a prompt that does not fit the model's context.
    """
    progress = progress or Silent()
    checkpoint = open_checkpoint(path, slices=True)
    widths = check_widths(DEFAULT_WIDTHS if bits is None else bits)
    target = resolve_device(device)
    if prompt < 1 or new_tokens < 1 or not batches or min(batches) < 1:
        raise ConfigurationError("prompt, new_tokens and batches must be at least 1")
    progress.start("load the models", 1)
    load_width = partial(
        load, path, device=target, resident=resident, dtype="bfloat16", activations=activations, head_bits=head_bits
    )
    if checkpoint.settings.is_slice and bits is None:
        contestants = [_Contestant(checkpoint.average_bits(checkpoint.widths_held[0]), load_width())]
    elif resident:
        parent = load_width()
        contestants = [_Contestant(width, parent, width) for width in widths]
    else:
        contestants = [_Contestant(width, load_width(width), width) for width in widths]
    model = contestants[0].model
    longest = longest_window(model.config)
    if longest is not None and prompt + new_tokens > longest:
        raise ConfigurationError(f"{prompt} + {new_tokens} tokens do not fit the model's context of {longest}")
    full, _ = load_optional_reference(
        checkpoint, reference, "it is left out", progress, device=target, dtype=torch.bfloat16
    )
    if full is not None:
        contestants.append(_Contestant(REFERENCE_BITS, full))
    bandwidth = _read_bandwidth(target)

    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    tokens = torch.randint(0, vocabulary, (max(batches), prompt), generator=torch.Generator().manual_seed(0)).to(target)
    progress.start("measure", ROUNDS * len(contestants) * (len(batches) + 1))
    for _ in range(ROUNDS):
        for contestant in contestants:
            contestant.take_turn(tokens, batches, new_tokens, progress.advance)
    results = [contestant.result(batch, prompt, bandwidth) for contestant in contestants for batch in batches]
    return sorted(results, key=lambda result: (result.batch, result.bits))


@dataclass
class _Contestant:
    """A model at a width, and the seconds that its turns took.

    Attributes:
        bits: as reported.
        model: perhaps that of other contestants, too.
        width: to set before a turn; None leaves the model as it is.
        prompts: of reading the prompt, by round.
        steps: of decoding a token, by batch and round.
        products: of the products in that alone; none for the full model.
    """

    bits: float
    model: Any
    width: int | None = None
    prompts: list[float] = field(default_factory=list)
    steps: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    products: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def _ready(self) -> Any:
        if self.width is not None:
            self.model.set_bits(self.width)
        return self.model

    def take_turn(self, tokens: Tensor, batches: Sequence[int], new_tokens: int, tick: Callable[[], None]) -> None:
        """Read one prompt, decode at each batch size; ``tick`` is called after each of these."""
        model = self._ready()
        self.prompts.append(_prompt_seconds(model, tokens[:1]))
        tick()
        for batch in batches:
            # A short context: this is about weights, not about the cache of keys and values.
            self.steps[batch].append(_step_seconds(model, tokens[:batch, :8], new_tokens))
            if nested_layers(model):
                self.products[batch].append(_product_seconds(model, batch))
            tick()

    def result(self, batch: int, prompt: int, bandwidth: float) -> Speed:
        """Medians over the turns, for a prompt of so many tokens and a machine that reads so many bytes a second."""
        model = self._ready()
        step = statistics.median(self.steps[batch])
        size = _bytes_per_token(model)
        products = self.products[batch]
        return Speed(
            bits=self.bits,
            batch=batch,
            decode_tokens_per_second=batch / step,
            prompt_tokens_per_second=prompt / statistics.median(self.prompts),
            bytes_per_token=size,
            bandwidth_share=size / step / bandwidth,
            overhead_share=max(0.0, 1 - statistics.median(products) / step) if products else None,
            resident_bytes=_resident_bytes(model),
        )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def _prompt_seconds(model: Any, tokens: Tensor) -> float:
    _synchronize(tokens.device)
    started = time.perf_counter()
    model(input_ids=tokens, use_cache=False, logits_to_keep=1)
    _synchronize(tokens.device)
    return time.perf_counter() - started


@torch.inference_mode()
def _step_seconds(model: Any, context: Tensor, steps: int) -> float:
    """Median time of a decoding step."""
    from transformers import DynamicCache

    from matgptq.models.kv_cache import CACHE_ARGUMENT

    options = {CACHE_ARGUMENT: DynamicCache(config=model.config), "use_cache": True, "logits_to_keep": 1}
    token = model(input_ids=context, **options).logits[:, -1:].argmax(-1)
    seconds = []
    for _ in range(steps):
        _synchronize(context.device)
        started = time.perf_counter()
        logits = model(input_ids=token, **options).logits
        token = logits[:, -1:].argmax(-1)
        _synchronize(context.device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


@torch.inference_mode()
def _product_seconds(model: Any, batch: int) -> float:
    """Time of one step's products alone, in the order in which the model computes them."""
    products = _products(model, batch)
    seconds = []
    for _ in range(3 * ROUNDS):
        _synchronize(model.device)
        started = time.perf_counter()
        for product in products:
            product()
        _synchronize(model.device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _products(model: Any, batch: int) -> list[Callable[[], object]]:
    """One call for each product of a step; on a CPU prepared, for layers that share an input together."""
    groups: dict[int, list[NestedLinear]] = {}
    for layer in nested_layers(model).values():
        groups.setdefault(id(layer.shared_input or layer), []).append(layer)
    products: list[Callable[[], object]] = []
    for layers in groups.values():
        size, activations = layers[0].in_features, layers[0].activations
        inputs = torch.randn(batch, size, dtype=model.dtype, device=model.device)
        product = kernel_choice.Product("native", inputs.device.type, inputs.dtype, batch, activations)
        packed = all(isinstance(layer.packed, native.Weight) for layer in layers)
        joined = None
        if packed and kernel_choice.fuses(product):
            joined = dispatch.join([layer.operand for layer in layers], activations)
        products += [partial(layer, inputs) for layer in layers] if joined is None else [joined.bound(inputs)]
    return products


def _bytes_per_token(model: Any) -> int:
    """Bytes of weights that one step reads; of the embedding table only where the output head is tied to it."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    total: int = head.bytes_read if isinstance(head, DenseHead | PackedHead) else head.weight.nbytes
    for module in model.modules():
        if isinstance(module, NestedLinear):
            total += _layer_bytes(module)
        if module is not head:
            total += sum(tensor.nbytes for tensor in module.parameters(recurse=False) if tensor is not embedding)
    return total


def _layer_bytes(layer: NestedLinear) -> int:
    if layer.packed is not None:
        return layer.packed.bytes_read(layer.bits)
    return layer.codes.nbytes + layer.out_features * (layer.in_features // layer.group_size) * 2


def _resident_bytes(model: Any) -> int:
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
    total: int = sum(held.values())
    head = model.get_output_embeddings()
    if isinstance(head, DenseHead | PackedHead):
        total += head.bytes_added
    return total + sum(layer.packed.nbytes for layer in nested_layers(model).values() if layer.packed is not None)


def _read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a pure read reaches, with as many threads as PyTorch uses."""
    memory = torch.ones(_BANDWIDTH_BYTES // 4, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(ROUNDS):
        _synchronize(device)
        started = time.perf_counter()
        if device.type == "cpu" and native.available():
            native.read(memory)
        else:
            memory.sum()
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return memory.nbytes / statistics.median(seconds)
