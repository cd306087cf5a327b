"""Where and in what precision a model runs."""

from __future__ import annotations

import pytest
import torch

from matgptq.devices import fast_products, multiplies_bfloat16

CPU = torch.device("cpu")


@pytest.mark.parametrize("tiles", [True, False])
def test_fast_products_are_bfloat16_inside_only_and_sums_stay_float32(tiles, monkeypatch):
    monkeypatch.setattr("matgptq.devices.multiplies_bfloat16", lambda device: tiles)
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

    monkeypatch.setattr("matgptq.devices.multiplies_bfloat16", lambda device: True)
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.get_float32_matmul_precision() == before
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("supported", [True, False])
def test_on_arm_onednn_says_whether_bfloat16_is_fast(monkeypatch, supported):
    monkeypatch.setattr("matgptq.devices.platform.machine", lambda: "aarch64")
    monkeypatch.setattr("matgptq.devices._supports", lambda name: not supported)  # what x86 would go by
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported, raising=False)
    assert multiplies_bfloat16(CPU) is supported
