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

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from llama_library import Library, Model
from machine import describe_machine
from torch import Tensor
from transformers import DynamicCache

import matgptq
from matgptq import native
from matgptq.inference import block_stack
from matgptq.models.kv_cache import CACHE_ARGUMENT

HEAD_BITS = 8


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
    result = {f"{way}_ms": round(statistics.median(taken) * 1e3, 2) for way, taken in seconds.items()}
    for other in seconds.keys() - {"stack"}:
        ratios = [a / b for a, b in zip(seconds[other], seconds["stack"], strict=True)]
        result[f"times_as_fast_as_{other}"] = round(statistics.median(ratios), 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--tokens", default="2,4,8,16,32,64,128")
    parser.add_argument("--lengths", default="512")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama-cpp", type=Path, help="directory of libllama")
    parser.add_argument("--gguf", type=Path, help="what llama.cpp reads with")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if not native.available():
        raise SystemExit(f"no native kernels: {native.reason()}")
    theirs = None
    if arguments.llama_cpp is not None and arguments.gguf is not None:
        theirs = Model(Library(arguments.llama_cpp), arguments.gguf)
    records = []
    for dtype in ("float32", "bfloat16"):
        model = matgptq.load(
            arguments.checkpoint, arguments.bits, device="cpu", dtype=dtype, resident=False, head_bits=HEAD_BITS
        )
        for threads in map(int, arguments.threads.split(",")):
            torch.set_num_threads(threads)
            for length in map(int, arguments.lengths.split(",")):
                for tokens in map(int, arguments.tokens.split(",")):
                    found = measure(model, theirs, length, tokens, arguments.rounds, threads)
                    records.append({"dtype": dtype, "threads": threads, "context": length, "tokens": tokens, **found})
                    print(records[-1], flush=True)
    if arguments.output:
        result = {
            "machine": describe_machine() | {"threads": None, "native": native.isa()},
            "model": arguments.checkpoint.name,
            "bits": arguments.bits,
            "head_bits": HEAD_BITS,
            "gguf": None if theirs is None else arguments.gguf.name,
            "records": records,
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
