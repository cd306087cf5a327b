"""Checkpoints as models that run: layers, the short way of the next token, transformers' loader."""
