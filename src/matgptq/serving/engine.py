"""A request to one of our models, in the form in which the handlers of ``transformers serve`` make it.

Theirs is sent to a process that has the model; this one is handed to the loop that decodes in a thread beside them.
"""

from __future__ import annotations

import asyncio
import copy
from typing import Any

from torch import Tensor
from transformers.cli.serving.model_manager import EngineClient
from transformers.cli.serving.utils import Modality, prompt_length
from transformers.generation.streamers import BaseStreamer

from matgptq.errors import ConfigurationError
from matgptq.serving.decoding_loop import DecodingLoop, TextRequest

SEED = "seed"  # among a request's settings, beside those of ``generate``


class Engine(EngineClient):  # type: ignore[misc]
    """Answers one request.

    Args:
        model: that answers.
        tokenizer: of the same checkpoint.
        name: by which the client asked for the model.
        loop: that decodes.
    """

    modality = Modality.LLM

    def __init__(self, model: Any, tokenizer: Any, name: str, loop: DecodingLoop) -> None:
        super().__init__(name, _Loader(model, tokenizer))
        self._model, self._decoding = model, loop
        self._request: TextRequest | None = None

    @property
    def cached(self) -> int:
        """Tokens of the prompt that had been read before, see ``TextRequest``."""
        return self._request.cached if self._request is not None else 0

    def check_prompt(self, inputs: Any) -> None:
        """Refuse a prompt that no text can follow; raises ``ConfigurationError``."""
        tokens = prompt_length(inputs)
        if tokens == 0:
            raise ConfigurationError("the prompt is empty, and the tokenizer has no token that a text begins with")
        if self._context is not None and tokens >= self._context:
            raise ConfigurationError(f"the prompt has {tokens} tokens, the model's context {self._context}")

    def generate_streaming(self, inputs: Any, generation_kwargs: dict[str, Any], **others: Any) -> Any:
        # Here and not when the text is asked for: what cannot be is refused before the first word of a stream.
        self._request = self._prepare(inputs, generation_kwargs)
        return super().generate_streaming(inputs, generation_kwargs, **others)

    async def generate_non_streaming(self, inputs: Any, generation_kwargs: dict[str, Any]) -> Any:
        self._request = self._prepare(inputs, generation_kwargs)
        return await super().generate_non_streaming(inputs, generation_kwargs)

    @property
    def _context(self) -> int | None:
        found: int | None = getattr(self.model_config, "max_position_embeddings", None)
        return found

    def _prepare(self, inputs: Any, settings: dict[str, Any]) -> TextRequest:
        """The text that is wanted; bounds the settings' new tokens, which tell why a text ended, by the context."""
        if self._context is not None:
            room = self._context - prompt_length(inputs)
            wanted = settings.get("max_new_tokens")
            settings["max_new_tokens"] = room if wanted is None else min(wanted, room)
        generation = copy.deepcopy(self.generation_config)
        changed = {
            name: value
            for name, value in settings.items()
            if name != SEED and value is not None and getattr(generation, name, None) != value
        }
        if unknown := generation.update(**changed):
            raise ConfigurationError(f"there are no settings of a generation called {', '.join(sorted(unknown))}")
        arguments = {**inputs, "generation_config": generation, "tokenizer": self.processor}
        return TextRequest(self._model, arguments, seed=settings.get(SEED))

    async def _send_request(self, method: str, args: Any, streamer: Any = None) -> list[int]:
        """The text's tokens; a streamer, transformers' ``Detokenizer``, is given each as it comes."""
        request = self._request
        assert request is not None, method
        arrived: asyncio.Queue[int | None] = asyncio.Queue()
        if streamer is not None:
            request.streamer = _Tokens(arrived, asyncio.get_running_loop())
        answer = asyncio.wrap_future(request.answer)
        answer.add_done_callback(lambda _: arrived.put_nowait(None))
        self._decoding.submit(request)
        try:
            while (token := await arrived.get()) is not None:
                streamer.put_token(token)
            ids = await answer
        finally:  # the client has gone, say
            request.withdrawn.set()
            answer.cancel()
        tokens: list[int] = ids[0, prompt_length(request.arguments) :].tolist()
        return tokens


class _Loader:
    """What transformers' engine asks of its ``ModelLoader``."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer

    def load_config(self, _: str) -> tuple[Any, Any]:
        return self._model.config, self._model.generation_config

    def load_processor(self, _: str) -> Any:
        return self._tokenizer


class _Tokens(BaseStreamer):  # type: ignore[misc]
    """Passes the tokens behind a prompt on to the thread that writes the stream."""

    def __init__(self, arrived: asyncio.Queue[int | None], writer: asyncio.AbstractEventLoop) -> None:
        self._arrived, self._writer = arrived, writer
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        for token in [] if self._is_prompt else value.tolist():
            self._writer.call_soon_threadsafe(self._arrived.put_nowait, token)
        self._is_prompt = False

    def end(self) -> None:
        pass
