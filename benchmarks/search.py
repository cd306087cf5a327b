"""What a width per layer gains: the search against uniform widths and against plain evolution.

    python benchmarks/search.py CHECKPOINT --calibration c4.txt --text wikitext2-test.txt \\
        -o benchmarks/results/search.json --plot benchmarks/results/search.png

CHECKPOINT is quantized as the row "matgptq" of benchmarks/quality.py. Every search runs on a copy of it, so that none
finds the table of another, in a process of its own; what it found is measured in float32 on windows of the text that
neither calibration nor search saw.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine

import matgptq
from matgptq.budget import SearchSpace
from matgptq.calibration import evaluation_windows
from matgptq.checkpoint import open_checkpoint
from matgptq.evaluation import Divergence
from matgptq.families import find_family
from matgptq.layer_groups import group_layers
from matgptq.slicing import WIDTHS
from matgptq.source import load_tokenizer, open_source

CODE_BITS = (2.5, 3.0, 3.5, 4.5)  # average width of the codes
COMPARED = 3.0  # where both methods spend what they need
SWEEP = "2.25:6:0.25"
SEQLEN = 2048
Allocation = Mapping[str, int]


def run_search(checkpoint: Path, calibration: str, options: list[str], keep: Path | None = None) -> dict[str, Any]:
    """One ``matgptq search`` on a copy of the checkpoint; its result, its wall time and its log."""
    with tempfile.TemporaryDirectory() as directory:
        copy = shutil.copytree(checkpoint, Path(directory) / "checkpoint", ignore=shutil.ignore_patterns("search", "allocations"))
        result = Path(directory) / "result.json"
        command = [sys.executable, "-m", "matgptq.cli", "search", str(copy), "--dataset", calibration, "--json", str(result)]
        started = time.monotonic()
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        log = [json.loads(line) for line in (copy / "search" / "log.jsonl").read_text().splitlines()]
        if keep is not None:
            shutil.copy(result, keep)
        return {"wall_seconds": round(seconds, 1), "log": log, **json.loads(result.read_text())}


class HeldOut:
    """KL of allocations to the full model in float32, on text of which the search saw nothing."""

    def __init__(self, checkpoint: Path, text: str, windows: range) -> None:
        opened = open_checkpoint(checkpoint)
        family = find_family(str(opened.config["model_type"]))
        self.space = SearchSpace(group_layers(opened.layers, family), WIDTHS, opened.other_bytes)
        self._tokens = evaluation_windows(
            text, load_tokenizer(checkpoint), windows=windows.stop, seqlen=SEQLEN
        ).tokens[windows.start :]
        self._model = matgptq.load(checkpoint, 8)
        full = open_source(str(opened.settings.source)).load_model(torch.float32)
        with torch.inference_mode():
            self._reference = [full.model(input_ids=window[None], use_cache=False).last_hidden_state for window in self._tokens]
        self._head = full.lm_head
        self._known: dict[tuple[int, ...], float] = {}

    def __call__(self, genome: tuple[int, ...]) -> float:
        """Mean KL in nats per token."""
        if genome not in self._known:
            self._model.set_bits(self.space.allocation(genome))
            divergence = Divergence()
            with torch.inference_mode():
                for window, hidden in zip(self._tokens, self._reference, strict=True):
                    logits = self._model(input_ids=window[None], use_cache=False).logits[0, :-1]
                    divergence.add(logits, window[1:], self._head(hidden)[0, :-1])
            self._known[genome] = divergence.kl / divergence.tokens
        return self._known[genome]
