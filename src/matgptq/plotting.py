"""Plots for people; matplotlib is an extra and imported only here, when asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matgptq.checkpoints.evaluation_results import Result
from matgptq.errors import ConfigurationError
from matgptq.publishing.figures import MEGABYTE
from matgptq.slicing import MIN_BITS, PARENT_BITS, WIDTHS
from matgptq.width_search.allocation_search import Search

_MARGIN = 0.1  # room for labels, of the axes


def plot_widths(results: Sequence[Result], file: str | Path, title: str) -> None:
    """KL (or perplexity, without a reference) and size of the served model against bits per weight.

    Args:
        results: any order.
        file: where to write; the suffix chooses the format, ``.png`` if there is none.
        title: shown above.

    Raises:
        ConfigurationError: matplotlib is not installed, or the file cannot be written.
    """
    ordered = sorted(results, key=lambda result: result.bits_per_weight)
    bits = [result.bits_per_weight for result in ordered]
    compared = all(result.kl is not None for result in ordered)
    quality = [result.kl if compared else result.perplexity for result in ordered]
    figure = _figure(8, 4.8)
    axes: Any = figure.add_subplot()
    axes.plot(bits, quality, "o-", color="tab:blue", label="KL" if compared else "perplexity")
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, scales included")
    axes.set_ylabel("KL to the full model, nats per token" if compared else "perplexity", color="tab:blue")
    axes.grid(True, which="both", alpha=0.25)
    axes.margins(_MARGIN)
    for x, y, result in zip(bits, quality, ordered, strict=True):
        _label(axes, f"{result.bits:g} bits", x, y)
    sizes = axes.twinx()
    sizes.margins(x=_MARGIN)  # the axis is shared
    sizes.plot(bits, [result.bytes / MEGABYTE for result in ordered], "s--", color="tab:orange", label="size")
    sizes.set_ylim(bottom=0)
    sizes.set_ylabel("size of the model as served, MB", color="tab:orange")
    axes.set_title(title)
    _save(figure, file)


def plot_search(search: Search, file: str | Path, title: str) -> None:
    """Loss against size of all allocations beside uniform widths, and a map of the chosen widths.

    Args:
        search: of one budget or many.
        file, title: as for ``plot_widths``; it raises the same errors.
    """
    kinds = list(dict.fromkeys(kind for _, kind in search.groups))
    found = sorted(search.found, key=lambda each: each.bytes)
    figure = _figure(14, max(5.0, 1.2 * len(kinds)))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.2))
    axes = left.add_subplot()
    for results, style, label in ((found, "o-", "width per layer"), (search.uniform, "s--", "uniform width")):
        ordered = sorted(results, key=lambda each: each.bytes)
        axes.plot([each.bytes / MEGABYTE for each in ordered], [each.loss for each in ordered], style, label=label)
    axes.margins(_MARGIN)
    for each in search.uniform:
        _label(axes, each.name, each.bytes / MEGABYTE, each.loss)
    axes.set_yscale("log")
    axes.set_xlabel("size of the model as served, MB")
    measure = "KL to the full model" if search.fitness == "kl" else "negative log-likelihood"
    axes.set_ylabel(f"{measure}, nats per token")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    axes.set_title(title)

    blocks = 1 + max(block for block, _ in search.groups)
    place = {group: index for index, group in enumerate(search.groups)}
    maps = right.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axes, kind in zip(maps, kinds, strict=True):
        widths = [
            [each.widths[place[block, kind]] if (block, kind) in place else math.nan for block in range(blocks)]
            for each in found
        ]
        image = axes.imshow(
            widths, aspect="auto", origin="lower", vmin=MIN_BITS, vmax=PARENT_BITS, cmap="viridis", interpolation="none"
        )
        axes.set_title(kind, fontsize="small", loc="left", pad=2)
        axes.set_yticks(range(len(found)), [f"{each.bits_per_weight:.2f}" for each in found], fontsize=6)
    maps[-1].set_xlabel("block")
    right.supylabel("bits per weight, scales included", fontsize="small")
    right.colorbar(image, ax=list(maps), label="width", ticks=list(WIDTHS))
    _save(figure, file)


def _label(axes: Any, text: str, x: float, y: float | None) -> None:
    """Name a point of a curve that falls to the right, on its free side."""
    axes.annotate(text, (x, y), textcoords="offset points", xytext=(5, 6))


def _figure(width: float, height: float) -> Any:
    """A figure of our own, not pyplot's: no global state and no display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigurationError('plots need matplotlib: pip install "matgptq[plot]"') from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, file: str | Path) -> None:
    try:
        figure.savefig(file, dpi=140, format=None if Path(file).suffix else "png")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file}: the plot cannot be written: {error}") from error
