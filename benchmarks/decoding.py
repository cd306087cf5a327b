"""Decoding behind a context of some length: in transformers' blocks, in two calls for a block, in one for all blocks.

    python benchmarks/decoding.py OUT --bits 4 -o benchmarks/results/decoding.json
    python benchmarks/decoding.py OUT --batch 1,2,4,8,16 --lengths 128
    python benchmarks/decoding.py OUT --llama-cpp build/llama.cpp/package/bins/linux-x64 --gguf MODEL.gguf

    transformers   the blocks' own code, their products ours
    blocks         two calls for each block
    stack          one call for all blocks
    llama_cpp      a GGUF file of the same model in llama.cpp, as `llama_library.py` runs it

A step is greedy decoding of one token of each sequence of a batch, behind prompts of the given length, with our head at
8 bits. All ways take turns in one run; medians of the rounds, and the medians of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from llama_library import Library, Model
from machine import describe_machine

import matgptq
from matgptq import native
from matgptq.evaluation.speed import _step_seconds
from matgptq.inference.block_stack import BlockStack
from matgptq.inference.decoding import RowBlock

WAYS = ("transformers", "blocks", "stack")
HEAD_BITS = 8


def measure(
    model: Any, theirs: Model | None, batch: int, length: int, steps: int, rounds: int, threads: int
) -> dict[str, Any]:
    prompt = torch.randint(100, 10_000, (batch, length), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            with ExitStack() as changes:
                if way != "stack":
                    changes.enter_context(patch.object(BlockStack, "run", lambda *_: None))
                if way == "transformers":
                    changes.enter_context(patch.object(RowBlock, "takes", lambda *_: False))
                seconds[way].append(_step_seconds(model, prompt, steps))
        if theirs is not None:
            seconds.setdefault("llama_cpp", []).append(theirs.step_seconds(prompt.tolist(), steps, threads))
    result = {f"{way}_ms": round(statistics.median(taken) * 1e3, 2) for way, taken in seconds.items()}
    for other in seconds.keys() - {"stack"}:
        ratios = [a / b for a, b in zip(seconds[other], seconds["stack"], strict=True)]
        result[f"times_as_fast_as_{other}"] = round(statistics.median(ratios), 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--batch", default="1", help="sequences decoded at once")
    parser.add_argument("--lengths", default="16,128,512,2048")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--llama-cpp", type=Path, help="directory of libllama")
    parser.add_argument("--gguf", type=Path, help="what llama.cpp decodes with")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if not native.available():
        raise SystemExit(f"no native kernels: {native.reason()}")
    batches = [int(batch) for batch in arguments.batch.split(",")]
    theirs = None
    if arguments.llama_cpp is not None and arguments.gguf is not None:
        theirs = Model(Library(arguments.llama_cpp), arguments.gguf, sequences=max(batches))
    records = []
    for dtype in ("float32", "bfloat16"):
        model = matgptq.load(
            arguments.checkpoint, arguments.bits, device="cpu", dtype=dtype, resident=False, head_bits=HEAD_BITS
        )
        for threads in map(int, arguments.threads.split(",")):
            torch.set_num_threads(threads)
            for length, batch in product(map(int, arguments.lengths.split(",")), batches):
                found = measure(model, theirs, batch, length, arguments.steps, arguments.rounds, threads)
                records.append({"dtype": dtype, "threads": threads, "context": length, "batch": batch, **found})
                print(records[-1], flush=True)
    if arguments.output:
        machine = describe_machine() | {"threads": None, "native": native.isa()}
        result = {
            "machine": machine,
            "model": arguments.checkpoint.name,
            "bits": arguments.bits,
            "head_bits": HEAD_BITS,
            "gguf": None if theirs is None else arguments.gguf.name,
            "records": records,
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
