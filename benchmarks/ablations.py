"""What single ingredients, and things that the package does not do, do to the KL of ``balanced``.

    python benchmarks/ablations.py MODEL --calibration c4.txt --text wikitext2-test.txt --other wikipedia.txt \\
        -o benchmarks/results/ablations.json

Each line is the quality ``balanced`` with one change and, where it does not say otherwise, with each row of a weight
solved alone, as when most lines were measured. Changes that no option makes are made to the pipeline from here. They
are compared where choices are made, on the first 4 windows of the text. What weighs the tokens is the same in most
lines; with ``MATGPTQ_KEPT=DIRECTORY`` it is computed once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

import torch
from quality_table import EVALUATED, NSAMPLES, SEQLEN, Row, Texts, calibration_text, figure, make_table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from matgptq.calibration.block_hessians import collect_hessians
from matgptq.core.grid import refit_scales
from matgptq.core.output_hessian import OutputHessian, summed_tensors
from matgptq.core.solver import Solution, solve
from matgptq.machine.devices import fast_sums
from matgptq.models.blocks import Block, BlockInputs, run_block
from matgptq.models.source import open_source
from matgptq.nested_weight import NestedWeight
from matgptq.quantization import block_quantizer, calibration_gradients
from matgptq.quantization.block_quantizer import BlockQuantizer
from matgptq.recipe import Recipe
from matgptq.slicing import slice_levels
from matgptq.text.windows import SELF, calibration_windows

COARSE, FINE = 64, 32  # group sizes
TEXT = "windows 0-3"
BASE = "balanced, each row alone"
DAMPING = 0.01


# --- texts -----------------------------------------------------------------------------------------------------------


def other_text(texts: Texts) -> Path:
    """The text that other rows are only measured on: here windows of it that are not measured."""
    assert texts.other is not None
    whole = texts.other.read_text(encoding="utf-8")
    rest = texts.directory / "other.txt"
    rest.write_text(whole[len(whole) // 4 :], encoding="utf-8")  # the measured windows are its first 8,192 tokens
    return rest


def chat_text(texts: Texts) -> Path:
    """Documents as conversations: the user gives the first sentence, the assistant goes on."""
    file = texts.directory / "chat.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for document in texts.calibration.read_text(encoding="utf-8").split("\n\n"):
            first, _, rest = document.strip().partition(". ")
            if rest:
                turns = [{"role": "user", "content": f"{first}."}, {"role": "assistant", "content": rest}]
                lines.write(json.dumps({"messages": turns}) + "\n")
    return file


def mixed_text(texts: Texts) -> Tensor:
    """Equally many windows of the calibration text, the other text, conversations and what the model writes."""
    source = open_source(texts.model)
    tokenizer, model = source.load_tokenizer(), source.load_model(torch.float32, torch.device("cpu"))
    parts = (texts.calibration, other_text(texts), chat_text(texts), SELF)
    windows = [
        calibration_windows(part, tokenizer, nsamples=NSAMPLES // len(parts), seqlen=SEQLEN, seed=0, model=model).tokens
        for part in parts
    ]
    return torch.cat(windows)


# --- pipelines -------------------------------------------------------------------------------------------------------


@contextmanager
def fed_by_the_full_model() -> Iterator[None]:
    """Blocks see what they see in the full model."""
    original = BlockQuantizer.quantize

    def quantize_block(
        quantizer: BlockQuantizer, block: Block, index: int, inputs: list[BlockInputs], outputs: list[OutputHessian]
    ) -> Any:
        full = {layer: layer.weight.data for _, layer in block.layers()}
        found = original(quantizer, block, index, inputs, outputs)
        for layer, weight in full.items():
            layer.weight.data = weight
        return found

    with patch.object(BlockQuantizer, "quantize", quantize_block):
        yield


@contextmanager
def in_order(bits: int, matching: float = 0.0) -> Iterator[None]:
    """Layers see what the quantized layers before them, in the same block too, put out at some width.

    Args:
        bits: that width.
        matching: share of the way from the layer's own weight to the one whose output on these inputs is nearest to the
            full model's: ``W + share W (C - H) (H + d I)^-1`` with ``C`` the sum of ``x_full x^T``. The idea of GPTAQ
            (arXiv 2504.02692) and Qronos (arXiv 2505.11695), as a change of the target.

    Channels must not be scaled: layers are solved before the pipeline would do it.
    """
    full: list[Tensor] = []

    def quantize_block(
        quantizer: BlockQuantizer, block: Block, index: int, inputs: list[BlockInputs], outputs: list[OutputHessian]
    ) -> Any:
        (stream,) = inputs
        if index == 0:
            full[:] = list(stream.hidden)
        seen_full = _inputs_of(block, full, stream, index) if matching else {}
        finished: list[tuple[nn.Linear, Tensor]] = []
        solved: dict[int, Any] = {}
        for number, group in enumerate(block.inputs):
            hessian = collect_hessians(block, inputs, index, lambda: None, workers=quantizer._workers).matrices[number]
            named = [(f"{block.name}.{path}", layer) for path, layer in group]
            own = [layer.weight.data for _, layer in group]
            if matching:
                seen = _inputs_of(block, list(stream.hidden), stream, index)[group[0][0]]
                weights = stream.token_weights.get(named[0][0])
                cross = _cross(seen_full[group[0][0]], seen, weights)
                damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
                change = torch.linalg.solve(damped, (cross - hessian).T).T
                for _, layer in group:
                    layer.weight.data = layer.weight.data + matching * (layer.weight.data @ change)
            joined = next((each for each in outputs if named[0][0] in each.layers), None)
            solved[number] = quantizer.solve_layers(named, hessian, None, joined)
            for (_, layer), weight, before in zip(group, solved[number][0], own, strict=True):
                layer.weight.data = weight.dequantize(bits, layer.weight.dtype)
                finished.append((layer, before))
        quantized = [layer.weight.data for layer, _ in finished]
        for layer, before in finished:
            layer.weight.data = before
        if matching:
            with torch.no_grad():
                full[:] = [run_block(block, hidden, stream.arguments[index]) for hidden in full]
        # What is left, writing the block and installing what the next one is fed with, is the pipeline's own.
        given = iter(solved.values())
        with patch.object(quantizer, "solve_layers", lambda *_: next(given)):
            found = original(quantizer, block, index, inputs)
        for (layer, _), weight in zip(finished, quantized, strict=True):
            layer.weight.data = weight
        return found

    original = BlockQuantizer.quantize
    with patch.object(BlockQuantizer, "quantize", quantize_block):
        yield


def _inputs_of(block: Block, hidden: list[Tensor], stream: BlockInputs, index: int) -> dict[str, list[Tensor]]:
    """``{first layer of a group: what it sees of each batch}``."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, given, name=path: seen.setdefault(name, []).append(given[0].flatten(0, -2))
        )
        for path, layer in (group[0] for group in block.inputs)
    ]
    with torch.no_grad():
        for each in hidden:
            run_block(block, each, stream.arguments[index])
    for hook in hooks:
        hook.remove()
    return seen


def _cross(full: list[Tensor], seen: list[Tensor], weights: Tensor | None) -> Tensor:
    """``2/N sum c_t x_full x^T``, as Hessians are scaled."""
    total = torch.zeros(full[0].shape[1], full[0].shape[1])
    first, rows = 0, sum(len(each) for each in seen)
    counts = None if weights is None else weights.flatten()
    with fast_sums(total.device):  # as those of the Hessians, from which this is subtracted
        for mine, theirs in zip(full, seen, strict=True):
            scaled = mine if counts is None else mine * counts[first : first + len(mine), None]
            total += scaled.T @ theirs
            first += len(mine)
    return total.mul_(2 / rows)


@contextmanager
def fed_by(bits: int) -> Iterator[None]:
    """The next block sees the slice of some bits instead of the parent."""
    with patch.object(Recipe, "propagated_bits", PropertyMock(return_value=bits)):
        yield


@contextmanager
def fine_groups_at_two_bits() -> Iterator[None]:
    """Twice as many scales at 2 bits only: solved in coarse groups, then 2 bits refitted in fine ones."""

    def regrouped(
        weight: Tensor, hessian: Tensor | None, recipe: Recipe, group_size: int, workers: Any, outputs: Any = None
    ) -> Solution:
        solution = solve(weight, hessian, recipe, COARSE, workers, outputs)
        assert hessian is not None
        nested = solution.weight
        scales = {bits: each.repeat_interleave(COARSE // group_size, 1) for bits, each in nested.scales.items()}
        levels = slice_levels(nested.codes, 2, torch.float32)
        scales[2] = refit_scales(weight.float(), levels, scales[2], hessian).scales
        return replace(solution, weight=NestedWeight(nested.codes, scales))

    with patch.object(block_quantizer, "solve", regrouped):
        yield


@contextmanager
def kept_saliency(directory: Path | None) -> Iterator[None]:
    """Read what depends on the full model and the text alone from a directory, or leave it there."""
    original = calibration_gradients.token_saliency

    def saliency(
        residency: Any, blocks: Any, windows: Tensor, seed: int, *, output_hessians: list[OutputHessian], **options: Any
    ) -> dict[str, Tensor]:
        assert directory is not None
        digest = hashlib.sha256(windows.numpy().tobytes())
        embedding = residency.network.get_input_embeddings().weight  # another one in a rotated model
        digest.update(embedding[:64].numpy().tobytes())
        digest.update(repr([(each.layers, each.matrix.shape) for each in output_hessians]).encode())
        digest.update(repr(options["exponent"] if output_hessians else None).encode())
        file = directory / f"saliency-{seed}-{digest.hexdigest()[:16]}.safetensors"
        if not file.exists():
            found = original(residency, blocks, windows, seed, output_hessians=output_hessians, **options)
            sums = summed_tensors(output_hessians)
            save_file(found | {f"outputs.{name}": tensor for name, tensor in sums.items()}, file)
        kept = load_file(file)
        for name, tensor in summed_tensors(output_hessians).items():
            tensor.copy_(kept.pop(f"outputs.{name}"))
        return kept

    with patch.object(calibration_gradients, "token_saliency", saliency) if directory else nullcontext():
        yield


@contextmanager
def _both(change: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    kept = os.environ.get("MATGPTQ_KEPT")
    with kept_saliency(Path(kept) if kept else None), change():
        yield


def _row(
    name: str,
    change: Callable[[], AbstractContextManager[object]] = nullcontext,
    dataset: Callable[[Texts], str | Path | Tensor] = calibration_text,
    nsamples: int = NSAMPLES,
    seed: int = 0,
    **options: Any,
) -> Row:
    options = {"quality": "balanced", "rows_together": 0, **options}
    return Row(name, options, dataset=dataset, nsamples=nsamples, seed=seed, change=partial(_both, change))


ROWS = [
    _row(BASE),
    _row("rows together", rows_together=4096),
    _row("no channel scaling", channel_scaling=0.0),
    _row("channel scaling, exponent .5", channel_scaling=0.5),
    _row("draw of seed 1", seed=1),
    _row("no gradient weights", saliency=0.0),
    _row("no gradient weights, sink weight 64", saliency=0.0, sink_weight=64.0),
    _row("256 rows together", rows_together=256),
    _row("1024 rows together", rows_together=1024),
    _row("rows together, output damping .01", rows_together=4096, output_damping=0.01),
    _row("rows together, output damping .3", rows_together=4096, output_damping=0.3),
    _row("no coordinate passes", coordinate_passes=0),
    _row("only targets refitted", refit_bits=()),
    _row("no refit", refit=False, refit_bits=(), coordinate_passes=0),
    _row("rotated", rotate=True),
    _row("low bits first", bit_weights={2: 1e9, 3: 1e6, 4: 1e3, 8: 1.0}),
    _row("groups of 32", group_size=FINE),
    _row("groups of 32 at 2 bits only", fine_groups_at_two_bits, group_size=FINE),
    _row("fed by the full model", fed_by_the_full_model),
    _row("fed by 4 bits", partial(fed_by, 4)),
    _row("sequential order in a block", partial(in_order, 8), channel_scaling=0.0),
    _row("sequential order, fed by 4 bits", partial(in_order, 4), channel_scaling=0.0),
    _row("matching the full output, .25", partial(in_order, 8, 0.25), channel_scaling=0.0),
    _row("matching the full output, .25, fed by 4 bits", partial(in_order, 4, 0.25), channel_scaling=0.0),
    _row("matching the full output, 1, fed by 4 bits", partial(in_order, 4, 1.0), channel_scaling=0.0),
    _row("calibrated on Wikipedia", dataset=other_text),
    _row("calibrated on conversations", dataset=chat_text),
    _row("calibrated on the model's own text", dataset=lambda _: SELF),
    _row("calibrated on a mix", dataset=mixed_text),
    _row("64 windows", nsamples=64),
    _row("128 windows", nsamples=128),
]


def plot(records: list[dict[str, Any]], file: Path) -> None:
    """KL of each row over that of ``balanced``, at each width."""

    def kl(record: dict[str, Any]) -> dict[int, float]:
        return {result["bits"]: result["kl"] for result in record["texts"][TEXT]["results"]}

    base = kl(next(record for record in records if record["name"] == BASE))
    others = [record for record in records if record["name"] != BASE]
    with figure(file, (8, 0.4 * len(others) + 1.5)) as axes:
        for bits in EVALUATED:
            axes.plot(
                [kl(record)[bits] / base[bits] for record in others], range(len(others)), "o", label=f"{bits} bits"
            )
        axes.axvline(1, color="gray")
        axes.set_yticks(range(len(others)), [record["name"] for record in others])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel("KL / KL of balanced")


if __name__ == "__main__":
    make_table(ROWS, __file__, __doc__, plot, [TEXT])
