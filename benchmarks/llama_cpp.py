"""Decoding and reading prompts beside llama.cpp: a random-weight model of Llama-3.2-1B's shape at 8, 4, 3 and 2 bits.

    npm pack @node-llama-cpp/linux-x64@3.22.1 && tar xzf node-llama-cpp-linux-x64-3.22.1.tgz
    python benchmarks/llama_cpp.py --llama-cpp package/bins/linux-x64 -o benchmarks/results/llama_cpp.json

The npm package holds llama.cpp 0.5 prebuilt, with a CPU backend for each instruction set. It chooses one and rearranges
weights for it (AMX, repacking) as it does in llama.cpp's own programs; it rounds activations to 8 bits.

Types: all matrices of the blocks are Q8_0, Q4_0, Q3_K or Q2_K, which is the least that llama.cpp reads at that width.
The embedding is tied to the head and has the type that llama-quantize gives it: Q8_0 beside Q8_0, otherwise Q6_K.
Blocks are random bytes with small scales, codes are random, too: enough for timing, and nothing else is measured.

Ours: packed slices and, once, the resident parent; exact and int8 activations; groups of 64; bfloat16 for the rest.

    blocks          a vocabulary of 256, so that the head costs nothing
    whole           the whole model; our head is tied to the embedding and stays bfloat16
    whole, head 8   the whole model; our head is served at 8 bits (head_bits=8)
    whole, head 6   the same at 6 bits, as llama.cpp's head is but for Q8_0
    prompt          the blocks read 512 tokens at once; also in float32, which `matgptq.load` computes in on a CPU

The contestants of one width and part are in memory together and take turns; a step is greedy decoding of one token
after a short prompt, or reading a long one. Medians of the rounds are reported, and the median of the rounds' own
ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as Type
from llama_library import Library, Model
from llama_shape import GROUP_SIZE, VOCABULARY, write_checkpoint, write_gguf
from machine import describe_machine

import matgptq
from matgptq import native
from matgptq.evaluation.speed import _bytes_per_token, _product_seconds, _prompt_seconds, _step_seconds
from matgptq.native import Activations

TYPES = {8: Type.Q8_0, 4: Type.Q4_0, 3: Type.Q3_K, 2: Type.Q2_K}
TARGETS = {8: 1.0, 4: 1.0, 3: 1.2, 2: 1.2}
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]


@dataclass(frozen=True)
class Ours:
    """One way to serve our checkpoint."""

    activations: Activations
    resident: bool = False
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        dtype = "" if self.dtype == "bfloat16" else f", {self.dtype}"
        return f"matgptq, {self.activations}{dtype}{', resident parent' if self.resident else ''}"

    def load(self, checkpoint: Path, bits: int, head_bits: int | None) -> Any:
        return matgptq.load(
            checkpoint,
            bits,
            device="cpu",
            dtype=self.dtype,
            resident=self.resident,
            activations=self.activations,
            head_bits=head_bits,
        )


@dataclass(frozen=True)
class Part:
    """What of the model is measured."""

    vocabulary: int
    head_bits: int | None
    ours: tuple[Ours, ...]
    prompt: int = 0  # tokens to read; 0 times decoding


PARTS = {
    "blocks": Part(256, None, (Ours("int8"), Ours("exact"), Ours("int8", resident=True))),
    "whole": Part(VOCABULARY, None, (Ours("int8"), Ours("exact"))),
    "whole, head 8": Part(VOCABULARY, 8, (Ours("int8"), Ours("exact"))),
    "whole, head 6": Part(VOCABULARY, 6, (Ours("int8"), Ours("exact"))),
    "prompt": Part(256, None, (Ours("int8"), Ours("exact"), Ours("exact", dtype="float32")), prompt=512),
}


@dataclass(frozen=True)
class Contestant:
    """Something that decodes, or reads prompts.

    Attributes:
        step: ``threads -> seconds`` of decoding one token (a median), or of reading a prompt.
        model: ours, None for llama.cpp.
        bytes_per_token: weights that decoding one token reads.
        buffers: where llama.cpp keeps them, MiB.
    """

    name: str
    step: Callable[[int], float]
    model: Any
    bytes_per_token: int
    buffers: dict[str, float]


def load_ours(ours: Ours, part: Part, bits: int, checkpoint: Path, steps: int) -> Contestant:
    model = ours.load(checkpoint, bits, part.head_bits)

    def step(threads: int) -> float:
        torch.set_num_threads(threads)
        if part.prompt:
            return _prompt_seconds(model, torch.tensor([long_prompt(part)]))
        return _step_seconds(model, torch.tensor([PROMPT]), steps)

    return Contestant(ours.name, step, model, _bytes_per_token(model), {})


def load_theirs(library: Library, part: Part, bits: int, file: Path, steps: int) -> Contestant:
    model = Model(library, file)

    def step(threads: int) -> float:
        if part.prompt:
            return model.prompt_seconds(long_prompt(part), threads)
        return model.step_seconds([PROMPT], steps, threads)

    size = file.stat().st_size  # all of it but a header is weights that every step reads
    return Contestant(f"llama.cpp, {TYPES[bits].name}", step, None, size, model.buffers)


def long_prompt(part: Part) -> list[int]:
    return [1 + number % (part.vocabulary - 1) for number in range(part.prompt)]


def measure(contestants: list[Contestant], tokens: int, threads: int, rounds: int) -> list[dict[str, Any]]:
    """A record for each contestant; the first is the one that the others are compared with."""
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    products: dict[str, list[float]] = {contestant.name: [] for contestant in contestants if contestant.model}
    for _ in range(rounds):
        for contestant in contestants:
            seconds[contestant.name].append(contestant.step(threads))
            if contestant.model and tokens == 1:
                products[contestant.name].append(_product_seconds(contestant.model, 1))
    records = []
    for contestant in contestants:
        mine = seconds[contestant.name]
        ratio = statistics.median(a / b for a, b in zip(seconds[contestants[0].name], mine, strict=True))
        record: dict[str, Any] = {
            "contestant": contestant.name,
            "step_ms": round(statistics.median(mine) * 1e3, 2),
            "tokens_per_second": round(tokens / statistics.median(mine), 2),
            "ratio_to_llama_cpp": round(ratio, 3),
            "bytes_per_token": contestant.bytes_per_token,
        }
        if products.get(contestant.name):
            record["products_ms"] = round(statistics.median(products[contestant.name]) * 1e3, 2)
        if contestant.buffers:
            record["buffers_mib"] = contestant.buffers
        records.append(record)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="DIR", help="where libllama*.so lies")
    parser.add_argument(
        "--files", type=Path, metavar="DIR", help="keep the model files there (9 GB), to use them again"
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--bits", default="8,4,3,2")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded by each contestant in a round")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if not native.available():
        raise SystemExit(f"no native kernels: {native.reason()}")
    library = Library(arguments.llama_cpp)
    with tempfile.TemporaryDirectory() as temporary:
        files = arguments.files or Path(temporary)
        files.mkdir(parents=True, exist_ok=True)
        records = []
        for name, part in ((name, PARTS[name]) for name in arguments.parts):
            checkpoint = files / f"matgptq-{part.vocabulary}"
            if not checkpoint.exists():
                write_checkpoint(checkpoint, part.vocabulary)
            for bits in map(int, arguments.bits.split(",")):
                head = Type.Q8_0 if bits == 8 else Type.Q6_K
                if head == Type.Q8_0 and part.head_bits == 6:
                    continue  # fewer bits than llama.cpp's head has
                file = files / f"{TYPES[bits].name}-{part.vocabulary}.gguf"
                if not file.exists():
                    write_gguf(file, TYPES[bits], head, part.vocabulary)
                contestants = [load_theirs(library, part, bits, file, arguments.steps)]
                contestants += [load_ours(ours, part, bits, checkpoint, arguments.steps) for ours in part.ours]
                for threads in map(int, arguments.threads.split(",")):
                    for record in measure(contestants, part.prompt or 1, threads, arguments.rounds):
                        records.append({"part": name, "bits": bits, "threads": threads, **record})
                        print(
                            f"{name:14} {bits} bits  {threads} threads  {record['contestant']:32} "
                            f"{record['step_ms']:8} ms  {record['tokens_per_second']:7} tokens/s  "
                            f"{record['ratio_to_llama_cpp']:6} x llama.cpp (target {TARGETS[bits]})  "
                            f"{record['bytes_per_token'] / 1e6:6.0f} MB  products {record.get('products_ms', '-')} ms",
                            flush=True,
                        )
    result = {
        "machine": describe_machine() | {"threads": None, "native": native.isa()},
        "llama_cpp": {"version": library.version, "system": library.system},
        "shape": "Llama-3.2-1B, random weights",
        "group_size": GROUP_SIZE,
        "targets": TARGETS,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "records": records,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
