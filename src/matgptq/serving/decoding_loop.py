"""The thread that answers requests: several at once, a token of each in one step.

transformers' ``generate`` prepares a request (its processors of logits, its criteria to stop, its cache) and hands it
over as soon as the first token is to be computed. From there on sequences of one model go through it together,
each with a cache of its own. What cannot be decoded so, beams or models off the short way, has the thread to itself.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from matgptq.block_stack import next_logits, takes_groups
from matgptq.kv_cache import CACHE_ARGUMENT


@dataclass
class TextRequest:
    """One text to be generated.

    Attributes:
        model: of ``matgptq.load``.
        arguments: of its ``generate``, without a streamer.
        streamer: is given the prompt and each token, as ``generate`` gives them.
        seed: of the sampling; default: by chance.
        answer: the ids of prompt and text ``[1, tokens]``, or what went wrong.
    """

    model: Any
    arguments: dict[str, Any]
    streamer: Any = None
    seed: int | None = None
    answer: Future[Tensor] = field(default_factory=Future)


class DecodingLoop:
    """Answers requests in a thread of its own, which ends with the process.

    Args:
        parallel: requests that are answered at once, 1 or more; others wait.
    """

    def __init__(self, parallel: int) -> None:
        self._parallel = parallel
        self._waiting: queue.Queue[TextRequest] = queue.Queue()
        threading.Thread(target=self._run, daemon=True, name="matgptq-decoding").start()

    def submit(self, request: TextRequest) -> None:
        """Queue a request."""
        self._waiting.put(request)

    def _run(self) -> None:
        texts: list[_Text] = []
        while True:
            # One at a time, so that those at work wait for one prompt only.
            if len(texts) < self._parallel and (not texts or not self._waiting.empty()):
                texts += _begin(self._waiting.get())
            for model in {id(text.request.model): text.request.model for text in texts}.values():
                _step(model, [text for text in texts if text.request.model is model])
            texts = [text for text in texts if not text.ended]


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
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        if self.request.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.request.seed)

    def read_prompt(self) -> None:
        output = self.request.model(
            input_ids=self.ids, **{CACHE_ARGUMENT: self.cache}, use_cache=True, logits_to_keep=1
        )
        self._tell(self.ids)
        self.take(output.logits[:, -1])

    def take(self, logits: Tensor) -> None:
        """Choose the next token by logits ``[1, vocabulary]``, as ``generate`` does, and end the text where it ends."""
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

    def fail(self, error: Exception) -> None:
        self.ended = True
        self.request.answer.set_exception(error)

    def _tell(self, tokens: Tensor) -> None:
        if self.request.streamer is not None:
            self.request.streamer.put(tokens.cpu())


def _begin(request: TextRequest) -> list[_Text]:
    """Read a prompt; empty if the request is answered by then, or cannot be."""
    model, arguments = request.model, request.arguments
    try:
        if not takes_groups(model) or not _is_plain(arguments["generation_config"], model.generation_config):
            if request.seed is not None:
                torch.manual_seed(request.seed)  # texts that are decoded together have generators of their own
            request.answer.set_result(model.generate(**arguments, streamer=request.streamer))
            return []
        text: _Text = model.generate(**_with_stop_strings(arguments), custom_generate=_prepare(request))
        with torch.no_grad():
            text.read_prompt()
    except Exception as error:  # whatever it is, others are to be answered
        request.answer.set_exception(error)
        return []
    return [] if text.ended else [text]


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
    from transformers import StoppingCriteriaList, StopStringCriteria

    generation = arguments["generation_config"]
    if not generation.stop_strings:
        return arguments
    criterion = StopStringCriteria(arguments["tokenizer"], generation.stop_strings)
    without = copy.copy(generation)
    without.stop_strings = None
    return {**arguments, "generation_config": without, "stopping_criteria": StoppingCriteriaList([criterion])}


def _prepare(request: TextRequest) -> Callable[..., _Text]:
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
            text.fail(error)
        return
    for number, text in enumerate(texts):
        try:
            text.take(logits[number : number + 1])
        except Exception as error:  # a client that has gone, say
            text.fail(error)
