"""Methods for one object: a class mixed into its own, under the name of its own.

A bound method among an object's attributes would do the same, but the object would then refer to itself, and its memory
be free only when the cycle collector gets to it.
"""

from __future__ import annotations

from typing import Any

_made: dict[tuple[type, type], type] = {}
_parts: dict[type, tuple[type, type]] = {}


class Mixin:
    """What is mixed in. Copies and pickles find the mixed class by the two that it is made of."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        parts = _parts.get(type(self))  # none for a class that something else has derived
        return super().__reduce_ex__(protocol) if parts is None else (_blank, parts, self.__getstate__())


def mix_in(mixin: type[Mixin], target: Any) -> None:
    """Let ``mixin``'s methods go before those of the object's own class."""
    target.__class__ = _mixed(mixin, type(target))


def _mixed(mixin: type, own: type) -> type:
    if (mixin, own) not in _made:
        mixed = type(own.__name__, (mixin, own), {"__module__": own.__module__, "__doc__": own.__doc__})
        _made[mixin, own], _parts[mixed] = mixed, (mixin, own)
    return _made[mixin, own]


def _blank(mixin: type, own: type) -> Any:
    return object.__new__(_mixed(mixin, own))
