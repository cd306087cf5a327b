"""Plots for people; matplotlib is an extra and imported only here, when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matgptq.errors import ConfigurationError
from matgptq.evaluation import Result

MEGABYTE = 1_000_000


def plot_widths(results: Sequence[Result], file: str | Path, title: str) -> None:
    """KL (or perplexity, without a reference) and size of the served model against bits per weight.

    Args:
        results: any order.
        file: where to write; the suffix chooses the format, ``.png`` if there is none.
        title: shown above.

    Raises:
        ConfigurationError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigurationError('plots need matplotlib: pip install "matgptq[plot]"') from None
    ordered = sorted(results, key=lambda result: result.bits_per_weight)
    bits = [result.bits_per_weight for result in ordered]
    compared = all(result.kl is not None for result in ordered)
    quality = [result.kl if compared else result.perplexity for result in ordered]
    # An object of our own, not pyplot: no global state and no display.
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    axes.plot(bits, quality, "o-", color="tab:blue", label="KL" if compared else "perplexity")
    axes.set_yscale("log")
    axes.margins(x=0.08)  # room for the labels
    axes.set_xlabel("bits per weight, scales included")
    axes.set_ylabel("KL to the full model, nats per token" if compared else "perplexity", color="tab:blue")
    axes.grid(True, which="both", alpha=0.25)
    for x, y, result in zip(bits, quality, ordered, strict=True):
        axes.annotate(f"{result.bits:g} bits", (x, y), textcoords="offset points", xytext=(6, 6))
    sizes = axes.twinx()
    sizes.plot(bits, [result.bytes / MEGABYTE for result in ordered], "s--", color="tab:orange", label="size")
    sizes.set_ylim(bottom=0)
    sizes.set_ylabel("size of the model as served, MB", color="tab:orange")
    axes.set_title(title)
    try:
        figure.savefig(file, dpi=140, format=None if Path(file).suffix else "png")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file}: the plot cannot be written: {error}") from error
