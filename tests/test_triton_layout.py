"""The GPU's packing, in plain PyTorch, against slicing and against the places that its file names."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from test_kernels import make_weight

from matgptq.errors import ConfigurationError
from matgptq.gpu.layout import PlaneWeight, dequantize, fields, pack_parent, pack_slice, unpack
from matgptq.nested_weight import NestedWeight
from matgptq.slicing import WIDTHS, slice_codes

SHAPES = [(64, 64, 1), (37, 96, 3), (130, 200, 1), (7, 45, 1), (1, 256, 2)]


def forms(weight: NestedWeight, bits: int) -> tuple[PlaneWeight, PlaneWeight]:
    return pack_parent(weight.codes, weight.scales), pack_slice(weight.codes, weight.scales[bits], bits)


@pytest.mark.parametrize(("out_features", "in_features", "groups"), SHAPES)
def test_packing_loses_nothing(out_features, in_features, groups):
    weight = make_weight(out_features, in_features, groups)
    for bits in WIDTHS:
        parent, single = forms(weight, bits)
        assert torch.equal(unpack(parent), weight.codes)
        assert torch.equal(unpack(single), slice_codes(weight.codes, bits))
        for packed in (parent, single):
            assert torch.equal(dequantize(packed, bits), weight.dequantize(bits))
            assert (packed.out_features, packed.in_features) == (out_features, in_features)
            assert packed.group_size == in_features // groups
    assert parent.widths == tuple(WIDTHS)
    assert single.widths == (8,)


def test_every_code_at_every_width():
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64)
    weight = NestedWeight(codes, dict.fromkeys(WIDTHS, torch.full((4, 1), 0.5, dtype=torch.float16)))
    for bits in WIDTHS:
        for packed in forms(weight, bits):
            assert torch.equal(dequantize(packed, bits), weight.dequantize(bits))


def test_bits_are_where_the_layout_says():
    weight = make_weight(130, 192, 3)
    parent = pack_parent(weight.codes, weight.scales)
    for row, column in itertools.product((0, 7, 8, 29, 63, 64, 129), (0, 1, 2, 5, 14, 31, 45, 64, 191)):
        block, i, h, g = row // 32, row // 16 % 2, row // 8 % 2, row % 8
        chunk, s, u, t = column // 128, column // 64 % 2, column // 32 % 2, column // 8 % 4
        c, e, b = column // 4 % 2, column // 2 % 2, column % 2
        word = 4 * (4 * g + t) + 2 * s + i
        place = 16 * b + 8 * u + 4 * c + 2 * e + h
        bits = (parent.planes[:, block, chunk, word] >> place) & 1
        assert sum(int(bit) << (7 - plane) for plane, bit in enumerate(bits)) == weight.codes[row, column]
        scale = parent.scales[5][block, column // 64, 4 * g + 2 * i + h]
        assert scale == weight.scales[5][row, column // 64]


@pytest.mark.parametrize("bits", WIDTHS)
def test_fields_of_a_slice_are_where_the_layout_says(bits):
    weight = make_weight(32, 128, 1, seed=bits)
    codes = slice_codes(weight.codes, bits)
    words = pack_slice(weight.codes, weight.scales[bits], bits).planes[:, 0, 0].long() & 0xFFFFFFFF
    top = bits
    for first in range(0, bits, 4):  # parts of four planes
        size = min(4, bits - first)
        field = {4: 4, 3: 2, 2: 2, 1: 1}[size]
        part = words[top - size : top].flip(0)[:field]
        top -= size
        for row, column in ((0, 0), (7, 45), (8, 1), (31, 127), (21, 94)):
            i, h, g = row // 16, row // 8 % 2, row % 8
            s, u, t = column // 64, column // 32 % 2, column // 8 % 4
            word = 4 * (4 * g + t) + 2 * s + i
            place = 16 * (column % 2) + 8 * u + 4 * (column // 4 % 2) + 2 * (column // 2 % 2) + h
            found = int(part[place % field, word]) >> (place // field * field) & (2**field - 1)
            assert found == int(codes[row, column]) >> first & (2**field - 1)
    assert torch.equal(fields(fields(words.int(), bits), bits), words.int())


def test_what_it_costs():
    weight = make_weight(128, 256, 4)
    scales = 128 * 4 * 2
    parent = pack_parent(weight.codes, weight.scales)
    for bits in WIDTHS:
        _, single = forms(weight, bits)
        assert parent.bytes_read(bits) == 128 * 256 * min(bits + 1, 8) // 8 + scales
        assert single.bytes_read(bits) == 128 * 256 * bits // 8 + scales
        assert single.nbytes < 128 * 256 * bits // 8 + scales + 128
    shared = pack_parent(weight.codes, dict.fromkeys(WIDTHS, weight.scales[8]))
    assert parent.nbytes - shared.nbytes == 6 * scales
    assert len({packed.key for packed in (parent, single, shared)}) == 3
    assert copy.deepcopy(parent) is copy.copy(parent) is parent
    with pytest.raises(TypeError, match="save_pretrained"):
        pickle.dumps(parent)


def test_what_it_refuses():
    weight = make_weight(8, 96, 6)
    with pytest.raises(ConfigurationError, match="group_size 16"):
        pack_parent(weight.codes, weight.scales)
    with pytest.raises(ConfigurationError, match="5 groups do not divide 96"):
        pack_slice(weight.codes, torch.ones(8, 5, dtype=torch.float16), 4)
    with pytest.raises(ConfigurationError, match="float16"):
        pack_slice(weight.codes, torch.ones(8, 3), 4)
    with pytest.raises(ConfigurationError, match="uint8 matrix"):
        pack_slice(weight.codes[:0], torch.ones(0, 3, dtype=torch.float16), 4)
    with pytest.raises(ConfigurationError, match="2 to 8"):
        pack_slice(weight.codes, weight.scales[8], 9)
