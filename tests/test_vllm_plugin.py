"""What of the vLLM plugin needs no vLLM; ``tests_vllm`` has the rest."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import matgptq
from matgptq import native
from matgptq.bit_stream import pack_rows
from matgptq.checkpoints.checkpoint import Checkpoint, open_checkpoint
from matgptq.checkpoints.format import Settings
from matgptq.errors import AllocationError, CheckpointError, ConfigurationError
from matgptq.kernels import dispatch, packed_weight
from matgptq.nested_weight import NestedWeight
from matgptq.slicing import WIDTHS, slice_codes
from matgptq.vllm_plugin.choice import Choice, ServedLayer, chosen_layers, held_layers, read_choice
from matgptq.vllm_plugin.fused_experts import ExpertParts, FusedExperts
from matgptq.vllm_plugin.fused_linear import FusedLinear, Part
from matgptq.vllm_plugin.stored_parts import all_scales, check_guard, check_scales, codes_name, scales_of, unpack_slice
from matgptq.vllm_plugin.vllm_version import check_version

needs_native = pytest.mark.skipif(not native.available(), reason=f"no native library: {native.reason()}")


def _part(rows: int, bits: int, columns: int = 192, group_size: int = 64, seed: int = 0) -> Part:
    generator = torch.Generator().manual_seed(seed + rows + bits)
    codes = torch.randint(0, 256, (rows, columns), generator=generator).to(torch.uint8)
    scales = torch.rand(rows, columns // group_size, generator=generator).mul(0.01).add(1e-3).bfloat16().half()
    return Part(codes, scales, bits)


def _wanted(x: torch.Tensor, parts: list[Part], bias: torch.Tensor | None) -> torch.Tensor:
    weights = [NestedWeight(part.codes, {8: part.scales}).dequantize(part.bits) for part in parts]
    return torch.nn.functional.linear(x.double(), torch.cat(weights).double(), None if bias is None else bias.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
def test_experts_are_weighted_sums_of_those_that_were_chosen(tokens: int, dtype: torch.dtype) -> None:
    hidden, inner, count = 192, 64, 4
    experts = [
        ExpertParts(
            _part(inner, 2 + number, hidden, seed=number),
            _part(inner, 8 - number, hidden, seed=10 + number),
            _part(hidden, 3 + number, inner, 32, seed=20 + number),
        )
        for number in range(count)
    ]
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    # The last expert is never chosen.
    chosen = torch.stack(
        [torch.randperm(count - 1, generator=generator)[:2] for _ in range(tokens)] or [torch.empty(2)]
    )
    chosen = chosen.long()[:tokens]
    weights = torch.rand(tokens, 2, generator=generator)
    layer = FusedExperts("experts", experts, torch.nn.functional.silu, dtype)
    found = layer.product(x, weights, chosen)
    compiled = torch.compile(lambda *given: layer.product(*given) + 0, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weights, chosen), found)
    expected = torch.zeros(tokens, hidden, dtype=torch.float64)
    for token in range(tokens):
        for weight, number in zip(weights[token], chosen[token], strict=True):
            each, row = experts[int(number)], x[token : token + 1]
            gate, up = (_wanted(row, [part], None) for part in (each.gate, each.up))
            expected[token] += weight * _wanted(torch.nn.functional.silu(gate) * up, [each.down], None)[0]
    assert found.dtype == dtype
    unit = torch.finfo(dtype).eps
    largest = float(expected.abs().max()) if tokens else 0.0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=8 * unit * largest)


@pytest.mark.parametrize("widths", [(4, 4, 4), (8, 3, 4), (4, 4, 2), (2,)])
@pytest.mark.parametrize("shape", [(1, 192), (5, 192), (40, 192), (2, 3, 192), (0, 192)])
@pytest.mark.parametrize("biased", [False, True])
def test_fused_products(widths: tuple[int, ...], shape: tuple[int, ...], biased: bool) -> None:
    parts = [_part(rows, bits) for rows, bits in zip((96, 33, 32), widths, strict=False)]
    layer = FusedLinear("layer", parts, torch.float32)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-1, 1, layer.out_features) if biased else None
    torch.testing.assert_close(layer.product(x, bias).double(), _wanted(x, parts, bias), rtol=1e-5, atol=1e-5)
    # The next call may come with another bias, or none.
    torch.testing.assert_close(layer.product(x, None).double(), _wanted(x, parts, None), rtol=1e-5, atol=1e-5)


def test_neighbours_of_one_width_are_one_matrix() -> None:
    parts = [_part(96, 4), _part(32, 4), _part(32, 3)]
    assert FusedLinear("layer", parts, torch.float32).bits == [4, 3]


def test_groups_that_no_kernel_takes() -> None:
    parts = [_part(32, 3, group_size=16), _part(32, 5, group_size=16)]
    layer = FusedLinear("layer", parts, torch.float32)
    x = torch.randn(3, 192)
    assert layer.obstacle is not None
    torch.testing.assert_close(layer.product(x, None).double(), _wanted(x, parts, None), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigurationError, match=r"layer odd: activations='int8'.*groups of 16"):
        FusedLinear("odd", parts, torch.float32, "int8")


def test_compiled_products_and_names() -> None:
    parts = [_part(96, 8), _part(32, 3)]
    first, second = (FusedLinear("layer", parts, torch.float32) for _ in range(2))
    assert (first.key, second.key) == ("layer", "layer#2")
    x, bias = torch.randn(3, 192), torch.randn(128)
    compiled: Any = torch.compile(first.product, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, bias), first.multiply(x, bias))
    torch.library.opcheck(torch.ops.matgptq.fused_linear, (x, bias, first.key, first.out_features))
    del first, compiled
    torch._dynamo.reset()
    gc.collect()
    assert FusedLinear("layer", parts, torch.float32).key == "layer"  # the name is free again


@needs_native
def test_joined_products_are_the_shared_ones() -> None:
    x = torch.randn(4, 192).bfloat16()
    weights = [
        packed_weight.pack(NestedWeight(part.codes, {8: part.scales}), part.bits)
        for part in (_part(64, 3), _part(32, 6))
    ]
    operands = [dispatch.Operand(weights[0], 3, torch.randn(64)), dispatch.Operand(weights[1], 6, None)]
    for activations in ("exact", "int8"):
        shared = dispatch.matmul_shared(x, operands, activations=activations)
        joined = dispatch.JoinedProduct(operands, activations=activations)
        assert torch.equal(joined(x), torch.cat(shared, 1))
        assert torch.equal(joined(x[:, None]), torch.cat(shared, 1)[:, None])


def test_wishes() -> None:
    record = {"quant_method": "matgptq", "bits": 4, "allocation": {"a": 3}}
    assert read_choice({}, {}) == Choice()
    assert read_choice(record, {}) == Choice(4, {"a": 3})
    assert read_choice(record, {"MATGPTQ_BITS": "3", "MATGPTQ_ALLOCATION": "small"}) == Choice(3, "small")
    assert read_choice({}, {"MATGPTQ_BITS": "", "MATGPTQ_ACTIVATIONS": "int8"}) == Choice(activations="int8")
    for record, environment in (({"bits": 9}, {}), ({}, {"MATGPTQ_BITS": "x"}), ({"allocation": 3}, {})):
        with pytest.raises(ConfigurationError):
            read_choice(record, environment)


def _widths(choice: Choice, opened: Checkpoint) -> dict[str, int]:
    return {name: layer.bits for name, layer in chosen_layers(choice, opened).items()}


def test_widths_of_a_parent(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    first = next(iter(opened.layers))
    assert set(_widths(Choice(), opened).values()) == {opened.settings.bits}
    assert set(_widths(Choice(bits=3), opened).values()) == {3}
    mixed = _widths(Choice(bits=3, allocation={first: 6}), opened)
    assert mixed == dict.fromkeys(opened.layers, 3) | {first: 6}
    with pytest.raises(AllocationError, match="no such allocation"):
        chosen_layers(Choice(allocation="absent"), opened)


def test_widths_of_a_slice(checkpoint: Path, tmp_path: Path) -> None:
    widths = dict.fromkeys(open_checkpoint(checkpoint).layers, 3)
    widths[next(iter(widths))] = 5
    matgptq.export(checkpoint, tmp_path / "slice", format="matgptq-slice", allocation=widths)
    opened = open_checkpoint(tmp_path / "slice", slices=True)
    assert _widths(Choice(bits=3), opened) == widths
    with pytest.raises(AllocationError, match="holds only the slice"):
        chosen_layers(Choice(bits=4), opened)


def test_what_a_stack_of_vllm_holds() -> None:
    layer = ServedLayer(3, 64)
    attention, mlp = ([f"model.layers.0.{name}_proj" for name in names.split()] for names in ("q k v o", "gate up"))

    def held(prefix: str, layers: list[str], plain: list[str]) -> list[str] | None:
        found = held_layers(f"model.layers.0.{prefix}", {"qkv_proj": ["q_proj", "k_proj", "v_proj"]},
                            dict.fromkeys(layers, layer), plain)  # fmt: skip
        return None if found is None else [*found]

    assert held("qkv_proj", attention, mlp) == attention[:3]
    assert held("o_proj", attention, mlp) == attention[3:]
    # Asked for by the name of the stack: a block, or a stack of it, at full precision.
    assert held("gate_up_proj", attention, mlp) == []
    assert held("qkv_proj", mlp, attention) == []
    assert held("o_proj", mlp, attention) == []
    fused = ["model.layers.0.qkv_proj"]  # Phi-3
    assert held("qkv_proj", fused, []) == fused
    assert held("qkv_proj", [], fused) == []
    assert held("qkv_proj", mlp, attention[:2]) is None
    assert held("norm", attention, mlp) is None
    with pytest.raises(CheckpointError, match=r"up_proj: vLLM stacks it with .*gate_proj, but it is not quantized"):
        held("gate_up_proj", mlp[:1], mlp[1:])


@pytest.mark.parametrize(
    ("version", "accepted"), [("0.25.3", False), ("0.26.0", True), ("0.33.1+cpu", True), ("1.0", True)]
)
def test_versions_of_vllm(version: str, accepted: bool) -> None:
    if accepted:
        check_version(version)
    else:
        with pytest.raises(ConfigurationError, match=r"vLLM 0\.25\.3 is too old"):
            check_version(version)


def test_the_plugin_imports_neither_vllm_nor_torch() -> None:
    script = "import sys, matgptq.vllm_plugin; sys.exit('vllm' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_groups_that_kernels_take() -> None:
    assert packed_weight.group_obstacle(64, 128) is None
    assert packed_weight.group_obstacle(48, 48) is None
    assert packed_weight.group_obstacle(48, 96) is not None


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("in_features", [32, 40, 96])
def test_what_is_stored_of_a_slice(bits: int, in_features: int) -> None:
    codes = torch.randint(0, 256, (5, in_features), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    found = unpack_slice(pack_rows(slice_codes(codes, bits), bits), in_features)
    assert torch.equal(slice_codes(found, bits), slice_codes(codes, bits))


def test_names_of_what_is_stored() -> None:
    parent = Settings(8, (2, 8), (3, 8), 32)
    assert (codes_name(parent), all_scales(parent)) == ("codes", ["scales_3", "scales_8"])
    assert [scales_of(parent, bits) for bits in (2, 3, 4, 8)] == ["scales_3", "scales_3", "scales_8", "scales_8"]
    one = Settings(4, (), (), 32, layer_bits={})
    assert (codes_name(one), all_scales(one), scales_of(one, 4)) == ("sliced_codes", ["sliced_scales"], "sliced_scales")


@pytest.mark.parametrize(("value", "message"), [(math.nan, "not all there"), (math.inf, "NaN or Inf"), (0.0, "zero")])
def test_scales_that_are_not_there(value: float, message: str) -> None:
    check_scales("x", torch.ones(2, 3))
    with pytest.raises(CheckpointError, match=f"layer a: scales_8 .*{message}"):
        check_scales("layer a: scales_8", torch.tensor([1.0, value]))


def test_a_weight_beside_codes() -> None:
    check_guard("a weight", torch.empty(0))
    with pytest.raises(CheckpointError, match=r"a weight \[3\] stands beside codes"):
        check_guard("a weight", torch.ones(3))
