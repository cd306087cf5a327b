"""The random models that the comparison with llama.cpp runs on, cut down to one block."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from matgptq.checkpoints.checkpoint import open_checkpoint

gguf = pytest.importorskip("gguf", reason="writes GGUF files")
VOCABULARY = 64


@pytest.fixture(scope="module")
def shape():
    file = Path(__file__).parents[1] / "benchmarks" / "llama_shape.py"
    specification = importlib.util.spec_from_file_location("llama_shape", file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q3_K", "Q2_K"])
def test_the_gguf_file(shape, tmp_path, name):
    kind, head = gguf.GGMLQuantizationType[name], gguf.GGMLQuantizationType.Q6_K
    shape.write_gguf(tmp_path / "model.gguf", kind, head, VOCABULARY, layers=1)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    matrices = {f"blk.0.{matrix}.weight": size[::-1] for matrix, *size in shape.MATRICES.values()}
    norms = {f"blk.0.{norm}.weight" for norm in shape.NORMS.values()} | {"output_norm.weight"}
    assert set(tensors) == set(matrices) | norms | {"token_embd.weight"}
    assert tensors["token_embd.weight"].tensor_type == head
    for matrix, size in matrices.items():
        assert tensors[matrix].tensor_type == kind
        assert list(tensors[matrix].shape) == size
    sample = gguf.quants.dequantize(tensors["blk.0.attn_k.weight"].data[:8], kind)
    assert np.isfinite(sample).all()
    assert 1e-3 < sample.std() < 0.2


def test_the_checkpoint(shape, tmp_path):
    shape.write_checkpoint(tmp_path / "model", VOCABULARY, layers=1)
    layers = open_checkpoint(tmp_path / "model").layers
    expected = {f"model.layers.0.{name}": tuple(size) for name, (_, *size) in shape.MATRICES.items()}
    assert {name: (layer.out_features, layer.in_features) for name, layer in layers.items()} == expected
