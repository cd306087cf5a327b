"""What a slice costs: exact integer sizes of codes and scales."""

SCALE_BITS = 16


def layer_bits(out_features: int, in_features: int, group_size: int, bits: int) -> int:
    """Bits that serving reads of one layer: its codes at ``bits`` each, and one 16-bit scale per row and group."""
    return out_features * in_features * bits + out_features * (in_features // group_size) * SCALE_BITS
