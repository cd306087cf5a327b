"""KL and perplexity of every method, quality and width, in one run.

    python benchmarks/quality.py MODEL --calibration c4.txt --text wikitext2-test.txt --other wikipedia.txt \\
        -o benchmarks/results/quality.json --plot benchmarks/results/quality.png

Choices were made by the first 4 windows of the text; windows 4 to 11 and the other text were not looked at for them.
Each row is quantized and measured in a process of its own, so that its time and peak memory are its own, too. Rows that
the output holds already are not measured again.

The ``alone`` rows are the bound: one width, no nesting, with the same ingredients.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from quality_table import Row, figure, make_table

from matgptq.recipe import make_recipe
from matgptq.text.windows import SELF


def _alone(bits: int, quality: str, but: str = "", **changed: Any) -> Row:
    """One width without nesting, by every ingredient of a quality but for some; tuned if that tunes this width."""
    recipe = make_recipe("matgptq", quality=quality, **changed).to_dict()
    for nested in ("method", "target_bits", "bit_weights", "refit_bits", "group_size", "damping", "seed"):
        del recipe[nested]
    recipe["tuned_bits"] = [bits] if bits in recipe["tuned_bits"] else []
    name = f"{bits} bits alone, as {quality}" + (f", {but}" if but else "")
    return Row(name, {"method": "gptq", "bits": [bits], **recipe}, (bits,))


def _rows_alone(row: Row) -> Row:
    """As it was measured before rows were solved together."""
    return replace(row, name=f"{row.name}, each row alone", options={**row.options, "rows_together": 0})


# What was best before there was channel scaling.
UNSCALED = {"channel_scaling": 0.0, "tuning_steps": 96}
UNSCALED_WEIGHTS = {"bits": (2, 3, 4, 6, 8), "bit_weights": (6, 16, 24, 36, 400)}
# With less weight on 8 bits: the best there is for 2 to 4.
LOW_WEIGHTS = {"bits": (2, 3, 4, 6, 8), "bit_weights": (7, 24, 44, 44, 350)}

JOINED = [
    Row("balanced", {"quality": "balanced"}),
    Row("best", {"quality": "best"}),
    Row("balanced, 16 steps of tuning", {"quality": "balanced", "tuned_bits": (2, 3), "tuning_steps": 16}),
    Row("balanced, seed 1", {"quality": "balanced"}, seed=1),
    Row("best, seed 1", {"quality": "best"}, seed=1),
    *(_alone(bits, "best") for bits in (3, 4, 2)),
    *(_alone(bits, "balanced") for bits in (3, 4, 2)),
]
# What was not measured again since rows are solved together.
SINGLE_CHANGES = [
    Row("balanced, no channel scaling", {"quality": "balanced", "channel_scaling": 0.0}),
    Row("balanced, no channel scaling, seed 1", {"quality": "balanced", "channel_scaling": 0.0}, seed=1),
    *(_alone(bits, "balanced", "no channel scaling", channel_scaling=0.0) for bits in (3, 4)),
    Row("best, less weight on 8 bits", {"quality": "best", **LOW_WEIGHTS}),
    Row("best, less weight on 8 bits, not rotated", {"quality": "best", "rotate": False, **LOW_WEIGHTS}),
    Row("best, not scaled", {"quality": "best", **UNSCALED, **UNSCALED_WEIGHTS}),
    Row("best, not scaled, seed 1", {"quality": "best", **UNSCALED, **UNSCALED_WEIGHTS}, seed=1),
    *(_alone(bits, "best", "not scaled", **UNSCALED) for bits in (3, 4)),
]

ROWS = [
    Row("rtn", {"method": "rtn"}),
    *(Row(f"gptq {bits}", {"method": "gptq", "bits": [bits]}, (bits,)) for bits in (2, 3, 4)),
    Row("paper", {"method": "paper"}),
    Row("fast", {"quality": "fast"}),
    *JOINED,
    *map(_rows_alone, JOINED),
    *map(_rows_alone, SINGLE_CHANGES),
    Row("balanced, PyTorch solver", {"quality": "balanced"}, environment={"MATGPTQ_SOLVER": "torch"}),
    Row("balanced, self calibration", {"quality": "balanced"}, dataset=lambda _: SELF),
]


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """KL against bits per weight, by method, on text that was not used for choosing."""
    with figure(file, (7, 4.5)) as axes:
        for name in ("rtn", "gptq", "paper", "fast", "balanced", "best"):
            points = sorted(
                (result["bits_per_weight"], result["kl"])
                for row in rows
                if row["name"] == name or (name == "gptq" and row["name"] in ("gptq 2", "gptq 3", "gptq 4"))
                for result in row["texts"]["windows 4-11"]["results"]
            )
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set_yscale("log")
        axes.set_xlabel("bits per weight, scales included")
        axes.set_ylabel("KL to the full model, nats per token")


if __name__ == "__main__":
    make_table(ROWS, __file__, __doc__, plot)
