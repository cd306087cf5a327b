"""Decoding with the exact output head read by PyTorch, by the native library, and served at few bits.

    python benchmarks/output_head.py OUT --bits 4 -o benchmarks/results/output_head.json
    python benchmarks/output_head.py --bits 4         # a random-weight model of Llama-3.2-1B's shape

One model, whose head is exchanged between the rounds; a step is greedy decoding of one token. Medians of the rounds,
and the median of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from llama_shape import VOCABULARY, write_checkpoint
from machine import describe_machine
from torch import nn

import matgptq
from matgptq import native
from matgptq.evaluation.speed import _step_seconds
from matgptq.inference.output_head import DenseHead, PackedHead

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]


def heads_of(model: Any) -> dict[str, nn.Linear]:
    own = model.get_output_embeddings()
    plain = nn.Linear(own.in_features, own.out_features, bias=False, device="meta")
    plain.weight, plain.bias = own.weight, own.bias
    return {"PyTorch": plain, "exact": DenseHead(plain), "8 bits": PackedHead(plain, 8)}


def measure(model: Any, steps: int, rounds: int) -> list[dict[str, Any]]:
    heads = heads_of(model)
    seconds: dict[str, list[float]] = {name: [] for name in heads}
    alone: dict[str, list[float]] = {name: [] for name in heads}
    hidden = torch.randn(1, 1, model.config.hidden_size, dtype=model.dtype)
    for _ in range(rounds):
        for name, head in heads.items():
            model.set_output_embeddings(head)
            seconds[name].append(_step_seconds(model, torch.tensor([PROMPT]), steps))
            alone[name].append(_product_seconds(head, hidden))
    first = seconds["PyTorch"]
    return [
        {
            "head": name,
            "step_ms": round(statistics.median(mine) * 1e3, 2),
            "head_ms": round(statistics.median(alone[name]) * 1e3, 2),
            "times_as_fast": round(statistics.median(a / b for a, b in zip(first, mine, strict=True)), 3),
            "bytes_read": getattr(heads[name], "bytes_read", heads[name].weight.nbytes),
        }
        for name, mine in seconds.items()
    ]


@torch.inference_mode()
def _product_seconds(head: nn.Linear, hidden: torch.Tensor) -> float:
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        head(hidden)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if not native.available():
        raise SystemExit(f"no native kernels: {native.reason()}")
    records = []
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = arguments.checkpoint or Path(temporary) / "shape"
        if arguments.checkpoint is None:
            write_checkpoint(checkpoint, VOCABULARY)
        for dtype in ("float32", "bfloat16"):
            model = matgptq.load(checkpoint, arguments.bits, device="cpu", dtype=dtype, resident=False)
            for threads in map(int, arguments.threads.split(",")):
                torch.set_num_threads(threads)
                for record in measure(model, arguments.steps, arguments.rounds):
                    records.append({"dtype": dtype, "threads": threads, **record})
                    print(records[-1], flush=True)
    if arguments.output:
        named = checkpoint.name if arguments.checkpoint else "Llama-3.2-1B's shape, random weights"
        machine = describe_machine() | {"threads": None, "native": native.isa()}
        result = {"machine": machine, "model": named, "bits": arguments.bits, "rounds": arguments.rounds}
        arguments.output.write_text(json.dumps(result | {"records": records}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
