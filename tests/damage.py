"""Ways in which a directory of files can be damaged, as Hypothesis strategies: bytes, JSON, headers, and the files
themselves. How many examples are tried is ``MATGPTQ_FUZZ``, a factor: 1 in CI, 50 to look for something new.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FACTOR = float(os.environ.get("MATGPTQ_FUZZ", "1"))
SECONDS = 60  # nothing here takes one; a machine with other work may need some
ROOM = (
    8 << 30
)  # bytes of address space that the body may take: what is larger was made up, and must not fill the machine

Damage = Callable[[Path], None]


def fuzz(examples: int) -> settings:
    """Settings of a test: so many examples at factor 1."""
    return settings(
        max_examples=max(1, round(examples * FACTOR)),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


class HangError(AssertionError):
    """What should have ended has not."""


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    """Fail if the body does not end."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def fail(*_: object) -> None:
        raise HangError(f"still not done after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def no_flood() -> Iterator[None]:
    """Refuse memory beyond ``ROOM``, as a full machine would."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def answered(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """The body ends, and if with an error then with one of these, which names a file, a layer or a tensor.

    Args:
        path: what was damaged; removed in the end.
        errors: that are allowed.
    """
    try:
        with no_hang(), no_flood():
            yield
    except errors as error:
        said = str(error)
        if not any(word in said for word in (str(path), "layer ", "config.json", "tensor ")):
            raise AssertionError(f"does not say where: {said}") from error
    finally:
        shutil.rmtree(path)


numbers = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([16, 32, 64, 128, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30]),
    st.floats(),
)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.sampled_from(["", "4", "auto", "../x", "\0", "matgptq", "float16", "ü"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["", "2", "8", "a"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def places(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    found = []
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            found += [(*prefix, key), *places(value[key], (*prefix, key))]
    return found


@st.composite
def changed_json(draw: st.DrawFn, value: Any) -> Any:
    """The value with one to three entries replaced, dropped, added, renamed, or moved to another place."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        every = places(value)
        if not every:
            return draw(values)
        *path, key = draw(st.sampled_from(every))
        holder = value
        for step in path:
            holder = holder[step]
        kind = draw(st.sampled_from(["replace", "drop", "add", "swap", "rename", "nudge"]))
        if kind == "replace":
            holder[key] = draw(values)
        elif kind == "drop":
            del holder[key]
        elif kind == "swap":
            *other_path, other_key = draw(st.sampled_from(every))
            with contextlib.suppress(KeyError, IndexError, TypeError):
                other = value
                for step in other_path:
                    other = other[step]
                holder[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(holder[key])
        elif kind == "nudge" and isinstance(holder[key], int | float):
            holder[key] += draw(st.sampled_from([-1, 1, 64]))
        elif isinstance(holder, dict):
            name = draw(st.sampled_from([f"{key}x", str(key)[:-1], str(key).upper()]) | st.text(max_size=3))
            holder[name] = holder.pop(key) if kind == "rename" else draw(values)
        else:
            holder.insert(0, draw(values))
    return value


@st.composite
def json_damage(draw: st.DrawFn, file: Path) -> Damage:
    """Another JSON file."""
    changed = draw(changed_json(json.loads(file.read_text(encoding="utf-8"))))
    text = json.dumps(changed)
    return lambda path: _replace(path / file.name, text.encode())


@st.composite
def byte_damage(draw: st.DrawFn, file: Path) -> Damage:
    """Bits flipped, cut short, grown, a piece zeroed or repeated."""
    content = bytearray(file.read_bytes())
    size = len(content)
    # headers are where something can happen
    place = draw(st.integers(0, min(size, 64)) | st.integers(0, min(size, 4096)) | st.integers(0, size))
    kind = draw(st.sampled_from(["flip", "cut", "grow", "zero", "repeat", "set"]))
    if kind == "flip" and place < size:
        content[place] ^= 1 << draw(st.integers(0, 7))
    elif kind == "cut":
        del content[place:]
    elif kind == "grow":
        content[place:place] = draw(st.binary(min_size=1, max_size=16))
    elif kind == "zero":
        content[place : place + 8] = bytes(len(content[place : place + 8]))
    elif kind == "repeat":
        content[place:place] = content[place : place + draw(st.integers(1, 64))]
    else:
        piece = draw(st.binary(min_size=1, max_size=8))
        content[place : place + len(piece)] = piece
    return lambda path: _replace(path / file.name, bytes(content))


@st.composite
def header_damage(draw: st.DrawFn, file: Path) -> Damage:
    """A safetensors file whose header says something else about the same data."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    kind = draw(st.sampled_from(["json", "shape", "dtype", "exchange", "twice", "length"]))
    names = [name for name in header if name != "__metadata__"]
    name, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    text = ""
    if kind == "json":
        header = draw(changed_json(header))
    elif kind == "shape":
        shape = header[name]["shape"]
        header[name]["shape"] = draw(
            st.sampled_from([[*shape, 1], shape[::-1], shape[1:], [1, *shape], [0, *shape], [2**62, 0], [-1, *shape]])
        )
    elif kind == "dtype":
        header[name]["dtype"] = draw(
            st.sampled_from(["U8", "I8", "F8_E4M3", "F4", "BOOL", "F16", "BF16", "I16", "F32", "C64", "X1", ""])
        )
    elif kind == "exchange":
        header[name], header[other] = header[other], header[name]
    elif kind == "twice":
        text = json.dumps(header)
        text = f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[other])}}}"
    new = (text or json.dumps(header)).encode()
    told = draw(st.sampled_from([0, 2**63, 2**64 - 1, len(new) - 1, 10**9])) if kind == "length" else len(new)
    return lambda path: _replace(path / file.name, told.to_bytes(8, "little") + new + content[8 + length :])


def file_damage(name: str) -> st.SearchStrategy[Damage]:
    """Something else in the place of a file."""

    def other(make: Callable[[Path], object]) -> Damage:
        def do(path: Path) -> None:
            (path / name).unlink()
            make(path / name)

        return do

    kinds: list[Callable[[Path], object]] = [
        lambda file: None,
        lambda file: file.mkdir(),
        lambda file: file.write_bytes(b""),
        lambda file: file.symlink_to(file.name),
        lambda file: file.symlink_to("nowhere"),
        lambda file: file.symlink_to("/dev/zero"),
        lambda file: file.symlink_to(".."),
    ]
    if hasattr(os, "mkfifo"):
        kinds.append(os.mkfifo)
    return st.sampled_from(kinds).map(other)


def _replace(file: Path, content: bytes) -> None:
    """Never through a hard link."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)
