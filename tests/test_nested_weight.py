"""A nested weight: which scales a width reads, how rows are cut apart, what is refused."""

from __future__ import annotations

import pytest
import torch
from brute_force import WIDTHS, slice_weights

from matgptq.errors import ConfigurationError
from matgptq.nested_weight import NestedWeight, layer_bits, scale_source


def random_nested(rows=5, columns=12, groups=3, widths=(3, 8)):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    return NestedWeight(codes, {bits: torch.randn(rows, groups, generator=generator) for bits in widths})


def test_a_width_reads_its_own_scales_or_the_next_larger():
    assert scale_source([8, 2, 4]) == {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
    assert scale_source([8]) == dict.fromkeys(WIDTHS, 8)
    with pytest.raises(ConfigurationError, match="8 bits"):
        scale_source([2, 4])


def test_dequantizes_every_width():
    nested = random_nested()
    assert nested.group_size == 4
    for bits in WIDTHS:
        scales = nested.scales[3 if bits <= 3 else 8]
        assert nested.scales_for(bits) is scales
        assert torch.equal(nested.dequantize(bits), slice_weights(nested.codes, scales, bits).float())


def test_split_rows_undoes_a_stack():
    nested = random_nested()
    parts = nested.split_rows([2, 1, 2])
    assert [part.codes.shape for part in parts] == [(2, 12), (1, 12), (2, 12)]
    for bits in WIDTHS:
        assert torch.equal(torch.cat([part.dequantize(bits) for part in parts]), nested.dequantize(bits))


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        (torch.zeros(2, 8), {8: torch.ones(2, 2)}, "must be uint8"),
        (torch.zeros(8, dtype=torch.uint8), {8: torch.ones(2, 2)}, "must be uint8"),
        (torch.zeros(2, 8, dtype=torch.uint8), {4: torch.ones(2, 2)}, "8 bits"),
        (torch.zeros(2, 8, dtype=torch.uint8), {8: torch.ones(2, 2), 4: torch.ones(2, 4)}, "one shape"),
        (torch.zeros(2, 8, dtype=torch.uint8), {8: torch.ones(3, 2)}, "do not fit"),
        (torch.zeros(2, 8, dtype=torch.uint8), {8: torch.ones(2, 3)}, "do not fit"),
        (torch.zeros(2, 8, dtype=torch.uint8), {8: torch.ones(2, 0)}, "do not fit"),
    ],
)
def test_refuses_tensors_that_do_not_fit(codes, scales, message):
    with pytest.raises(ConfigurationError, match=message):
        NestedWeight(codes, scales)


def test_refuses_an_unservable_width():
    with pytest.raises(ConfigurationError, match="bits must be"):
        random_nested().scales_for(9)


def test_layer_bits_counts_codes_and_scales():
    assert layer_bits(3, 128, 64, 2) == 3 * 128 * 2 + 3 * 2 * 16
    assert layer_bits(4, 37, 37, 8) == 4 * 37 * 8 + 4 * 16
