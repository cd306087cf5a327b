"""The thread that answers requests: several at once, a token of each in one step.

transformers' ``generate`` prepares a request (its processors of logits, its criteria to stop, its cache) and hands it
over as soon as its prompt is to be read. One prompt is read at a time, from where it differs from what was read before,
and in pieces while texts are being generated, a step of theirs between two pieces. Sequences of one model go through
it together, each with a cache of its own. What cannot be decoded so, beams or models off the short way, has the thread
to itself.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from matgptq.inference.block_stack import next_logits, takes_groups
from matgptq.models.kv_cache import CACHE_ARGUMENT
from matgptq.serving.prompt_cache import PromptCache, ReadText


@dataclass
class TextRequest:
    """One text to be generated.

    Attributes:
        model: of ``matgptq.load``.
        arguments: of its ``generate``, without a streamer.
        streamer: is given the prompt and each token, as ``generate`` gives them.
        seed: of the sampling; default: by chance.
        withdrawn: set by whoever asked and does not wait for the answer any more.
        cached: tokens of the prompt that had been read for other texts; known as soon as it is read.
        answer: the ids of prompt and text ``[1, tokens]``, or what went wrong.
    """

    model: Any
    arguments: dict[str, Any]
    streamer: Any = None
    seed: int | None = None
    withdrawn: threading.Event = field(default_factory=threading.Event)
    cached: int = 0
    answer: Future[Tensor] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.answer.set_running_or_notify_cancel()  # it is given even if whoever asked waits no more

    def check_wanted(self) -> None:
        """Raise ``WithdrawnError`` if it was withdrawn."""
        if self.withdrawn.is_set():
            raise WithdrawnError


class WithdrawnError(Exception):
    """A request was withdrawn before it was answered."""


class DecodingLoop:
    """Answers requests in a thread of its own, which ends with the process or with ``close``.

    Args:
        parallel: requests that are answered at once, 1 or more; others wait.
        cache_bytes: of keys and values that are kept of texts that have ended, for prompts that begin like them.
        piece: tokens of a prompt that others wait for at a time.
    """

    def __init__(self, parallel: int, cache_bytes: int = 0, piece: int = 512) -> None:
        self._parallel, self._piece = parallel, piece
        self._read = PromptCache(cache_bytes)
        self._waiting: queue.Queue[TextRequest | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True, name="matgptq-decoding")
        self._thread.start()

    def submit(self, request: TextRequest) -> None:
        """Queue a request."""
        self._waiting.put(request)

    def close(self) -> None:
        """Answer what was submitted so far, then end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        texts: list[_Text] = []
        closed = False
        while texts or not closed:
            reading = [text for text in texts if text.is_reading]
            free = not closed and not reading and len(texts) < self._parallel
            if free and (not texts or not self._waiting.empty()):
                request = self._waiting.get()
                closed = request is None
                reading = [] if request is None else self._begin(request, texts)
                texts += reading
            for text in reading:
                text.read(None if len(texts) == 1 else self._piece)
            ready = [text for text in texts if not (text.ended or text.is_reading)]
            for model in {id(text.request.model): text.request.model for text in ready}.values():
                _step(model, [text for text in ready if text.request.model is model])
            for text in texts:
                if text.ended and text.is_whole:
                    self._read.keep(text.so_far())
            texts = [text for text in texts if not text.ended]

    def _begin(self, request: TextRequest, texts: Iterable[_Text]) -> list[_Text]:
        """A text whose prompt is to be read; empty if the request is answered by then, or cannot be."""
        try:
            text = _prepare(request)
            if text is None:
                return []
            held = self._read.begin(request.model, text.ids[0], (each.so_far() for each in texts))
        except Exception as error:  # whatever it is, others are to be answered
            request.answer.set_exception(error)
            return []
        if held is not None:
            text.cache = held
            request.cached = int(held.get_seq_length())
        return [text]


@dataclass
class _Text:
    """A text that is being generated, after ``generate`` has prepared it."""

    request: TextRequest
    ids: Tensor  # [1, tokens], the prompt's first
    cache: Any
    processors: Any
    criteria: Any
    samples: bool
    ended: bool = False
    is_whole: bool = True  # no step broke off, so that the cache holds what it says it does
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self._prompt = self.ids.shape[1]
        if self.request.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.request.seed)

    @property
    def is_reading(self) -> bool:
        """Whether some of its prompt is still to be read."""
        return int(self.cache.get_seq_length()) < self._prompt

    def so_far(self) -> ReadText:
        """What has been read of it."""
        return ReadText(self.request.model, self.ids[0, : self.cache.get_seq_length()], self.cache)

    def read(self, most: int | None) -> None:
        """Read the prompt on, by no more tokens than that; behind its last one comes the first of the text."""
        first = self.cache.get_seq_length()
        last = self._prompt if most is None else min(first + most, self._prompt)
        try:
            with torch.no_grad():
                output = self.request.model(
                    input_ids=self.ids[:, first:last], **{CACHE_ARGUMENT: self.cache}, use_cache=True, logits_to_keep=1
                )
        except Exception as error:  # whatever it is, others are to be answered
            self.break_off(error)
            return
        if not self.is_reading:
            self.take(output.logits[:, -1])
        elif self.request.withdrawn.is_set():
            self._fail(WithdrawnError())

    def take(self, logits: Tensor) -> None:
        """Choose the next token by logits ``[1, vocabulary]``, as ``generate`` does, and end the text where it ends."""
        try:
            self.request.check_wanted()
            if self.ids.shape[1] == self._prompt:
                self._tell(self.ids)
            scores = self.processors(self.ids, logits.to(torch.float32, copy=True))
            if self.samples:
                shares = torch.softmax(scores, -1).cpu()
                token = torch.multinomial(shares, 1, generator=self.generator).to(self.ids.device)
            else:
                token = scores.argmax(-1, keepdim=True)
            self.ids = torch.cat([self.ids, token], 1)
            self._tell(token[0])
            if bool(self.criteria(self.ids, scores).all()):
                self.ended = True
                if self.request.streamer is not None:
                    self.request.streamer.end()
                self.request.answer.set_result(self.ids)
        except Exception as error:  # a client that has gone, say
            self._fail(error)

    def break_off(self, error: Exception) -> None:
        """End it since the model failed."""
        self.is_whole = False
        self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.ended = True
        self.request.answer.set_exception(error)

    def _tell(self, tokens: Tensor) -> None:
        if self.request.streamer is not None:
            self.request.streamer.put(tokens.cpu())


class _Withdrawn(StoppingCriteria):  # type: ignore[misc]
    """Ends what ``generate`` does alone once nobody waits for it."""

    def __init__(self, request: TextRequest) -> None:
        self._request = request

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self._request.withdrawn.is_set(), device=input_ids.device)


def _prepare(request: TextRequest) -> _Text | None:
    """A text whose prompt is to be read; None if ``generate`` has answered the request alone."""
    model, arguments = request.model, request.arguments
    request.check_wanted()
    if takes_groups(model) and _is_plain(arguments["generation_config"], model.generation_config):
        text: _Text = model.generate(**_with_stop_strings(arguments), custom_generate=_keeper(request))
        return text
    if request.seed is not None:
        torch.manual_seed(request.seed)  # texts that are decoded together have generators of their own
    criteria = StoppingCriteriaList([_Withdrawn(request)])
    request.answer.set_result(model.generate(**arguments, streamer=request.streamer, stopping_criteria=criteria))
    return None


def _is_plain(generation: Any, defaults: Any) -> bool:
    """Whether a text is one token after the other, of one sequence, in a cache that grows."""
    return (
        generation.get_generation_mode() in ("greedy_search", "sample")
        and (generation.num_return_sequences or 1) == 1
        and generation.cache_implementation in (None, "dynamic")
        and generation.use_cache is not False
        and generation.prefill_chunk_size is None
        and defaults.stop_strings is None  # see below
        and not generation.return_dict_in_generate
    )


def _with_stop_strings(arguments: dict[str, Any]) -> dict[str, Any]:
    """Strings that end a text as a criterion: ``generate`` gives a tokenizer to its own decoding only."""
    generation = arguments["generation_config"]
    if not generation.stop_strings:
        return arguments
    criterion = StopStringCriteria(arguments["tokenizer"], generation.stop_strings)
    without = copy.copy(generation)
    without.stop_strings = None
    return {**arguments, "generation_config": without, "stopping_criteria": StoppingCriteriaList([criterion])}


def _keeper(request: TextRequest) -> Callable[..., _Text]:
    """What ``generate`` calls in place of its own decoding: it keeps what was prepared."""

    def keep(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **options: Any,
    ) -> _Text:
        cache = options[CACHE_ARGUMENT]
        return _Text(request, input_ids, cache, logits_processor, stopping_criteria, bool(generation_config.do_sample))

    return keep


def _step(model: Any, texts: list[_Text]) -> None:
    """One more token of each text."""
    try:
        with torch.no_grad():
            tokens = torch.cat([text.ids[0, -1:] for text in texts])
            logits = next_logits(model, tokens, [text.cache for text in texts])
    except Exception as error:
        for text in texts:
            text.break_off(error)
        return
    for number, text in enumerate(texts):
        text.take(logits[number : number + 1])
