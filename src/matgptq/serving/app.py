"""OpenAI's routes over the models of one checkpoint, answered by the handlers of ``transformers serve``.

Those read requests, apply chat templates, find calls of tools and write streams; what they get here is our models
instead of whatever a client names. Imported when a server starts: it needs FastAPI.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import CancelOnDisconnect, GenerationState

from matgptq.errors import ConfigurationError
from matgptq.serving.decoding_loop import DecodingLoop
from matgptq.serving.engine import SEED, Engine
from matgptq.serving.served_models import ServedModels, UnknownModelError
from matgptq.serving.usage import events_with_cached_tokens, with_cached_tokens


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
    app.add_middleware(CancelOnDisconnect)
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


class _Ours:
    """What our routes do otherwise than those of ``transformers serve``.

    A temperature or top_p of a request is also the wish to sample, which transformers takes from the model alone; and
    prompts are held against the context in words that do not name options of theirs.
    """

    def _build_generation_kwargs(self, body: dict[str, Any], *others: Any) -> dict[str, Any]:
        settings: dict[str, Any] = super()._build_generation_kwargs(body, *others)  # type: ignore[misc]
        seed = settings.get(SEED)
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise ConfigurationError(f"a seed has 64 bits, and is {seed}")
        temperature = body.get("temperature")
        if temperature is not None and float(temperature) < 0:
            raise ConfigurationError(f"temperature must not be negative, and is {temperature}")
        if (temperature is not None and float(temperature) > 0) or (temperature is None and "top_p" in body):
            settings["do_sample"] = True
        return settings

    def _check_prompt_length(self, engine: Engine, inputs: Any) -> None:
        engine.check_prompt(inputs)


class _Chat(_Ours, ChatCompletionHandler):  # type: ignore[misc]
    pass


class _Completion(_Ours, CompletionHandler):  # type: ignore[misc]
    pass


class _Response(_Ours, ResponseHandler):  # type: ignore[misc]
    pass


_HANDLERS = {"/v1/chat/completions": _Chat, "/v1/completions": _Completion, "/v1/responses": _Response}


def _route(models: ServedModels, loop: DecodingLoop, kind: type[Any]) -> Callable[[Request], Any]:
    """What answers a request with a handler of its own."""

    async def answer(request: Request) -> Any:
        manager = _Manager(models, loop)
        handler = kind(manager, GenerationState())
        if not isinstance(handler, _Completion) and not models.tokenizer.chat_template:
            return _refusal(400, f"{models.name} has no chat template; ask /v1/completions")
        try:
            given = await request.json()
            if not isinstance(given, dict):
                raise ConfigurationError("the request must be a JSON object")
            # OpenAI's clients write null for what they leave out; of a response, transformers' default is a stream.
            present = {key: value for key, value in given.items() if value is not None}
            body = {"model": models.name, "stream": False} | present
            answered = await handler.handle_request(body, f"matgptq-{uuid.uuid4().hex}")
        except UnknownModelError as error:
            return _refusal(404, error, "model_not_found")
        except HTTPException as error:
            return _refusal(error.status_code, error.detail)
        except KeyError as error:  # fields are looked up where they are needed
            return _refusal(400, f"the request lacks {error}")
        except (TypeError, ValueError, TemplateError) as error:
            return _refusal(400, error)
        if isinstance(answered, StreamingResponse):
            answered.body_iterator = _told(answered.body_iterator, manager.engine)
            if not isinstance(handler, _Response):
                answered.body_iterator = _ended(answered.body_iterator)
        elif isinstance(answered, JSONResponse):
            answered = JSONResponse(with_cached_tokens(json.loads(bytes(answered.body)), manager.engine.cached))
        return answered

    return answer


def _refusal(status: int, reason: object, code: str | None = None) -> JSONResponse:
    """An error in the form in which OpenAI's clients expect one."""
    error = {"message": str(reason), "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status)


async def _told(stream: Any, engine: Engine) -> AsyncIterator[Any]:
    """A stream whose usage tells what was read before."""
    async for part in stream:
        yield events_with_cached_tokens(part, engine.cached)


async def _ended(stream: Any) -> AsyncIterator[Any]:
    """What OpenAI's streams end with and those of transformers do not; some clients wait for it."""
    async for part in stream:
        yield part
    yield "data: [DONE]\n\n"


class _Manager:
    """What a handler asks of transformers' ``ModelManager``.

    Attributes:
        engine: that answers the request, once the handler has asked for it.
    """

    engine: Engine

    def __init__(self, models: ServedModels, loop: DecodingLoop) -> None:
        self._models, self._loop = models, loop

    def get_engine(self, name: str) -> Engine:
        self.engine = Engine(self._models.get(name), self._models.tokenizer, name, self._loop)
        return self.engine
