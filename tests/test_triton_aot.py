"""The GPU's kernels compiled for cards that are not here: what only the compiler can get wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "triton_aot.py"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """What the compiler says of the kernels of default launches that need the most registers."""
    directory = tmp_path_factory.mktemp("aot")
    output = directory / "aot.json"
    # A process of its own: here, Triton may be in its interpreter, which compiles nothing.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(directory / "cache")
    subprocess.run([sys.executable, SCRIPT, "--quick", "-o", output], check=True, env=environment, capture_output=True)
    return json.loads(output.read_text(encoding="utf-8"))["kernels"]


def test_nothing_is_spilled(kernels):
    assert {kernel["target"] for kernel in kernels} == {"sm_80", "sm_90"}
    assert {kernel["kernel"] for kernel in kernels} == {"fused", "staged", "dequantize", "sweep"}
    assert [kernel for kernel in kernels if kernel["spilled_bytes"]] == []


def test_products_stay_in_registers(kernels):
    for kernel in kernels:
        if kernel["kernel"] == "fused":
            loop = kernel["loop"]
            assert loop["shared_accesses"] == loop["barriers"] == 0, kernel
            assert loop["other_loads"] == 2 * kernel["units"] // kernel["warps"]  # a group's scales: 8 bytes
            assert loop["wide_loads"] >= kernel["bits"]
            assert loop["matrix_instructions"] >= 16
        if kernel["kernel"] == "staged":  # once unpacked, all warps multiply what one of them put there
            assert kernel["loop"]["matrix_instructions"] >= 8
            assert kernel["loop"]["shared_accesses"] > 0
        if kernel["kernel"] == "dequantize":
            assert kernel["shared_bytes"] == 0
