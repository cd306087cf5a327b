"""The slice, for every code and width, against a definition by fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from brute_force import WIDTHS, slice_code
from hypothesis import given, settings
from hypothesis import strategies as st

from matgptq.errors import ConfigurationError
from matgptq.slicing import check_bits, check_widths, dequantize, level_table, slice_codes, slice_levels

CODES = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_rounds_half_up_and_saturates(bits):
    sliced = slice_codes(CODES, bits)
    assert sliced.dtype == torch.uint8
    assert sliced.tolist() == [slice_code(code, bits) for code in range(256)]


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_level(bits):
    expected = [slice_code(code, bits) * 2 ** (8 - bits) - 128 for code in range(256)]
    assert level_table(bits).tolist() == expected
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int16):
        levels = slice_levels(CODES, bits, dtype)
        assert levels.dtype == dtype
        assert levels.tolist() == expected


@pytest.mark.parametrize("bits", range(2, 8))
def test_one_bit_below_the_slice_decides_it_and_fewer_do_not(bits):
    def kept(count: int) -> torch.Tensor:
        return CODES >> (8 - count) << (8 - count)

    assert torch.equal(slice_codes(kept(bits + 1), bits), slice_codes(CODES, bits))
    assert not torch.equal(slice_codes(kept(bits), bits), slice_codes(CODES, bits))


def test_slices_do_not_compose():
    padded = slice_codes(CODES, 4) << 4
    assert not torch.equal(slice_codes(padded, 3), slice_codes(CODES, 3))


def test_slicing_leaves_the_parent_alone():
    for bits in WIDTHS:
        codes = CODES.clone()
        slice_codes(codes, bits).fill_(0)
        slice_levels(codes, bits).fill_(0)
        assert torch.equal(codes, CODES)
    level_table(3).fill_(0)
    assert level_table(3)[0] == -128


@pytest.mark.parametrize("shape", [(), (0,), (256,), (2, 2, 64)])
def test_keeps_the_shape(shape):
    codes = torch.full(shape, 200, dtype=torch.uint8)
    assert slice_codes(codes, 4).shape == shape
    assert slice_levels(codes, 4).shape == shape


@pytest.mark.parametrize("bits", WIDTHS)
@settings(deadline=None, max_examples=20, derandomize=True)
@given(mantissa=st.integers(128, 255), exponent=st.integers(-24, 2), negative=st.booleans())
def test_a_slice_is_a_symmetric_integer_weight(bits, mantissa, exponent, negative):
    scale = Fraction(mantissa, 128) * Fraction(2) ** exponent * (-1 if negative else 1)
    own_scale = scale * 2 ** (8 - bits)
    expected = [own_scale * (slice_code(code, bits) - 2 ** (bits - 1)) for code in range(256)]
    weights = dequantize(CODES.view(1, 256), torch.tensor([[float(scale)]]), bits)
    assert [Fraction(value) for value in weights[0].tolist()] == expected


def test_each_group_reads_its_own_scale():
    codes = torch.randint(0, 256, (3, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([[1.0, 2.0], [-3.0, 0.5], [0.25, -7.0]])
    weights = dequantize(codes, scales, 3)
    for row in range(3):
        for column in range(8):
            level = slice_code(int(codes[row, column]), 3) * 32 - 128
            assert weights[row, column] == scales[row, column // 4] * level


def test_the_product_is_rounded_once():
    scales = torch.full((1, 1), 1 + 2**-7)
    codes = torch.tensor([[255]], dtype=torch.uint8)
    exact = torch.tensor(127 * (1 + 2**-7))
    for dtype in (torch.bfloat16, torch.float16):
        weights = dequantize(codes, scales.to(dtype), 8, dtype)
        assert weights.dtype == dtype
        assert weights.item() == exact.to(dtype).item()


@pytest.mark.parametrize("bits", [1, 9, 0, -2, 3.0, "3", None, True])
def test_refuses_a_width(bits):
    message = "bits must be an integer from 2 to 8"
    with pytest.raises(ConfigurationError, match=message):
        check_bits(bits)
    with pytest.raises(ConfigurationError, match=message):
        slice_codes(CODES, bits)
    with pytest.raises(ConfigurationError, match=message):
        level_table(bits)
    with pytest.raises(ConfigurationError, match=message):
        check_widths([8, bits])


def test_widths_are_sorted_without_repeats():
    assert check_widths(iter([8, 2, 4, 2])) == (2, 4, 8)
    with pytest.raises(ConfigurationError, match="at least one width"):
        check_widths([])


def test_refuses_codes_that_are_not_bytes():
    with pytest.raises(ConfigurationError, match=r"must be torch.uint8, not torch.int64"):
        slice_codes(torch.arange(4), 4)


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (2, 0), (1, 2)])
def test_refuses_scales_that_do_not_fit(shape):
    with pytest.raises(ConfigurationError, match="do not fit codes"):
        dequantize(torch.zeros(2, 8, dtype=torch.uint8), torch.ones(shape), 4)
