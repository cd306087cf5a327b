"""Token sequences to windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from matgptq.errors import ConfigurationError
from matgptq.progress import Counted


def pack_windows(
    documents: Iterable[Sequence[int]],
    *,
    nsamples: int | None,
    seqlen: int,
    stride: int | None = None,
    prefix: Sequence[int] = (),
    progress: Counted | None = None,
) -> tuple[Tensor, int]:
    """Concatenate token sequences and cut windows of ``seqlen`` tokens from the result, one every ``stride`` tokens.

    No more of ``documents`` is consumed than ``nsamples`` windows need. Without a stride windows do not overlap, and
    no token between two of them is lost.

    Args:
        documents: token sequences.
        nsamples: number of windows, or all.
        seqlen: tokens in a window, its prefix included.
        stride: tokens of the text from one window to the next.
        prefix: what every window starts with; fewer tokens than a window has. Text that starts with it at a window's
            first token, as a document may, is not given it twice.
        progress: called with (tokens read, tokens needed).

    Returns:
        The windows, ``torch.int64`` ``[at most nsamples, seqlen]``, and the number of tokens consumed.
    """
    start = list(prefix)
    wanted = None
    if nsamples is not None:  # at most, where text may start with the prefix
        wanted = nsamples * seqlen if stride is None else seqlen + (nsamples - 1) * stride
    stream: list[int] = []
    for ids in documents:
        stream.extend(ids)
        if wanted is not None:
            if progress is not None:
                progress(min(len(stream), wanted), wanted)
            if len(stream) >= wanted:
                break
    windows = islice(_windows(stream, seqlen, stride, start), nsamples)
    tokens = torch.tensor(list(windows), dtype=torch.int64).view(-1, seqlen)
    return tokens, len(stream)


def _windows(stream: list[int], seqlen: int, stride: int | None, prefix: list[int]) -> Iterator[list[int]]:
    first = 0
    while True:
        starts = prefix if stream[first : first + len(prefix)] != prefix else []
        stop = first + seqlen - len(starts)
        if stop > len(stream):
            return
        yield starts + stream[first:stop]
        first = stop if stride is None else first + stride


def first_tokens(windows: Tensor, count: int, bos: int | None, seed: int) -> Tensor:
    """One-token sequences that show a model its first position, as ``Recipe.sink_weight`` needs them.

    Text that was cut anywhere begins with any of its tokens, and a prompt begins with BOS: half of the sequences are
    the one, half are the other. Where all windows begin with the same token, because the tokenizer puts it in front of
    every text, so do all sequences.

    Args:
        windows: int64 ``[n, seqlen]``, calibration windows.
        count: number of sequences.
        bos: the model's BOS token if it has one; without it, all sequences are tokens of the text.
        seed: of the choice of tokens.

    Returns:
        int64 ``[count, 1]`` token ids.
    """
    if len(windows) > 1 and bool((windows[:, 0] == windows[0, 0]).all()):
        return windows[:1, :1].expand(count, 1).clone()
    generator = torch.Generator().manual_seed(seed)
    tokens = windows.flatten()[torch.randint(windows.numel(), (count,), generator=generator)]
    if bos is not None:
        tokens[: count // 2] = bos
    return tokens.unsqueeze(1)


def check_counts(windows: int | None, seqlen: int) -> None:
    """Refuse a number of windows or tokens below one; ``windows`` None is as many as there are."""
    if windows is not None and windows < 1:
        raise ConfigurationError(f"the number of windows must be at least 1, not {windows}")
    if seqlen < 1:
        raise ConfigurationError(f"seqlen must be at least 1, not {seqlen}")
