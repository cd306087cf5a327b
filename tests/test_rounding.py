"""Joint rounding against a scan of all 256 codes in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from brute_force import LEVELS, WIDTHS, code_costs, excess
from hypothesis import given, settings
from hypothesis import strategies as st

from matgptq.rounding import cell_table, round_nested, round_shared, shared_table
from matgptq.slicing import slice_codes

POSITIONS = torch.linspace(-180.03, 179.9, 2880)
# Costs reach 1e4 and more, so float32 decides near ties by its own rounding.
TIE = 1e-3

ANY_WIDTHS = [widths for count in range(1, 8) for widths in itertools.combinations(WIDTHS, count)]
NESTED_WIDTHS = [widths for widths in ANY_WIDTHS if widths[-1] == 8 and len(widths) > 1]
bit_weight = st.floats(2.0**-6, 256, width=32)
light = settings(deadline=None, max_examples=40, derandomize=True)


@st.composite
def weighted(draw, choices):
    widths = draw(st.sampled_from(choices))
    return widths, tuple(draw(st.lists(bit_weight, min_size=len(widths), max_size=len(widths))))


@pytest.mark.parametrize("widths", ANY_WIDTHS, ids=str)
def test_shared_rounding_of_every_set_of_widths(widths):
    bit_weights = tuple(2.0**bits for bits in widths)
    codes, _ = round_shared(POSITIONS, shared_table(widths, bit_weights))
    costs = code_costs(POSITIONS.expand(len(widths), -1), widths, bit_weights)
    assert excess(costs, codes).max() <= TIE * sum(bit_weights)


@light
@given(weighted(ANY_WIDTHS), st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=50))
def test_shared_rounding(weighted, positions):
    widths, bit_weights = weighted
    table = shared_table(widths, bit_weights)
    positions = torch.tensor(positions)
    codes, mean_level = round_shared(positions, table)
    costs = code_costs(positions.expand(len(widths), -1), widths, bit_weights)
    total = sum(bit_weights)
    assert codes.dtype == torch.uint8
    assert (excess(costs, codes) <= total * (TIE + 1e-6 * positions.double().square())).all()
    torch.testing.assert_close(table.error(positions).double(), costs.amin(0), rtol=1e-5, atol=TIE * total)
    expected = torch.stack([LEVELS[bits][codes.long()] for bits in widths]).mean(0)
    torch.testing.assert_close(mean_level.double(), expected, rtol=1e-6, atol=0)


def test_shared_rounding_keeps_the_shape():
    table = shared_table((2, 8), (1.0, 1.0))
    positions = POSITIONS[:24].view(2, 3, 4)
    codes, levels = round_shared(positions, table)
    assert codes.shape == levels.shape == table.error(positions).shape == positions.shape


@pytest.mark.parametrize("bits", WIDTHS)
def test_one_width_makes_codes_that_every_larger_width_reads_the_same(bits):
    codes, levels = round_shared(POSITIONS, shared_table((bits,), (3.0,)))
    own = slice_codes(codes, bits).long()
    assert own.unique().tolist() == list(range(2**bits))
    assert torch.equal(codes.long(), own * 2 ** (8 - bits))
    for larger in range(bits, 9):
        assert torch.equal(LEVELS[larger][codes.long()], levels.double())


def test_widths_without_the_parent_make_codes_that_the_parent_reads_near_them():
    codes, levels = round_shared(POSITIONS, shared_table((3, 5), (1.0, 1.0)))
    for code, level in set(zip(codes.tolist(), levels.tolist(), strict=True)):
        same = (LEVELS[3] == LEVELS[3][code]) & (LEVELS[5] == LEVELS[5][code])
        assert abs(LEVELS[8][code] - level) == (LEVELS[8][same] - level).abs().min()


@pytest.mark.parametrize("widths", NESTED_WIDTHS, ids=str)
def test_nested_rounding_of_every_set_of_widths(widths):
    generator = torch.Generator().manual_seed(sum(widths))
    common = 60 * torch.randn(400, generator=generator)
    positions = common + 8 * torch.randn(len(widths), 400, generator=generator)
    for bit_weights in ([1.0] * len(widths), [2.0**bits for bits in widths]):
        weights = torch.tensor(bit_weights).unsqueeze(-1) * (0.5 + torch.rand(len(widths), 400, generator=generator))
        codes = round_nested(positions, weights, cell_table(widths))
        costs = code_costs(positions, widths, weights)
        assert (excess(costs, codes) <= TIE * weights.sum(0)).all()


@light
@given(weighted(NESTED_WIDTHS), st.data())
def test_nested_rounding(weighted, data):
    widths, bit_weights = weighted
    position = st.floats(-300, 300, width=32)
    columns = data.draw(st.lists(st.tuples(*[position] * len(widths)), min_size=1, max_size=20))
    positions = torch.tensor(columns).T.contiguous()
    weights = torch.tensor(bit_weights).unsqueeze(-1)
    codes = round_nested(positions, weights, cell_table(widths))
    assert codes.min() >= 0
    assert codes.max() <= 255
    costs = code_costs(positions, widths, weights.expand_as(positions))
    tie = (weights * positions.square()).sum(0) * 1e-6 + TIE * sum(bit_weights)
    assert (excess(costs, codes) <= tie).all()


@pytest.mark.parametrize("widths", NESTED_WIDTHS, ids=str)
def test_nested_rounding_of_equal_positions_is_shared_rounding(widths):
    bit_weights = tuple(2.0**bits for bits in widths)
    nested = round_nested(
        POSITIONS.expand(len(widths), -1), torch.tensor(bit_weights).unsqueeze(-1), cell_table(widths)
    )
    shared, _ = round_shared(POSITIONS, shared_table(widths, bit_weights))
    assert (nested == shared).double().mean() > 0.99


@pytest.mark.parametrize("widths", [(8,), (2, 3), (4,)])
def test_nested_rounding_needs_the_parent_and_a_slice(widths):
    with pytest.raises(ValueError, match="needs the parent"):
        cell_table(widths)
