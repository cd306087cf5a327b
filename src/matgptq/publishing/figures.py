"""How measured numbers are written for people, in the terminal and in a model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MEGABYTE = 1_000_000


def megabytes(count: int) -> str:
    """A size."""
    return f"{count / MEGABYTE:,.1f} MB"


def perplexity(value: float) -> str:
    """A perplexity; that of a broken model has an exponent."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def divergence(value: float | None) -> str:
    """A KL divergence; a dash if none was measured."""
    return "-" if value is None else f"{value:.4f}"


def share(value: float | None) -> str:
    """A share as a percentage; a dash if none was measured."""
    return "-" if value is None else f"{value:.1%}"


def score(value: float, stderr: float | None) -> str:
    """A task's score and its standard error."""
    return f"{value:.3f}" + ("" if stderr is None else f" ± {stderr:.3f}")


def width(bits: float, allocation: str | None, unit: str = "") -> str:
    """A width, or the average of an allocation and its name."""
    return f"{bits:.4g}{unit}" + ("" if allocation is None else f" ({allocation})")


def settings(served: Mapping[str, Any]) -> str:
    """What is not usual about how a model was served, to be put behind the text or tasks that it was measured on."""
    special = [f"activations in {served['activations']}"] if served.get("activations", "exact") != "exact" else []
    if served.get("head_bits") is not None:
        special.append(f"output head at {served['head_bits']} bits")
    return "".join(f", {each}" for each in special)
