"""GGUF files as transformers reads them: unpacked, and without what makes its reader slow."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


def dense_gguf() -> dict[str, Any]:
    """Option by which transformers unpacks a GGUF file: newer ones leave it packed where they find kernels for it."""
    try:
        from transformers import GgufConfig
    except ImportError:  # these always unpack
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


@contextmanager
def quick_gguf() -> Iterator[None]:
    """Inside, transformers loads GGUF files three times as fast (a model of 272 tensors in 6 seconds less).

    The reader of the gguf package cuts its memory map a few times for every token of the vocabulary, and each cut of a
    ``numpy.memmap`` makes another of it; a plain view holds the same bytes. And transformers makes the table of an
    architecture's tensor names anew for every module of the model.
    """
    import gguf

    originals = gguf.GGUFReader, gguf.get_tensor_name_map

    class PlainReader(gguf.GGUFReader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(np.ndarray)

    gguf.GGUFReader, gguf.get_tensor_name_map = PlainReader, functools.cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = originals
