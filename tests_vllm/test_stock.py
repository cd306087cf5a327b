"""vLLM without our package serves what we export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from server import Server
from test_serving import BFLOAT16_MEAN_TOLERANCE, _difference, _log_probs, _reference, _tokens

import matgptq


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_export_at_four_bits(real: Path, serve: Callable[..., Server], tmp_path: Path, form: str) -> None:
    exported = tmp_path / "export"
    matgptq.export(real, exported, format=form, bits=4)
    # Imported by every process of the server when it starts: from then on `import matgptq` fails.
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys\nsys.modules['matgptq'] = None\n")
    # VLLM_CPU_INT4_W4A8=0: by default its kernel rounds activations to 8 bits where the processor has AMX.
    server = serve(exported, "--dtype", "bfloat16", PYTHONPATH=str(hidden), VLLM_PLUGINS="", VLLM_CPU_INT4_W4A8="0")
    tokens = _tokens(real)
    wanted = _log_probs(_reference(real, "bfloat16", bits=4), tokens)
    assert _difference(server.log_probs(tokens), wanted)[1] < BFLOAT16_MEAN_TOLERANCE
    assert "matgptq: serving" not in server.log.read_text()
