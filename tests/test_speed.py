"""The speed report: what it counts and what it refuses. How fast anything is, is for benchmarks."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import matgptq
from matgptq import native
from matgptq.checkpoints.checkpoint import open_checkpoint
from matgptq.cli import app
from matgptq.errors import ConfigurationError
from matgptq.evaluation.speed import REFERENCE_BITS, measure_speed
from matgptq.inference.nested_linear import nested_layers

FIELDS = {
    "bits",
    "batch",
    "decode_tokens_per_second",
    "prompt_tokens_per_second",
    "bytes_per_token",
    "bandwidth_share",
    "overhead_share",
    "resident_bytes",
}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2"])
def test_every_width_and_batch_beside_the_full_model(name, make_checkpoint):
    source, out = make_checkpoint(name)
    results = measure_speed(out, (2, 8), batches=(1, 3), prompt=16, new_tokens=2, reference=source)
    assert [(result.batch, result.bits) for result in results] == [
        (batch, bits) for batch in (1, 3) for bits in (2, 8, REFERENCE_BITS)
    ]
    for result in results:
        assert result.decode_tokens_per_second > 0
        assert result.prompt_tokens_per_second > 0
        assert result.bandwidth_share > 0
    by_bits = {result.bits: result for result in results}
    assert by_bits[8].bytes_per_token < by_bits[REFERENCE_BITS].bytes_per_token
    if native.available():
        assert by_bits[2].bytes_per_token < by_bits[8].bytes_per_token
    full = by_bits[REFERENCE_BITS]
    assert full.overhead_share is None
    model = matgptq.load(out)
    head = model.get_output_embeddings().weight.numel()
    quantized = sum(layer.in_features * layer.out_features for layer in nested_layers(model).values())
    small = sum(p.numel() for n, p in model.named_parameters() if "norm" in n or "bias" in n)
    assert full.bytes_per_token == 2 * (quantized + head + small)


@pytest.mark.skipif(not native.available(), reason=native.reason() or "native library")
def test_packed_slices_take_the_memory_of_their_width(make_checkpoint):
    _, out = make_checkpoint("llama")
    results = {resident: measure_speed(out, (2, 8), prompt=4, new_tokens=1, resident=resident)
               for resident in (True, False)}  # fmt: skip
    parent, packed = ({result.bits: result for result in results[resident]} for resident in (True, False))
    assert parent[2].resident_bytes == parent[8].resident_bytes
    assert packed[2].resident_bytes < packed[8].resident_bytes < parent[8].resident_bytes
    assert packed[2].bytes_per_token < parent[2].bytes_per_token  # a resident parent reads one plane more


@pytest.mark.skipif(not native.available(), reason=native.reason() or "native library")
def test_a_head_at_few_bits_is_counted(make_checkpoint):
    _, out = make_checkpoint("llama-tied")
    exact, small = (measure_speed(out, (8,), prompt=4, new_tokens=1, head_bits=bits)[0] for bits in (None, 4))
    assert small.bytes_per_token < exact.bytes_per_token
    assert small.resident_bytes > exact.resident_bytes  # the embedding table stays


def test_the_command(make_checkpoint, tmp_path):
    _, out = make_checkpoint("llama")
    file = tmp_path / "speed.json"
    done = CliRunner().invoke(
        app, ["bench", str(out), "--bits", "4", "--prompt", "8", "--new-tokens", "2", "--json", str(file)]
    )
    assert done.exit_code == 0, done.output
    records = json.loads(file.read_text())
    assert [record["bits"] for record in records] == [4, 16]
    assert all(set(record) == FIELDS for record in records)


def test_an_exported_slice_is_timed_at_its_width(make_checkpoint, tmp_path):
    out = make_checkpoint("llama")[1]
    layers = list(open_checkpoint(out).layers)
    for name, options in (("one", {"bits": 3}), ("mixed", {"allocation": {layers[0]: 2}, "bits": 4})):
        matgptq.export(out, tmp_path / name, format="matgptq-slice", **options)
        found = measure_speed(tmp_path / name, prompt=8, new_tokens=2)
        assert {each.bits for each in found} == {
            16,
            open_checkpoint(tmp_path / name, slices=True).average_bits(
                open_checkpoint(tmp_path / name, slices=True).widths_held[0]
            ),
        }


def test_refusals(make_checkpoint):
    _, out = make_checkpoint("llama")
    with pytest.raises(ConfigurationError, match="context"):
        measure_speed(out, (4,), prompt=10_000)
    with pytest.raises(ConfigurationError, match="at least 1"):
        measure_speed(out, (4,), batches=(0,))
    with pytest.raises(ConfigurationError, match="9"):
        measure_speed(out, (9,))
