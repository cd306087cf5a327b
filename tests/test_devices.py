"""Where and in what precision a model runs."""

from __future__ import annotations

import pytest
import torch

from matgptq import native
from matgptq.machine.devices import exact_products, fast_products, multiplies_bfloat16

CPU = torch.device("cpu")


@pytest.mark.parametrize("tiles", [True, False])
def test_fast_products_are_bfloat16_inside_only_and_sums_stay_float32(tiles, monkeypatch):
    monkeypatch.setattr("matgptq.machine.devices.multiplies_bfloat16", lambda device: tiles)
    layer = torch.nn.Linear(64, 64)
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    exact = layer(inputs)
    with torch.no_grad(), fast_products(CPU):
        product = layer(inputs)
        assert product.dtype == (torch.bfloat16 if tiles else torch.float32)
        assert (inputs + product).dtype == torch.float32
    torch.testing.assert_close(product.float(), exact, rtol=2e-2, atol=2e-2)
    assert torch.equal(layer(inputs), exact)


def test_fast_products_end_with_an_error(monkeypatch):
    def fail():
        with fast_products(CPU):
            assert torch.get_float32_matmul_precision() == "medium"
            raise RuntimeError("inside")

    monkeypatch.setattr("matgptq.machine.devices.multiplies_bfloat16", lambda device: True)
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.get_float32_matmul_precision() == before
    assert not torch.is_autocast_enabled("cpu")


def test_exact_products_are_float32() -> None:
    left, right = (torch.randn(128, 128, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    with exact_products(CPU):
        found = torch.mm(left, right)
    expected = left.double() @ right.double()
    # bfloat16 factors would be off by 2^-9.
    assert float((found - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize(
    ("vendor", "capability", "tiles", "asks_onednn"),
    [
        ("amd", "AVX512", False, True),
        ("intel", "AVX512", False, False),
        ("amd", "AVX2", False, False),
        ("amd", "AVX512", True, False),  # oneDNN would round to bfloat16 there
    ],
)
def test_exact_products_ask_onednn_where_it_is_exact_and_faster(vendor, capability, tiles, asks_onednn, monkeypatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("matgptq.machine.devices._supports", lambda name: tiles)
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native, "cpu_vendor", lambda: vendor)
    before = torch.get_float32_matmul_precision()
    with exact_products(CPU), exact_products(CPU):
        assert torch.get_float32_matmul_precision() == ("medium" if asks_onednn else before)
    with exact_products(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == before
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("supported", [True, False])
def test_on_arm_onednn_says_whether_bfloat16_is_fast(monkeypatch, supported):
    monkeypatch.setattr("matgptq.machine.devices.platform.machine", lambda: "aarch64")
    monkeypatch.setattr("matgptq.machine.devices._supports", lambda name: not supported)  # what x86 would go by
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported, raising=False)
    assert multiplies_bfloat16(CPU) is supported
