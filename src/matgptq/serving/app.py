"""OpenAI's routes over the models of one checkpoint, answered by the handlers of ``transformers serve``.

Those read requests, apply chat templates, find calls of tools and write streams; what they get here is our models
instead of whatever a client names. Imported when a server starts: it needs FastAPI.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality

from matgptq.errors import ConfigurationError
from matgptq.serving.decoding_loop import DecodingLoop, TextRequest
from matgptq.serving.served_models import ServedModels, UnknownModelError
from matgptq.serving.usage import events_with_cached_tokens, with_cached_tokens

_SEED = "_matgptq_seed"  # where a request's generation config carries its own
_LOOK_AFTER_CLIENT = 0.5  # seconds
_CLIENT_GONE = 499  # as web servers log it


def make_app(models: ServedModels, parallel: int, cache_bytes: int = 0) -> Any:
    """The FastAPI application.

    Args:
        models: that are served.
        parallel: requests that are answered at once.
        cache_bytes: that may be kept of earlier texts, see ``DecodingLoop``.

    Routes: ``POST /v1/chat/completions``, ``/v1/completions``, ``/v1/responses``; ``GET /v1/models``, ``/health``. A
    request that names no model gets the one that answers to the checkpoint's own name.
    """
    app = FastAPI(title="matgptq")
    loop = DecodingLoop(parallel, cache_bytes)
    for path, kind in _HANDLERS.items():
        app.post(path)(_route(models, loop, kind))
    started = int(time.time())

    @app.get("/v1/models")
    def list_models() -> dict[str, Any]:
        owned = {"object": "model", "created": started, "owned_by": "matgptq"}
        return {"object": "list", "data": [{"id": name, **owned} for name in models.names]}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


class _Samples:
    """A temperature or top_p of a request is also the wish to sample, which transformers takes from the model alone.

    And a seed is the request's: transformers sets that of the process, in which others sample meanwhile.
    """

    def _build_generation_config(self, body: dict[str, Any], *others: Any, **keywords: Any) -> Any:
        seed = body.get("seed")
        unseeded = {key: value for key, value in body.items() if key != "seed"}
        generation = super()._build_generation_config(unseeded, *others, **keywords)  # type: ignore[misc]
        if seed is not None:
            if not -(2**63) <= int(seed) < 2**64:
                raise ConfigurationError(f"a seed has 64 bits, and is {seed}")
            setattr(generation, _SEED, int(seed))
        temperature = body.get("temperature")
        if temperature is not None and float(temperature) < 0:
            raise ConfigurationError(f"temperature must not be negative, and is {temperature}")
        if (temperature is not None and float(temperature) > 0) or (temperature is None and "top_p" in body):
            generation.do_sample = True
        return generation


class _Chat(_Samples, ChatCompletionHandler):  # type: ignore[misc]
    pass


class _Completion(_Samples, CompletionHandler):  # type: ignore[misc]
    pass


class _Response(_Samples, ResponseHandler):  # type: ignore[misc]
    pass


_HANDLERS = {"/v1/chat/completions": _Chat, "/v1/completions": _Completion, "/v1/responses": _Response}


def _route(models: ServedModels, loop: DecodingLoop, kind: type[Any]) -> Callable[[Request], Any]:
    """What answers a request with a handler of its own."""

    async def answer(request: Request) -> Any:
        decoding = _Decoding(loop)
        handler = kind(_Manager(models), _OneLoop(decoding))
        if not isinstance(handler, _Completion) and not models.tokenizer.chat_template:
            return _refusal(400, f"{models.name} has no chat template; ask /v1/completions")
        try:
            given = await request.json()
            if not isinstance(given, dict):
                raise ConfigurationError("the request must be a JSON object")
            # OpenAI's clients write null for what they leave out; of a response, transformers' default is a stream.
            present = {key: value for key, value in given.items() if value is not None}
            body = {"model": models.name, "stream": False} | present
            models.get(body["model"])
            answered = await _while_wanted(request, handler.handle_request(body, f"matgptq-{uuid.uuid4().hex}"))
        except UnknownModelError as error:
            return _refusal(404, error, "model_not_found")
        except HTTPException as error:
            return _refusal(error.status_code, error.detail)
        except KeyError as error:  # fields are looked up where they are needed
            return _refusal(400, f"the request lacks {error}")
        except (TypeError, ValueError, TemplateError) as error:
            return _refusal(400, error)
        if isinstance(answered, StreamingResponse):
            answered.body_iterator = _told(answered.body_iterator, decoding)
            if not isinstance(handler, _Response):
                answered.body_iterator = _ended(answered.body_iterator)
        elif isinstance(answered, JSONResponse):
            answered = JSONResponse(with_cached_tokens(json.loads(bytes(answered.body)), decoding.cached))
        return answered

    return answer


async def _while_wanted(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """What ``work`` gives, unless the client goes away before; then it is cancelled, and nobody reads the response."""
    task = asyncio.create_task(work)
    while not (await asyncio.wait([task], timeout=_LOOK_AFTER_CLIENT))[0]:
        if await request.is_disconnected():
            task.cancel()
            await asyncio.wait([task])
            return Response(status_code=_CLIENT_GONE)
    return task.result()


def _refusal(status: int, reason: object, code: str | None = None) -> JSONResponse:
    """An error in the form in which OpenAI's clients expect one."""
    error = {"message": str(reason), "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status)


async def _told(stream: Any, decoding: _Decoding) -> AsyncIterator[Any]:
    """A stream whose usage tells what was read before."""
    async for part in stream:
        yield events_with_cached_tokens(part, decoding.cached)


async def _ended(stream: Any) -> AsyncIterator[Any]:
    """What OpenAI's streams end with and those of transformers do not; some clients wait for it."""
    async for part in stream:
        yield part
    yield "data: [DONE]\n\n"


class _Manager:
    """What the handlers ask of transformers' ``ModelManager``."""

    force_model = None

    def __init__(self, models: ServedModels) -> None:
        self._models = models

    def process_model_name(self, name: str) -> str:
        return name

    def load_model_and_processor(self, name: str, **_: Any) -> tuple[Any, Any]:
        return self._models.get(name), self._models.tokenizer

    def get_model_modality(self, *_: Any, **__: Any) -> Modality:
        return Modality.LLM


class _OneLoop(GenerationState):  # type: ignore[misc]
    """One thread for all widths: they multiply by the same weights, and would take turns on the processors anyway."""

    def __init__(self, decoding: _Decoding) -> None:
        super().__init__()
        self._manager = decoding

    def get_manager(self, *_: Any, **__: Any) -> GenerateManager:
        return self._manager


class _Decoding(GenerateManager):  # type: ignore[misc]
    """Hands a request to the loop; refuses prompts that a model has no positions for, and ends texts where they end."""

    def __init__(self, loop: DecodingLoop) -> None:
        self._loop = loop
        self._looped: _Looped | None = None

    @property
    def cached(self) -> int:
        """Tokens of the request's prompt that had been read before."""
        return self._looped.cached if self._looped is not None else 0

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **others: Any) -> Any:
        return super().generate_streaming(
            self._fitted(model, inputs, gen_config), processor, inputs, gen_config, **others
        )

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **others: Any
    ) -> Any:
        looped = self._fitted(model, inputs, gen_config)
        try:
            return await super().generate_non_streaming(looped, processor, inputs, gen_config, **others)
        except asyncio.CancelledError:
            looped.withdrawn.set()
            raise

    def _fitted(self, model: Any, inputs: Any, generation: Any) -> _Looped:
        _fit(model, inputs, generation)
        self._looped = _Looped(model, self._loop)
        return self._looped

    def submit(self, call: Callable[..., Any], *given: Any, **keywords: Any) -> Future[Any]:
        """Call something that waits for the loop, in a thread that the end of the process does not wait for."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                future.set_result(call(*given, **keywords))
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    def async_submit(self, call: Callable[..., Any], *given: Any, **keywords: Any) -> asyncio.Future[Any]:
        return asyncio.wrap_future(self.submit(call, *given, **keywords))


class _Looped:
    """A model whose ``generate`` is the loop's.

    Attributes:
        withdrawn: set it to end what was asked for.
    """

    def __init__(self, model: Any, loop: DecodingLoop) -> None:
        self._model, self._loop = model, loop
        self._request: TextRequest | None = None
        self.withdrawn = threading.Event()

    @property
    def cached(self) -> int:
        """See ``TextRequest``."""
        return self._request.cached if self._request is not None else 0

    def generate(self, streamer: Any = None, **arguments: Any) -> Any:
        seed = getattr(arguments["generation_config"], _SEED, None)
        self._request = TextRequest(self._model, arguments, streamer, seed, self.withdrawn)
        self._loop.submit(self._request)
        return self._request.answer.result()


def _fit(model: Any, inputs: Any, generation: Any) -> None:
    """Bound the new tokens by what the context has room for; raises ``ConfigurationError`` if that is none."""
    prompt = inputs["input_ids"].shape[-1]
    if prompt == 0:
        raise ConfigurationError("the prompt is empty, and the tokenizer has no token that a text begins with")
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        return
    if prompt >= context:
        raise ConfigurationError(f"the prompt has {prompt} tokens, the model's context {context}")
    wanted = generation.max_new_tokens
    generation.max_new_tokens = context - prompt if wanted is None else min(wanted, context - prompt)
