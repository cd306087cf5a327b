"""Text that a model writes itself: the data set ``self``, sampled once and kept in a cache."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from matgptq.core.finiteness import all_finite
from matgptq.errors import CalibrationError, ConfigurationError
from matgptq.files import cache
from matgptq.files.atomic import replacing
from matgptq.machine.devices import multiplies_bfloat16
from matgptq.machine.workers import one_thread_each
from matgptq.models.model_config import longest_window
from matgptq.progress import Counted
from matgptq.text.packing import check_counts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


# Sampled side by side, if nothing else is said, and tokens in each.
BATCH_SIZE, DOCUMENT_TOKENS = 32, 512
# Tokens of a window where a CPU samples it, if nothing else is said: minutes for a small model.
CPU_SELF_SEQLEN = 512
# Part of the cache key: raise it when the same arguments would generate other tokens.
_GENERATION_VERSION = 3


def generate_windows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    document_tokens: int = DOCUMENT_TOKENS,
    batch_size: int = BATCH_SIZE,
    temperature: float = 1.0,
    cache_dir: str | Path | None = None,
    progress: Counted | None = None,
) -> Tensor:
    """Sample token windows from the model itself.

    Documents of ``document_tokens`` tokens are sampled side by side and packed into windows; many short
    ones cost a fraction of few long ones. A document starts with BOS if the tokenizer or the model's
    config has one, else with a random token that is not special. EOS does not stop it: the model goes on with what
    it takes to come next. A float32 model writes in bfloat16 on a CPU that multiplies it. The result is cached, keyed
    by the model's weights and every argument that changes it.

    Args:
        model: a causal LM of transformers; it is run in eval mode and left in the mode that it had.
        tokenizer: the model's tokenizer.
        nsamples: number of windows.
        seqlen: tokens in a window.
        seed: of the sampling; the global generators are neither used nor changed.
        document_tokens: tokens in a document, cut to ``seqlen``; at most the positions that the model has.
        batch_size: documents sampled at a time; memory for the keys and values of batch_size * document_tokens
            tokens is needed. It changes the tokens drawn, and so is part of the cache key.
        temperature: of the sampling, positive.
        cache_dir: directory of the cache; by default ``$MATGPTQ_CACHE/self``, else ``$XDG_CACHE_HOME/matgptq/self``,
            else ``~/.cache/matgptq/self``. A cache that cannot be read or written is a warning, not an error.
        progress: called with (tokens done, tokens in all).

    Returns:
        ``torch.int64`` ``[nsamples, seqlen]`` on the CPU.

    Raises:
        CalibrationError: a document exceeds the model's positions, or the model's logits are not finite.
        ConfigurationError: an option is out of range.
    """
    check_counts(nsamples, seqlen)
    if document_tokens < 1:
        raise ConfigurationError(f"document_tokens must be at least 1, not {document_tokens}")
    if batch_size < 1:
        raise ConfigurationError(f"batch_size must be at least 1, not {batch_size}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigurationError(f"temperature must be positive, not {temperature}")
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    positions = longest_window(config)
    length = min(document_tokens, seqlen)
    if positions is not None and length > positions:
        raise CalibrationError(
            f"the model has {positions} positions and cannot write documents of {length} tokens; "
            "name a text instead of 'self', or a shorter --seqlen"
        )
    documents = math.ceil(nsamples * seqlen / length)

    size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    # Rows beyond the tokenizer pad the embedding to a round size; no text contains them.
    known = min(size, len(tokenizer))
    first = _first_tokens(tokenizer, config, known)
    options = {
        "version": _GENERATION_VERSION,
        "nsamples": nsamples,
        "seqlen": seqlen,
        "seed": seed,
        "length": length,
        "batch_size": min(batch_size, documents),
        "temperature": temperature,
        "known": known,
        "bfloat16": writes_in_bfloat16(model),
        "first": hashlib.sha256(repr(first).encode()).hexdigest(),
    }
    key = hashlib.sha256(json.dumps([model_fingerprint(model), options], sort_keys=True).encode()).hexdigest()
    directory = _default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    path = directory / f"{key[:40]}.safetensors"
    cached = _read_cache(path, key, nsamples, seqlen, size)
    if cached is not None:
        if progress is not None:
            progress(documents * length, documents * length)
        return cached

    sampler = _Sampler(temperature, known)
    was_training = model.training
    model.eval()
    try:
        with _in_bfloat16(model):
            texts = _generate(model, sampler, first, documents, length, seed, batch_size, progress)
    finally:
        model.train(was_training)
    tokens = texts.flatten()[: nsamples * seqlen].reshape(nsamples, seqlen)
    _write_cache(path, key, tokens)
    return tokens


def _first_tokens(tokenizer: PreTrainedTokenizerBase, config: Any, known: int) -> list[int]:
    """Tokens that a document may start with: BOS alone, or every token that is not special."""
    for bos in (tokenizer.bos_token_id, getattr(config, "bos_token_id", None)):
        if isinstance(bos, int) and 0 <= bos < known:
            return [bos]
    special = set(tokenizer.all_special_ids)
    special.update(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    ordinary = [index for index in range(known) if index not in special]
    if not ordinary:
        raise CalibrationError("the tokenizer has special tokens only, so no text can be generated; name a text")
    return ordinary


def writes_in_bfloat16(model: Any) -> bool:
    """Whether a model writes with its parameters in bfloat16: on a CPU that takes 60 % of the time, and what is drawn
    at random differs no more than between two machines. A model of ours is served as it is.
    """
    device = model.get_input_embeddings().weight.device
    kept = (getattr(model, name, None) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    return (
        device.type in ("cpu", "meta")
        and model.dtype == torch.float32
        and multiplies_bfloat16(torch.device("cpu"))
        and not any(kept)
        and not hasattr(model, "set_bits")
    )


@contextmanager
def _in_bfloat16(model: nn.Module) -> Iterator[None]:
    """Parameters in bfloat16 if the model writes so, and afterwards what they were.

    Those that bfloat16 does not hold are kept aside. Most models are stored in it, and take less memory meanwhile.
    """
    kept: list[tuple[nn.Parameter, Tensor | None]] = []
    try:
        if writes_in_bfloat16(model):
            for parameter in (each for each in model.parameters() if each.dtype == torch.float32):
                wide, narrow = parameter.data, parameter.data.to(torch.bfloat16)
                kept.append((parameter, None if torch.equal(narrow.float(), wide) else wide))
                parameter.data = narrow
        yield
    finally:
        for parameter, original in kept:
            parameter.data = parameter.data.float() if original is None else original


@dataclass(frozen=True)
class _Sampler:
    """How the next token is drawn; fields as in ``generate_windows``. Ids from ``known`` on are never drawn."""

    temperature: float
    known: int

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Draw one token for each row of ``logits`` [batch, vocabulary]; ``torch.int64`` [batch, 1]."""
        scores = logits[:, : self.known].float() / self.temperature
        probabilities = scores.softmax(-1)
        # Inversion, because torch.multinomial draws a number for every token of the vocabulary: 20 times as long.
        cumulative = probabilities.cumsum(-1)
        total = cumulative[:, -1:]
        if not all_finite(total):
            raise CalibrationError(
                "the model's logits are not finite, so it cannot generate text; "
                "check the model and its dtype, or name a text instead of 'self'"
            )
        uniform = torch.rand(total.shape, generator=generator, device=total.device)
        # A hair below 1, or rounding could carry the product up to the total, which is past the last token.
        return torch.searchsorted(cumulative, uniform * (1 - 2**-20) * total, right=True)


def _generate(
    model: nn.Module,
    sampler: _Sampler,
    first: list[int],
    documents: int,
    length: int,
    seed: int,
    batch_size: int,
    progress: Counted | None,
) -> Tensor:
    """Sample ``documents`` sequences; ``torch.int64`` ``[documents, length]`` on the CPU."""
    from matgptq.models.kv_cache import CACHE_ARGUMENT

    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    chooser = torch.Generator().manual_seed(seed)
    starts = torch.tensor(first)[torch.randint(len(first), (documents,), generator=chooser)]
    tokens = torch.empty(documents, length, dtype=torch.int64, device=device)
    tokens[:, 0] = starts.to(device)
    done, lock = 0, threading.Lock()

    def report(count: int) -> None:
        nonlocal done
        if progress is not None:
            with lock:
                done += count
                progress(done, documents * length)

    @torch.no_grad()
    def write(numbered: tuple[int, Tensor]) -> None:
        number, batch = numbered
        # Each batch has a generator of its own, so that it does not matter which are written side by side.
        generator = torch.Generator(device).manual_seed(seed + 1_000_003 * number)
        cache = _growing_cache(model.config, length)
        for position in range(1, length):
            output = model(input_ids=batch[:, position - 1 : position], **{CACHE_ARGUMENT: cache}, use_cache=True)
            batch[:, position : position + 1] = sampler.draw(output.logits[:, -1].to(device), generator)
            report(len(batch))
        report(len(batch))

    with one_thread_each(device) as workers:
        # Views [at most batch_size, length], filled in place.
        workers.run(write, enumerate(torch.split(tokens, batch_size)))
    return tokens.cpu()


def _growing_cache(config: Any, capacity: int) -> Any:
    """A ``DynamicCache`` whose full-attention layers write into room for ``capacity`` tokens reserved beforehand.

    The layers of transformers concatenate, which copies the whole cache for every token.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class ReservedLayer(DynamicLayer):  # type: ignore[misc]
        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            super().lazy_initialization(key_states, value_states)
            self.room = [
                states.new_empty(*states.shape[:-2], capacity, states.shape[-1])
                for states in (key_states, value_states)
            ]

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            start = self.get_seq_length()
            stop = start + key_states.shape[-2]
            self.room[0][..., start:stop, :] = key_states
            self.room[1][..., start:stop, :] = value_states
            self.keys, self.values = (room[..., :stop, :] for room in self.room)
            return self.keys, self.values

    cache = DynamicCache(config=config)
    # Other kinds of layer (sliding windows, linear attention) stay as they are.
    cache.layers = [ReservedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def model_fingerprint(model: nn.Module) -> str:
    """A hash of a model's config and weights that does not depend on where it was loaded from.

    Of every parameter it takes name, shape, dtype and up to 64 elements spread over it, so that it costs next to
    nothing. Training or quantizing a model changes practically every element, and so the fingerprint.
    """
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    for moves in ("_name_or_path", "_commit_hash", "transformers_version"):
        config.pop(moves, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype};".encode())
        flat = parameter.detach().reshape(-1)
        if flat.numel() and flat.device.type != "meta":
            index = torch.arange(64, device=flat.device) * (flat.numel() - 1) // 63
            digest.update(flat[index].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _default_cache_dir() -> Path:
    return cache.cache_dir() / "self"


def _read_cache(path: Path, key: str, nsamples: int, seqlen: int, vocabulary: int) -> Tensor | None:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            matches = (file.metadata() or {}).get("key") == key
            tokens: Tensor = file.get_tensor("tokens")
    except (SafetensorError, OSError, ValueError) as error:
        logger.warning("%s is damaged (%s); generating the text again", path, error)
        return None
    sound = matches and tokens.dtype == torch.int64 and tuple(tokens.shape) == (nsamples, seqlen)
    if not sound or int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        logger.warning("%s does not hold the text that its name says; generating it again", path)
        return None
    return tokens


def _write_cache(path: Path, key: str, tokens: Tensor) -> None:
    from safetensors.torch import save

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=False) as beside:
            beside.write_bytes(save({"tokens": tokens.contiguous()}, metadata={"key": key}))
    except OSError as error:
        logger.warning("generated text cannot be kept in %s (%s); it will be generated again next time", path, error)
