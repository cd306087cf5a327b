"""Triton kernels for GPUs: packing, products, the solver's column loop. Imported on first use."""
