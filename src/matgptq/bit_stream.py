"""Codes of a few bits each, packed without gaps.

A row is a stream of bits that starts in the least significant bit of its first byte; code i occupies the bits
``i * bits`` to ``(i + 1) * bits``. Read as little-endian 32-bit words, this is the packing of compressed-tensors
(since 0.18) and, along the input, of GPTQ at 2, 3, 4 and 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_bytes(columns: int, bits: int) -> int:
    """Bytes that a row of ``columns`` codes takes."""
    return (columns * bits + 7) // 8


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of codes.

    Args:
        codes: ``torch.uint8`` ``[rows, columns]``, values below ``2^bits``.
        bits: width, 1..8.

    Returns:
        ``torch.uint8`` ``[rows, row_bytes(columns, bits)]``; bits behind the last code are zero.
    """
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % 8)).view(rows, -1, 8)  # 8 codes are `bits` whole bytes
    words = torch.zeros(padded.shape[:2], dtype=torch.int64)
    for i in range(8):
        words |= padded[:, :, i].to(torch.int64) << (bits * i)
    octets = words.view(torch.uint8).view(rows, -1, 8)[:, :, :bits]
    return octets.reshape(rows, -1)[:, : row_bytes(columns, bits)].contiguous()


def unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The codes that ``pack_rows`` packed: ``torch.uint8`` ``[rows, columns]``.

    Args:
        packed: ``torch.uint8`` ``[rows, row_bytes(columns, bits)]``.
        bits: width, 1..8.
        columns: codes in a row.
    """
    rows = len(packed)
    groups = (columns + 7) // 8
    octets = torch.nn.functional.pad(packed, (0, groups * bits - packed.shape[1])).view(rows, groups, bits)
    words = torch.zeros(rows, groups, dtype=torch.int64, device=packed.device)
    for i in range(bits):
        words |= octets[:, :, i].to(torch.int64) << (8 * i)
    codes = torch.empty(rows, groups, 8, dtype=torch.uint8, device=packed.device)
    for i in range(8):
        codes[:, :, i] = (words >> (bits * i)) & ((1 << bits) - 1)
    return codes.view(rows, -1)[:, :columns].contiguous()
