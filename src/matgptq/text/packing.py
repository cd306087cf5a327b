"""Token sequences to windows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    progress: Counted | None = None,
) -> tuple[Tensor, int]:
    """Concatenate token sequences and cut windows of ``seqlen`` tokens from the result, one every ``stride`` tokens.

    No more of ``documents`` is consumed than ``nsamples`` windows need. Without a stride windows do not overlap.

    Returns:
        The windows, ``torch.int64`` ``[at most nsamples, seqlen]``, and the number of tokens consumed.
    """
    stride = seqlen if stride is None else stride
    wanted = None if nsamples is None else seqlen + (nsamples - 1) * stride
    stream: list[int] = []
    for ids in documents:
        stream.extend(ids)
        if wanted is not None:
            if progress is not None:
                progress(min(len(stream), wanted), wanted)
            if len(stream) >= wanted:
                break
    if len(stream) < seqlen:
        return torch.empty(0, seqlen, dtype=torch.int64), len(stream)
    tokens = torch.tensor(stream[:wanted], dtype=torch.int64).unfold(0, seqlen, stride).contiguous()
    return tokens, len(stream)


def first_tokens(windows: Tensor, count: int, bos: int | None, seed: int) -> Tensor:
    """One-token sequences that show a model its first position, as ``Recipe.sink_weight`` needs them.

    Text that was cut anywhere begins with any of its tokens, and a prompt begins with BOS: half of the sequences are
    the one, half are the other.

    Args:
        windows: int64 ``[n, seqlen]``, calibration windows.
        count: number of sequences.
        bos: the model's BOS token if it has one; without it, all sequences are tokens of the text.
        seed: of the choice of tokens.

    Returns:
        int64 ``[count, 1]`` token ids.
    """
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
