"""Objects that never change: whoever copies one gets the same."""

from __future__ import annotations

from typing import NoReturn, Self


class Immutable:
    """A packed weight, or the memory of some: copies of a model share it.

    It is not pickled: it may lie in memory that no pickle can hold, and has a key that no other weight may have.
    """

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "packed weights are not pickled; use save_pretrained, or load with from_pretrained and "
            "quantization_config=MatGPTQConfig(packed=False)"
        )
