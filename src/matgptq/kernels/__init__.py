"""Products with slices: weights as kernels read them, all kernels, and which one computes what."""
