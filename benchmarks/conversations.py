"""What `matgptq serve` spares a conversation, and how long others wait for a long prompt.

    python benchmarks/conversations.py OUT -o benchmarks/results/conversations.json

A conversation of some turns, each a prompt of all that was said before and of new tokens; time from a turn's arrival to
its first token, with what was read before kept and without, in turns. Then a text that is being generated while a long
prompt arrives: the longest time between two of its tokens, with the prompt read in pieces and at once, and the time to
the prompt's own first token. Medians of the rounds; ids are random, which makes no difference to the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from torch import Tensor
from transformers import GenerationConfig

from matgptq.serving.decoding_loop import DecodingLoop, TextRequest
from matgptq.serving.served_models import open_models

ROOM = 1 << 30  # bytes
WHOLE = 1 << 30  # tokens


class Clock:
    """A streamer that notes when it is told something; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def ask(loop: DecodingLoop, model: Any, ids: Tensor, tokens: int) -> tuple[Any, Clock]:
    clock = Clock()
    settings = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    request = TextRequest(model, {"input_ids": ids, "generation_config": settings}, clock)
    loop.submit(request)
    return request.answer, clock


def some_ids(model: Any, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, model.config.vocab_size, (1, count), generator=generator)


def turns(loop: DecodingLoop, model: Any, first: int, later: int, answer: int, count: int, seed: int) -> list[float]:
    """Seconds to the first token of each turn."""
    said, waits = some_ids(model, first, seed), []
    for turn in range(count):
        begun = time.perf_counter()
        answered, clock = ask(loop, model, said, answer)
        ids = answered.result()
        waits.append(clock.times[1] - begun)
        said = torch.cat([ids, some_ids(model, later, seed + turn + 1)], 1)
    return waits


def disturbed(loop: DecodingLoop, model: Any, prompt: int, seed: int) -> tuple[float, float]:
    """Longest time between two tokens of a text while a prompt is read, and from its arrival to its first token."""
    answered, clock = ask(loop, model, some_ids(model, 32, seed), 64)
    while len(clock.times) < 17:
        time.sleep(0.001)
    begun = time.perf_counter()
    other, of_other = ask(loop, model, some_ids(model, prompt, seed + 1), 2)
    answered.result(), other.result()
    gaps = [after - before for before, after in zip(clock.times[1:], clock.times[2:], strict=False)]
    return max(gaps), of_other.times[1] - begun


def in_a_loop(measure: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """In one of its own, that ends before the next begins: OpenMP's workers of its thread would stand in the way."""
    loop = DecodingLoop(8, **options)
    try:
        return measure(loop, *given)
    finally:
        loop.close()


def measure(model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures with as many threads as PyTorch has."""
    shape = arguments.first, arguments.later, arguments.answer, arguments.turns
    kept, again = [], []
    pieces: dict[str, list[list[float]]] = {}
    for number in range(-1, arguments.rounds):  # the first is not counted
        seed = 1000 * number + 2000
        waits = [in_a_loop(turns, model, *shape, seed, cache_bytes=room) for room in (ROOM, 0)]
        gaps = {
            str(piece) if piece < WHOLE else "whole": in_a_loop(disturbed, model, arguments.prompt, seed, piece=piece)
            for piece in (*arguments.pieces, WHOLE)
        }
        if number >= 0:
            kept.append(waits[0])
            again.append(waits[1])
            for piece, found in gaps.items():
                pieces.setdefault(piece, []).append(list(found))

    def median(rounds: list[list[float]]) -> list[float]:
        return [round(statistics.median(figure) * 1000, 1) for figure in zip(*rounds, strict=True)]

    return {
        "threads": torch.get_num_threads(),
        "milliseconds to the first token of each turn": {"kept": median(kept), "read again": median(again)},
        "by piece": {
            piece: dict(zip(("longest gap, ms", "first token, ms"), median(found), strict=True))
            for piece, found in pieces.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--first", type=int, default=512, help="tokens of the first turn's prompt")
    parser.add_argument("--later", type=int, default=64, help="new tokens of each later turn")
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=1536, help="tokens of the long prompt")
    parser.add_argument("--pieces", type=int, nargs="*", default=[128, 256, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="*", default=[torch.get_num_threads()])
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    served = open_models(arguments.checkpoint, arguments.bits, device="cpu", dtype="bfloat16", head_bits=8)
    record = {
        "machine": describe_machine(),
        "checkpoint": arguments.checkpoint.name,
        "bits": arguments.bits,
        "turns": {"first": arguments.first, "later": arguments.later, "answer": arguments.answer},
        "long prompt": arguments.prompt,
        "rows": [],
    }
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        record["rows"].append(measure(served.get(served.name), arguments))
        print(json.dumps(record["rows"][-1], indent=2), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
