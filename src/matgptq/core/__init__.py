"""The numeric core: tensors in, tensors out, no files and no models."""
