"""The loops that a solve spends its time in."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from matgptq.errors import ConfigurationError
from matgptq.native.library import (
    SWEEP_MODES,
    RefitJob,
    SearchJob,
    SweepJob,
    SweepMode,
    check_status,
    expect_tensor,
    require_library,
    thread_count,
)
from matgptq.slicing import check_widths


def sweep(
    base: Tensor,
    coupling: Tensor,
    scales: Tensor,
    group_of: Tensor,
    widths: Sequence[int],
    weights: Sequence[float] | Tensor,
    *,
    mode: SweepMode = "residual",
    trail: Tensor | None = None,
    num_threads: int | None = None,
) -> Tensor:
    """The solver's column sweep: choose parent codes column by column, compensating each width's copy.

    For column j in order, with ``x_r = base_r[j] + trail_r[j]``: the code minimises
    ``sum_r weights[r] * (x_r - s_r * (v_r(q) - 128))^2`` exactly (the lowest of equals), giving
    ``w_r = s_r * (v_r(q) - 128)``, and for all k > j ``trail_r[k] -= c_r * coupling[j, k]`` where ``c_r`` is

    - ``"residual"`` (GPTQ): ``x_r - w_r``
    - ``"change"`` (coordinate descent): ``w_r - base_r[j]``
    - ``"mean"`` (the published baseline): ``x - mean_r(w_r)``, with one shared copy

    Args:
        base: ``torch.float32`` ``[R, rows, in]``, columns in processing order; ``[1, rows, in]`` in the mean mode.
        coupling: ``torch.float32`` ``[in, in]``; only the part above the diagonal is read.
        scales: ``torch.float32`` ``[R, rows, groups]``, in units of the parent's grid; may be negative, not zero.
        group_of: ``torch.int32`` ``[in]``, the group of each column in processing order.
        widths: R ascending widths, 2..8.
        weights: R numbers, not negative: the lambda of each width.
        mode: see above.
        trail: ``torch.float32`` like ``base``, added to it from the start; not written. Default zeros.
        num_threads: default ``torch.get_num_threads()``.

    Returns:
        Parent codes, ``torch.uint8`` ``[rows, in]``.
    """
    library = require_library()
    if mode not in SWEEP_MODES:
        raise ConfigurationError(f"mode must be one of {tuple(SWEEP_MODES)}, not {mode!r}")
    ascending = check_widths(widths)
    if tuple(widths) != ascending:
        raise ConfigurationError(f"widths must be ascending and without repeats, not {tuple(widths)}")
    lambdas = torch.as_tensor(weights, dtype=torch.float32, device="cpu").contiguous()
    count = len(ascending)
    if tuple(lambdas.shape) != (count,) or not bool((lambdas >= 0).all()):
        raise ConfigurationError(f"weights must be {count} numbers that are not negative")
    if base.ndim != 3 or scales.ndim != 3:
        raise ConfigurationError("base must be [R, rows, in] and scales [R, rows, groups]")
    _, rows, in_features = base.shape
    groups = scales.shape[2]
    copies = 1 if mode == "mean" else count
    base = expect_tensor(base, "base", torch.float32, (copies, rows, in_features))
    coupling = expect_tensor(coupling, "coupling", torch.float32, (in_features, in_features))
    scales = expect_tensor(scales, "scales", torch.float32, (count, rows, groups))
    group_of = expect_tensor(group_of, "group_of", torch.int32, (in_features,))
    if trail is not None:
        trail = expect_tensor(trail, "trail", torch.float32, (copies, rows, in_features))
    codes = torch.empty((rows, in_features), dtype=torch.uint8)
    width_array = (ctypes.c_int * count)(*ascending)
    job = SweepJob(
        rows=rows,
        in_features=in_features,
        num_groups=groups,
        num_widths=count,
        widths=ctypes.addressof(width_array),
        weights=lambdas.data_ptr(),
        base=base.data_ptr(),
        trail=None if trail is None else trail.data_ptr(),
        coupling=coupling.data_ptr(),
        scales=scales.data_ptr(),
        group_of=group_of.data_ptr(),
        codes=codes.data_ptr(),
        mode=SWEEP_MODES[mode],
        num_threads=thread_count(num_threads),
    )
    check_status(library.matgptq_sweep(ctypes.byref(job)))
    return codes


def search_scales(
    weight: Tensor,
    importance: Tensor,
    candidates: Tensor,
    breakpoints: Tensor,
    mean_level: Tensor,
    spread: Tensor,
    *,
    num_threads: int | None = None,
) -> Tensor:
    """Index of the best candidate scale of every group.

    A candidate s costs ``s^2 * sum_j importance[j] * error(weight[j] / s)`` over the columns of the group, with
    ``error(p) = (p - mean_level[k])^2 + spread[k]`` on piece k, ``breakpoints[k-1] < p <= breakpoints[k]``. The first
    of equals is taken.

    Args:
        weight: ``torch.float32`` ``[rows, in]``.
        importance: ``torch.float32`` ``[in]``.
        candidates: ``torch.float32`` ``[n, rows, groups]``, not zero.
        breakpoints: ``torch.float32`` ``[K - 1]``, ascending.
        mean_level, spread: ``torch.float32`` ``[K]``, K at most 256.
        num_threads: default ``torch.get_num_threads()``.

    Returns:
        ``torch.int32`` ``[rows, groups]``.
    """
    library = require_library()
    if weight.ndim != 2 or candidates.ndim != 3:
        raise ConfigurationError("weight must be [rows, in] and candidates [n, rows, groups]")
    rows, in_features = weight.shape
    count, _, groups = candidates.shape
    if groups == 0 or in_features % groups:
        raise ConfigurationError(f"{groups} groups do not divide {in_features} input features")
    pieces = len(mean_level)
    weight = expect_tensor(weight, "weight", torch.float32, (rows, in_features))
    importance = expect_tensor(importance, "importance", torch.float32, (in_features,))
    candidates = expect_tensor(candidates, "candidates", torch.float32, (count, rows, groups))
    breakpoints = expect_tensor(breakpoints, "breakpoints", torch.float32, (pieces - 1,))
    mean_level = expect_tensor(mean_level, "mean_level", torch.float32, (pieces,))
    spread = expect_tensor(spread, "spread", torch.float32, (pieces,))
    best = torch.empty((rows, groups), dtype=torch.int32)
    job = SearchJob(
        rows=rows,
        in_features=in_features,
        group_size=in_features // groups,
        num_candidates=count,
        num_pieces=pieces,
        weight=weight.data_ptr(),
        importance=importance.data_ptr(),
        candidates=candidates.data_ptr(),
        breakpoints=breakpoints.data_ptr(),
        mean_level=mean_level.data_ptr(),
        spread=spread.data_ptr(),
        best=best.data_ptr(),
        num_threads=thread_count(num_threads),
    )
    check_status(library.matgptq_search_scales(ctypes.byref(job)))
    return best


class RefitSums(NamedTuple):
    """What a refit of group scales needs to know: ``[rows, groups, groups]``, ``[rows, groups]`` and ``[rows]``."""

    system: Tensor
    slope: Tensor
    errors: Tensor


def refit_sums(
    difference: Tensor, current: Tensor, hessian: Tensor, group_size: int, *, num_threads: int | None = None
) -> RefitSums:
    """How the groups of a slice pull at each other and at what is missing, in the norm of the Hessian, by row.

    With d and c a row of ``difference`` and ``current`` and c_g its part in group g:
    ``system[g, h] = c_g H c_h``, ``slope[g] = d H c_g``, ``error = d H d``.

    Args:
        difference: ``torch.float32`` ``[rows, in]``, the weights minus the slice.
        current: ``torch.float32`` ``[rows, in]``, the slice.
        hessian: ``torch.float32`` ``[in, in]``, symmetric.
        group_size: divides ``in``.
        num_threads: default ``torch.get_num_threads()``.
    """
    if current.ndim != 2:
        raise ConfigurationError("current must be [rows, in]")
    rows, in_features = current.shape
    if group_size < 1 or in_features % group_size:
        raise ConfigurationError(f"group size {group_size} does not divide {in_features} input features")
    groups = in_features // group_size
    current = expect_tensor(current, "current", torch.float32, (rows, in_features))
    system, slope = torch.empty(rows, groups, groups), torch.empty(rows, groups)
    known = {"current": current.data_ptr(), "system": system.data_ptr(), "slope": slope.data_ptr()}
    difference = expect_tensor(difference, "difference", torch.float32, (rows, in_features))
    return RefitSums(system, slope, _run_refit(difference, hessian, group_size, num_threads, **known))


def quadratic_forms(rows: Tensor, hessian: Tensor, *, num_threads: int | None = None) -> Tensor:
    """``x H x^T`` of each row x.

    Args:
        rows: ``torch.float32`` ``[rows, in]``.
        hessian: ``torch.float32`` ``[in, in]``, symmetric.
        num_threads: default ``torch.get_num_threads()``.

    Returns:
        ``torch.float32`` ``[rows]``.
    """
    if rows.ndim != 2:
        raise ConfigurationError("rows must be [rows, in]")
    rows = expect_tensor(rows, "rows", torch.float32, tuple(rows.shape))
    return _run_refit(rows, hessian, max(1, rows.shape[1]), num_threads)


def _run_refit(
    difference: Tensor, hessian: Tensor, group_size: int, num_threads: int | None, **pointers: int
) -> Tensor:
    """The job with the pointers that are given besides; its errors."""
    rows, in_features = difference.shape
    hessian = expect_tensor(hessian, "hessian", torch.float32, (in_features, in_features))
    errors = torch.zeros(rows)
    job = RefitJob(
        rows=rows,
        in_features=in_features,
        group_size=group_size,
        difference=difference.data_ptr(),
        hessian=hessian.data_ptr(),
        errors=errors.data_ptr(),
        num_threads=thread_count(num_threads),
        **pointers,
    )
    check_status(require_library().matgptq_refit(ctypes.byref(job)))
    return errors
