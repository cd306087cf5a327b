"""Reading a few tokens behind a context: a short turn of a conversation, or what a draft model proposed.

    python benchmarks/short_turns.py OUT -o benchmarks/results/short_turns.json
    python benchmarks/short_turns.py OUT --llama-cpp build/llama.cpp/package/bins/linux-x64 --gguf MODEL.gguf

    transformers   the blocks' own code, their products ours
    stack          one call for all blocks
    llama_cpp      a GGUF file of the same model in llama.cpp, as `llama_library.py` runs it

Time from the tokens to what follows the last of them, behind a context and one generated token, with our head at 8
bits. All ways take turns in one run; medians of the rounds, and the medians of the rounds' own ratios.
"""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import torch
from decoding import make_parser, run, summarize
from llama_library import Model
from torch import Tensor
from transformers import DynamicCache

from matgptq.inference import block_stack
from matgptq.models.kv_cache import CACHE_ARGUMENT


@torch.inference_mode()
def turn_seconds(model: Any, context: Tensor, turn: Tensor, most_tokens: int) -> float:
    options = {CACHE_ARGUMENT: DynamicCache(config=model.config), "use_cache": True, "logits_to_keep": 1}
    token = model(input_ids=context, **options).logits.argmax(-1)
    model(input_ids=token, **options)
    with patch.object(block_stack, "MOST_TOKENS", most_tokens):
        started = time.perf_counter()
        model(input_ids=turn, **options).logits.argmax(-1)
        return time.perf_counter() - started


def measure(model: Any, theirs: Model | None, length: int, tokens: int, rounds: int, threads: int) -> dict[str, Any]:
    context, turn = torch.randint(100, 10_000, (1, length + tokens), generator=torch.Generator().manual_seed(0)).split(
        (length, tokens), 1
    )
    seconds: dict[str, list[float]] = {"transformers": [], "stack": []}
    for _ in range(rounds):
        seconds["transformers"].append(turn_seconds(model, context, turn, 1))
        seconds["stack"].append(turn_seconds(model, context, turn, block_stack.MOST_TOKENS))
        if theirs is not None:
            taken = theirs.turn_seconds(context[0].tolist(), turn[0].tolist(), threads)
            seconds.setdefault("llama_cpp", []).append(taken)
    return summarize(seconds)


def main() -> None:
    parser = make_parser(__doc__, "512", 5)
    parser.add_argument("--tokens", default="2,4,8,16,32,64,128")
    arguments = parser.parse_args()

    def of_tokens(model: Any, theirs: Model | None, tokens: int, length: int, threads: int) -> dict[str, Any]:
        return measure(model, theirs, length, tokens, arguments.rounds, threads)

    run(arguments, "tokens", [int(tokens) for tokens in arguments.tokens.split(",")], of_tokens)


if __name__ == "__main__":
    main()
