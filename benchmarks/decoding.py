"""Decoding behind a context of some length: in transformers' blocks, in two calls for a block, in one for all blocks.

    python benchmarks/decoding.py OUT --bits 4 -o benchmarks/results/decoding.json
    python benchmarks/decoding.py OUT --batch 1,2,4,8,16 --lengths 128
    python benchmarks/decoding.py OUT --llama-cpp build/llama.cpp/package/bins/linux-x64 --gguf MODEL.gguf

    transformers   the blocks' own code, their products ours
    blocks         two calls for each block
    stack          one call for all blocks, if the model takes it
    llama_cpp      a GGUF file of the same model in llama.cpp, as `llama_library.py` runs it

A step is greedy decoding of one token of each sequence of a batch, behind prompts of the given length, with our head at
8 bits. All ways take turns in one run; medians of the rounds, and the medians of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
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
from matgptq.inference.block_stack import BlockStack, takes_groups
from matgptq.inference.decoding import RowBlock

WAYS = ("transformers", "blocks", "stack")
HEAD_BITS = 8


def measure(
    model: Any, theirs: Model | None, batch: int, length: int, steps: int, rounds: int, threads: int
) -> dict[str, Any]:
    prompt = torch.randint(100, 10_000, (batch, length), generator=torch.Generator().manual_seed(0))
    ways = WAYS if takes_groups(model) else WAYS[:-1]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            with ExitStack() as changes:
                if way != "stack":
                    changes.enter_context(patch.object(BlockStack, "run", lambda *_: None))
                if way == "transformers":
                    changes.enter_context(patch.object(RowBlock, "takes", lambda *_: False))
                seconds[way].append(_step_seconds(model, prompt, steps))
        if theirs is not None:
            seconds.setdefault("llama_cpp", []).append(theirs.step_seconds(prompt.tolist(), steps, threads))
    return summarize(seconds)


def summarize(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of each way, and of the rounds' own ratios to our fastest one."""
    ours = "stack" if "stack" in seconds else "blocks"
    result = {f"{way}_ms": round(statistics.median(taken) * 1e3, 2) for way, taken in seconds.items()}
    for other in seconds.keys() - {ours}:
        ratios = [a / b for a, b in zip(seconds[other], seconds[ours], strict=True)]
        result[f"times_as_fast_as_{other}"] = round(statistics.median(ratios), 2)
    return result


def make_parser(description: str | None, lengths: str, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--lengths", default=lengths, help="of the context")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--llama-cpp", type=Path, help="directory of libllama")
    parser.add_argument("--gguf", type=Path, help="what llama.cpp runs")
    parser.add_argument("-o", "--output", type=Path)
    return parser


def run(
    arguments: argparse.Namespace,
    name: str,
    cases: Sequence[int],
    measure: Callable[[Any, Model | None, int, int, int], dict[str, Any]],
    sequences: int = 1,
) -> None:
    """Measure each case behind each length, with each dtype and number of threads.

    Args:
        arguments: of ``make_parser``.
        name: of what differs between the cases.
        cases: its values.
        measure: of (our model, llama.cpp's, case, length, threads).
        sequences: most that llama.cpp decodes at once.
    """
    if not native.available():
        raise SystemExit(f"no native kernels: {native.reason()}")
    theirs = None
    if arguments.llama_cpp is not None and arguments.gguf is not None:
        theirs = Model(Library(arguments.llama_cpp), arguments.gguf, sequences=sequences)
    records = []
    for dtype in ("float32", "bfloat16"):
        model = matgptq.load(
            arguments.checkpoint, arguments.bits, device="cpu", dtype=dtype, resident=False, head_bits=HEAD_BITS
        )
        for threads in map(int, arguments.threads.split(",")):
            torch.set_num_threads(threads)
            for length, case in product(map(int, arguments.lengths.split(",")), cases):
                found = measure(model, theirs, case, length, threads)
                records.append({"dtype": dtype, "threads": threads, "context": length, name: case, **found})
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


def main() -> None:
    parser = make_parser(__doc__, "16,128,512,2048", 3)
    parser.add_argument("--batch", default="1", help="sequences decoded at once")
    parser.add_argument("--steps", type=int, default=16)
    arguments = parser.parse_args()
    batches = [int(batch) for batch in arguments.batch.split(",")]

    def of_batch(model: Any, theirs: Model | None, batch: int, length: int, threads: int) -> dict[str, Any]:
        return measure(model, theirs, batch, length, arguments.steps, arguments.rounds, threads)

    run(arguments, "batch", batches, of_batch, max(batches))


if __name__ == "__main__":
    main()
