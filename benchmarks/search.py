"""What a width per layer brings, and what finding it costs, beside uniform widths and the published search.

    python benchmarks/search.py OUT --dataset TEXT --text UNSEEN -o benchmarks/results/search.json

OUT is a checkpoint of ``matgptq quantize``. Budgets are average bits of the codes. Each is measured on windows of a
text that no search saw, and compared with the straight line between the neighbouring uniform widths in log KL (at a
whole number of bits: with that uniform width). The published search, evolution from uniform widths, gets one of the
budgets, and as many tokens as ours took, then several times as many.

What was found then gets scales of its own (``matgptq refine --allocation``), beside uniform widths tuned as long. A
sweep of many budgets is timed and plotted. The whole takes hours; with ``--work`` it goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from machine import describe_machine
from torch import Tensor

import matgptq
from matgptq.checkpoints.allocation_store import stored_allocations
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.models.families import find_family
from matgptq.models.source import load_tokenizer
from matgptq.plotting import plot_search
from matgptq.slicing import WIDTHS
from matgptq.text.windows import evaluation_windows
from matgptq.width_search.allocation_search import Search
from matgptq.width_search.budget import SearchSpace, bits_budget, parse_sweep
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
    results = matgptq.evaluate(checkpoint, widths, allocation=allocation, text=text, dtype="float32").results
    return {allocation or result.bits: result.kl for result in results}


def line(uniform: dict[int, float], bits: float) -> float:
    """KL on the straight line between neighbouring uniform widths, in log KL."""
    low = math.floor(bits)
    high = min(low + 1, max(uniform))
    return math.exp((high - bits) * math.log(uniform[low]) + (bits - low) * math.log(uniform[high]))


def space_of(checkpoint: Path, fuse: str) -> SearchSpace:
    """What an allocation can be."""
    opened = open_checkpoint(checkpoint)
    family = find_family(str(opened.config.get("model_type")))
    return SearchSpace(group_layers(opened.layers, family, fuse=fuse == "serving"), WIDTHS, opened.other_bytes)


def additive(checkpoint: Path, fuse: str) -> dict[str, float]:
    """What the sensitivity table says could be gained: the least sum of losses within each budget over the line.

    If groups of layers lost independently of one another, no choice of widths could be better than that.
    """
    space = space_of(checkpoint, fuse)
    tables = [read_table(file) for file in (checkpoint / "search").glob("sensitivity-*.json")]
    losses = next(table for table in tables if len(table.alone) == len(space.groups)).losses(space)

    def total(widths: Sequence[int]) -> float:
        return sum(own[bits] for own, bits in zip(losses, widths, strict=True))

    uniform = {bits: total(space.uniform(bits)) for bits in UNIFORM}
    extra = scale_bits(checkpoint)
    ratios = {}
    for budget in BUDGETS:
        best = optimum(losses, space.costs, bits_budget(space, Fraction(budget) + extra).bits)
        ratios[budget] = round(total(best) / line(uniform, float(budget)), 3)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dataset", required=True, help="text to search on")
    parser.add_argument("--text", required=True, help="text to measure on")
    parser.add_argument("--reference", help="the full model; default: what the checkpoint names")
    parser.add_argument(
        "--evolution", type=float, nargs="*", default=[1, 5], help="tokens of the published search: x ours"
    )
    parser.add_argument("--fuse", nargs="*", default=["serving", "none"], choices=["serving", "none"])
    parser.add_argument("--generations", type=int, help="of refinement at most; default: while it pays")
    parser.add_argument("--steps", type=int, default=128, help="of tuning; 0: none")
    parser.add_argument("--nsamples", type=int, default=128, help="windows to tune on")
    parser.add_argument("--sweep", default="2.25:6:0.25", help="bits per weight; empty: none")
    parser.add_argument("--work", type=Path, help="where the searches are kept, to go on from; default: nowhere")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        Benchmark(arguments, (arguments.work or Path(directory)) / "checkpoint").run()


class Benchmark:
    """The parts of one run; those that the output holds already are not measured again."""

    def __init__(self, arguments: argparse.Namespace, checkpoint: Path) -> None:
        self.arguments, self.checkpoint = arguments, checkpoint
        if not checkpoint.exists():  # tables of earlier searches must not save time
            shutil.copytree(arguments.checkpoint, checkpoint, ignore=shutil.ignore_patterns("search", "allocations"))
        self.options = {"dataset": arguments.dataset, "reference": arguments.reference}
        tokenizer = load_tokenizer(arguments.checkpoint)
        self.text = evaluation_windows(arguments.text, tokenizer, windows=WINDOWS, seqlen=SEQLEN).tokens
        self.extra = scale_bits(checkpoint)
        self.uniform: dict[int, float] = {}
        self.record: dict[str, Any] = {"machine": describe_machine(), "model": arguments.checkpoint.resolve().name}
        if arguments.output and arguments.output.exists():
            self.record = json.loads(arguments.output.read_text(encoding="utf-8"))

    def run(self) -> None:
        """Measure what is missing."""
        uniform = self.part(
            "uniform", lambda: {str(bits): round(value, 5) for bits, value in kl(self.checkpoint, self.text).items()}
        )
        self.uniform = {int(bits): value for bits, value in uniform.items()}
        for fuse in self.arguments.fuse:
            single = self.part(f"fuse {fuse}, one budget", partial(self.one_budget, fuse))
            self.part(f"fuse {fuse}, if losses only added up", partial(additive, self.checkpoint, fuse))
            self.part(f"fuse {fuse}, more budgets from the same table", partial(self.more_budgets, fuse))
            for budget in BUDGETS if self.arguments.steps else ():
                self.part(f"fuse {fuse}, {budget}, scales tuned", partial(self.tuned, fuse, budget))
            if fuse != "serving":
                continue
            if self.arguments.sweep:
                self.part("sweep", self.sweep)
            for factor in self.arguments.evolution:
                tokens = factor * single["tokens_scored"]
                name = f"evolution from uniform widths, serving, {factor:g} x the tokens"
                self.part(name, partial(self.evolve, tokens))
        if self.arguments.steps:
            self.part("uniform widths, scales tuned", self.tuned_uniform)

    def part(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Print and write each part as soon as it is known."""
        if name not in self.record:
            self.record[name] = measure()
            if self.arguments.output:
                self.arguments.output.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(self.record[name]), flush=True)
        found: dict[str, Any] = self.record[name]
        return found

    def one_budget(self, fuse: str) -> dict[str, Any]:
        """The first search, with the table that it takes."""
        _, [single], cost = self.searched([COMPARED], fuse, **self.how(fuse))
        return {"budget": COMPARED, **self.compared(single, COMPARED), **cost}

    def more_budgets(self, fuse: str) -> dict[str, Any]:
        """The others, in one run."""
        others = [budget for budget in BUDGETS if budget != COMPARED]
        _, found, cost = self.searched(others, fuse, **self.how(fuse))
        results = {budget: self.compared(each, budget) for budget, each in zip(others, found, strict=True)}
        return {**results, **cost}

    def sweep(self) -> dict[str, Any]:
        """Many budgets in one run, which takes up the table of the first; losses on the search's own held-out text."""
        started = time.perf_counter()
        run = matgptq.search(self.checkpoint, parse_sweep(self.arguments.sweep), save="sweep", **self.options)
        seconds = time.perf_counter() - started
        if self.arguments.plot:
            plot_search(run, self.arguments.plot, f"{self.record['model']}: a width for every layer")
        table = self.record["fuse serving, one budget"]["stages"]["table"]
        return {
            "budgets": self.arguments.sweep,
            "seconds": round(seconds + table, 1),  # with the table, as if it came first
            "stages": {**run.seconds, "table": table},
            "tokens_scored": run.tokens_scored,
            "found": [[round(each.bits, 4), each.bytes, round(each.loss, 5)] for each in run.found],
            "uniform": [[each.bits, each.bytes, round(each.loss, 5)] for each in run.uniform],
        }

    def tuned_uniform(self) -> dict[str, Any]:
        """Uniform widths tuned as long, in a copy: allocations belong to scales as they were found."""
        copy = self.checkpoint.with_name("tuned")
        if not copy.exists():
            shutil.copytree(self.checkpoint, copy, ignore=shutil.ignore_patterns("search", "allocations"))
        started = time.perf_counter()
        matgptq.refine(copy, UNIFORM, steps=self.arguments.steps, **self.options)
        seconds = round(time.perf_counter() - started, 1)
        found = {bits: round(value, 5) for bits, value in kl(copy, self.text).items()}
        ratios = {
            fuse: {
                budget: round(self.record[f"fuse {fuse}, {budget}, scales tuned"]["kl"] / line(found, float(budget)), 3)
                for budget in BUDGETS
            }
            for fuse in self.arguments.fuse
        }
        return {"steps": self.arguments.steps, "seconds": seconds, "kl": found, "ratios of tuned allocations": ratios}

    def tuned(self, fuse: str, budget: str) -> dict[str, Any]:
        """An allocation with scales of its own, beside uniform widths as they are."""
        name = fuse if budget == COMPARED else f"{fuse}-{self.label(budget)}"
        how = {"steps": self.arguments.steps, "nsamples": self.arguments.nsamples}
        started = time.perf_counter()
        matgptq.refine(self.checkpoint, allocation=name, **how, **self.options)
        seconds = round(time.perf_counter() - started, 1)
        value = round(kl(self.checkpoint, self.text, name)[name], 5)
        ratio = round(value / line(self.uniform, float(budget)), 3)
        return {"kl": value, "ratio": ratio, "target": TARGETS[budget], **how, "seconds": seconds}

    def label(self, budget: str) -> str:
        """What the search calls a budget."""
        space = space_of(self.checkpoint, "serving")
        return bits_budget(space, Fraction(budget) + self.extra).label

    def how(self, fuse: str) -> dict[str, Any]:
        """Options of our searches; with a place to keep them they go on where they were."""
        return {"fuse": fuse, "generations": self.arguments.generations, "resume": self.arguments.work is not None}

    def evolve(self, tokens: float) -> dict[str, Any]:
        """The published search, for as many generations as some tokens allow; goes on where it was."""
        generations = 1
        while True:
            _, [found], spent = self.searched(
                [COMPARED], "evolution", method="evolution", generations=generations, resume=True
            )
            if spent["tokens_scored"] >= tokens:
                scored = {"generations": generations, "tokens_scored": spent["tokens_scored"]}
                return {**self.compared(found, COMPARED), **scored}
            generations = max(generations + 1, int(tokens * generations / spent["tokens_scored"]))

    def searched(
        self, budgets: list[str], save: str, **options: Any
    ) -> tuple[Search, list[dict[str, Any]], dict[str, Any]]:
        """A run, records of what it found, and what it cost."""
        started, started_cpu = time.perf_counter(), time.process_time()
        targets = [Fraction(budget) + self.extra for budget in budgets]
        run = matgptq.search(self.checkpoint, targets, save=save, **self.options, **options)
        cost = {
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(time.process_time() - started_cpu, 1),
            "stages": run.seconds,
            "tokens_scored": run.tokens_scored,
        }
        stored = stored_allocations(open_checkpoint(self.checkpoint))
        records = [
            {
                "bits": round(found.bits, 4),
                "bits_per_weight": round(found.bits_per_weight, 4),
                "slack_bits": found.slack_bits,
                "kl": round(kl(self.checkpoint, self.text, found.name)[found.name], 5),
                "generations": stored[found.name]["found"]["generation"],
                "widths": "".join(map(str, found.widths)),
            }
            for found in run.found
        ]
        return run, records, cost

    def compared(self, found: dict[str, Any], budget: str) -> dict[str, Any]:
        """A record beside the straight line and what was aimed at."""
        ratio = round(found["kl"] / line(self.uniform, float(budget)), 3)
        return {**found, "ratio": ratio, "target": TARGETS[budget]}


if __name__ == "__main__":
    main()
