"""What others see of a checkpoint: its card, and its place on the hub."""
