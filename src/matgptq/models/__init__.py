"""Models at full precision: architectures as data, where weights come from, one block at a time."""
