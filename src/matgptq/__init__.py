"""Post-training Matryoshka quantization: one 8-bit parent, every width from 2 to 8 bits inside it."""

__version__ = "0.1.0.dev0"
