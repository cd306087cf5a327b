"""What a width per layer brings, and what finding it costs, beside uniform widths and the published search.

    python benchmarks/search.py OUT --dataset TEXT --text UNSEEN -o benchmarks/results/search.json

OUT is a checkpoint of ``matgptq quantize``. Budgets are average bits of the codes. Each is measured on windows of a
text that no search saw, and compared with the straight line between the neighbouring uniform widths in log KL (at a
whole number of bits: with that uniform width). The published search, evolution from uniform widths, gets one of the
budgets, and as many tokens as ours took, then several times as many.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from machine import describe_machine
from torch import Tensor

import matgptq
from matgptq.allocation_search import Search
from matgptq.calibration import evaluation_windows
from matgptq.checkpoint import open_checkpoint
from matgptq.families import find_family
from matgptq.plotting import plot_search
from matgptq.slicing import WIDTHS
from matgptq.source import load_tokenizer
from matgptq.width_search.budget import SearchSpace, bits_budget
from matgptq.width_search.layer_groups import group_layers
from matgptq.width_search.optimum import optimum
from matgptq.width_search.sensitivity import read_table

BUDGETS = ("2.5", "3.0", "3.5", "4.5")
TARGETS = {"2.5": 0.75, "3.0": 0.8, "3.5": 0.75, "4.5": 0.75}
UNIFORM = (2, 3, 4, 5)
COMPARED = "3.0"
WINDOWS, SEQLEN = 4, 2048


def scale_bits(checkpoint: Path) -> Fraction:
    """Bits of the scales that serving reads, per weight."""
    opened = open_checkpoint(checkpoint)
    return Fraction(opened.served_bits(4), opened.quantized_weights) - 4


def kl(checkpoint: Path, text: Tensor, allocation: str | None = None) -> dict[int | str, float]:
    """KL of the uniform widths, or of an allocation."""
    widths = None if allocation else UNIFORM
    results = matgptq.evaluate(checkpoint, widths, allocation=allocation, text=text, dtype="bfloat16").results
    return {allocation or result.bits: result.kl for result in results}


def line(uniform: dict[int, float], bits: float) -> float:
    """KL on the straight line between neighbouring uniform widths, in log KL."""
    low = math.floor(bits)
    high = min(low + 1, max(uniform))
    return math.exp((high - bits) * math.log(uniform[low]) + (bits - low) * math.log(uniform[high]))


def additive(checkpoint: Path, fuse: str) -> dict[str, float]:
    """What the sensitivity table says could be gained: the least sum of losses within each budget over the line.

    If groups of layers lost independently of one another, no choice of widths could be better than that.
    """
    opened = open_checkpoint(checkpoint)
    family = find_family(str(opened.config.get("model_type")))
    groups = group_layers(opened.layers, family, fuse=fuse == "serving")
    space = SearchSpace(groups, WIDTHS, opened.other_bytes)
    tables = [read_table(file) for file in (checkpoint / "search").glob("sensitivity-*.json")]
    losses = next(table for table in tables if len(table.alone) == len(groups)).losses(space)

    def total(widths: Sequence[int]) -> float:
        return sum(own[bits] for own, bits in zip(losses, widths, strict=True))

    uniform = {bits: total(space.uniform(bits)) for bits in UNIFORM}
    extra = scale_bits(checkpoint)
    ratios = {}
    for budget in BUDGETS:
        best = optimum(losses, space.costs, bits_budget(space, Fraction(budget) + extra).bits)
        ratios[budget] = round(total(best) / line(uniform, float(budget)), 3)
    return ratios


def searched(
    checkpoint: Path, text: Tensor, targets: list[Fraction], save: str, **options: Any
) -> tuple[Search, list[dict[str, Any]], dict[str, Any]]:
    """A run, records of what it found, and what it cost."""
    started, started_cpu = time.perf_counter(), time.process_time()
    run = matgptq.search(checkpoint, targets, save=save, **options)
    cost = {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - started_cpu, 1),
        "stages": run.seconds,
        "tokens_scored": run.tokens_scored,
    }
    records = [
        {
            "bits": round(found.bits, 4),
            "bits_per_weight": round(found.bits_per_weight, 4),
            "slack_bits": found.slack_bits,
            "kl": round(kl(checkpoint, text, found.name)[found.name], 5),
            "widths": "".join(map(str, found.widths)),
        }
        for found in run.found
    ]
    return run, records, cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dataset", required=True, help="text to search on")
    parser.add_argument("--text", required=True, help="text to measure on")
    parser.add_argument("--reference", help="the full model; default: what the checkpoint names")
    parser.add_argument(
        "--evolution", type=float, nargs="*", default=[1, 5], help="tokens of the published search: x ours"
    )
    parser.add_argument("--plot", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    options = {"dataset": arguments.dataset, "reference": arguments.reference}
    tokenizer = load_tokenizer(arguments.checkpoint)
    text = evaluation_windows(arguments.text, tokenizer, windows=WINDOWS, seqlen=SEQLEN).tokens
    record: dict[str, Any] = {"machine": describe_machine(), "model": arguments.checkpoint.resolve().name}

    def keep(name: str, value: Any) -> None:
        """Print and write what is known so far: the whole takes an hour."""
        record[name] = value
        print(name, json.dumps(value), flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "checkpoint"  # tables of earlier searches must not save time
        shutil.copytree(arguments.checkpoint, checkpoint, ignore=shutil.ignore_patterns("search", "allocations"))
        extra = scale_bits(checkpoint)
        uniform = {int(bits): value for bits, value in kl(checkpoint, text).items()}
        keep("uniform", {bits: round(value, 5) for bits, value in uniform.items()})

        def compared(found: dict[str, Any], budget: str) -> dict[str, Any]:
            return {**found, "ratio": round(found["kl"] / line(uniform, float(budget)), 3), "target": TARGETS[budget]}

        for fuse in ("serving", "none"):
            _, [single], cost = searched(checkpoint, text, [Fraction(COMPARED) + extra], fuse, fuse=fuse, **options)
            keep(f"fuse {fuse}, one budget", {"budget": COMPARED, **compared(single, COMPARED), **cost})
            keep(f"fuse {fuse}, if losses only added up", additive(checkpoint, fuse))
            others = [budget for budget in BUDGETS if budget != COMPARED]
            targets = [Fraction(budget) + extra for budget in others]
            run, found, more = searched(checkpoint, text, targets, fuse, fuse=fuse, **options)
            results = {budget: compared(each, budget) for budget, each in zip(others, found, strict=True)}
            keep(f"fuse {fuse}, more budgets from the same table", {**results, **more})
            if fuse == "none":
                continue
            if arguments.plot:
                plot_search(run, arguments.plot, f"{arguments.checkpoint.resolve().name}: a width for every layer")
            rivals = []
            for factor in arguments.evolution:
                rivals.append(
                    evolve(checkpoint, text, Fraction(COMPARED) + extra, factor * cost["tokens_scored"], options)
                )
                keep("evolution from uniform widths, serving", [compared(rival, COMPARED) for rival in rivals])


def evolve(checkpoint: Path, text: Tensor, target: Fraction, tokens: float, options: dict[str, Any]) -> dict[str, Any]:
    """The published search, for as many generations as some tokens allow; goes on where it was."""
    generations = 1
    while True:
        _, [found], spent = searched(
            checkpoint, text, [target], "evolution", method="evolution", generations=generations, resume=True, **options
        )
        if spent["tokens_scored"] >= tokens:
            return {**found, "generations": generations, "tokens_scored": spent["tokens_scored"]}
        generations = max(generations + 1, int(tokens * generations / spent["tokens_scored"]))


if __name__ == "__main__":
    main()
