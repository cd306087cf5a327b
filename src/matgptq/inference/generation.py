"""Continue a prompt with one width of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from matgptq.errors import ConfigurationError
from matgptq.recipe import check_seed


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    templated: bool = False,
) -> Iterator[str]:
    """Yield the continuation of a prompt piece by piece as it is decoded.

    Args:
        model: of ``matgptq.load``, at the width it is set to.
        tokenizer: of the same checkpoint.
        prompt: plain text, or a conversation that went through a chat template already.
        max_new_tokens: upper bound; an end-of-sequence token ends earlier.
        temperature: 0 takes the likeliest token each time; otherwise tokens are sampled.
        seed: of the sampling.
        templated: the prompt is such a conversation: the template has written its special tokens.

    Raises:
        ConfigurationError: the prompt has no tokens, or the seed is out of range.
    """
    from transformers import DynamicCache

    from matgptq.models.kv_cache import CACHE_ARGUMENT

    check_seed(seed)
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=not templated).input_ids.to(model.device)
    if tokens.numel() == 0:
        raise ConfigurationError("the prompt is empty, and the tokenizer has no token that a text begins with")
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    generator = torch.Generator().manual_seed(seed)
    cache = DynamicCache(config=model.config)
    produced: list[int] = []
    shown = ""
    step = tokens
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            logits = (
                model(input_ids=step, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1).logits[0, -1].float()
            )
        if temperature > 0:
            token = int(torch.multinomial(torch.softmax(logits.cpu() / temperature, -1), 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token in ends:
            return
        produced.append(token)
        # Decoding all of it again costs nothing beside the model, and pieces of a character never come out alone.
        text = tokenizer.decode(produced, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
        step = torch.tensor([[token]], device=model.device)
