"""Decoding behind a context of some length: blocks in transformers' code, in two native calls, and in between.

    python benchmarks/decoding.py OUT --bits 4 -o benchmarks/results/decoding.json

    transformers   the block's own code, its products ours
    attention      two calls for a block, but PyTorch's attention and transformers' cache
    library        two calls for a block

A step is greedy decoding of one token behind a prompt of the given length. All ways take turns in one run; medians of
the rounds, and the median of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from machine import describe_machine

import matgptq
from matgptq import native
from matgptq.decoding import RowBlock
from matgptq.native import BlockCalls
from matgptq.speed import _step_seconds

WAYS = ("transformers", "attention", "library")


def measure(model: Any, length: int, steps: int, rounds: int) -> dict[str, Any]:
    prompt = torch.randint(100, 10_000, (1, length), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, taken in seconds.items():
            with ExitStack() as changes:
                if way == "transformers":
                    changes.enter_context(patch.object(RowBlock, "takes", lambda *_: False))
                elif way == "attention":
                    changes.enter_context(patch.object(BlockCalls, "attends", False))
                taken.append(_step_seconds(model, prompt, steps))
    ratios = [a / b for a, b in zip(seconds["transformers"], seconds["library"], strict=True)]
    return {
        **{f"{way}_ms": round(statistics.median(taken) * 1e3, 2) for way, taken in seconds.items()},
        "times_as_fast": round(statistics.median(ratios), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--lengths", default="16,128,512,2048")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if not native.available():
        raise SystemExit(f"no native kernels: {native.reason()}")
    records = []
    for dtype in ("float32", "bfloat16"):
        model = matgptq.load(arguments.checkpoint, arguments.bits, device="cpu", dtype=dtype, resident=False)
        for threads in map(int, arguments.threads.split(",")):
            torch.set_num_threads(threads)
            for length in map(int, arguments.lengths.split(",")):
                found = measure(model, length, arguments.steps, arguments.rounds)
                records.append({"dtype": dtype, "threads": threads, "context": length, **found})
                print(records[-1], flush=True)
    if arguments.output:
        machine = describe_machine() | {"threads": None, "native": native.isa()}
        result = {"machine": machine, "model": arguments.checkpoint.name, "bits": arguments.bits, "records": records}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
