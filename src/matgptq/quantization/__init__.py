"""A quantization from what was asked for to the finished checkpoint."""
