"""The hot loop for a CPU, compiled: each step updates a row of correlations and finds its largest in one pass."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit.codes import SparseCodes

_TILE = 128
"""Correlations per partial maximum: a maximum of values vectorises where that of positions does not."""


@torch.no_grad()
def pursue_fused(
    correlations: Float[Tensor, "b n"],
    gram: Float[Tensor, "n capacity"],
    k: int,
    *,
    nonnegative: bool = False,
    energy: Float[Tensor, " b"] | None = None,
    tolerance: float = 0.0,
) -> SparseCodes:
    """What `pursue` computes with a stored Gram matrix, on a CPU. Overwrites `correlations`."""
    b, _ = correlations.shape
    values = correlations.new_zeros(b, k)
    indices = torch.zeros(b, k, dtype=torch.int64)
    # The compiled loop assumes finite numbers: a row with others is emptied, and comes out as NaN.
    broken = correlations.sum(dim=-1).isfinite().logical_not()
    if broken.any():
        correlations[broken] = 0
    left = torch.full((b,), torch.inf, dtype=torch.float64) if energy is None else energy.to(torch.float64, copy=True)
    floor = tolerance**2 * left if tolerance > 0 else torch.full_like(left, -torch.inf)
    arrays = tuple(t.numpy() for t in (correlations, gram, values, indices, left, floor))  # views, not copies
    pursue_rows: Any = _pursue_rows
    workers = max(1, min(torch.get_num_threads(), b))
    bounds = [b * i // workers for i in range(workers + 1)]
    jobs = [
        _threads(workers).submit(pursue_rows, *arrays, nonnegative, start, stop) for start, stop in pairwise(bounds[1:])
    ]
    pursue_rows(*arrays, nonnegative, bounds[0], bounds[1])
    for job in jobs:
        job.result()
    values[broken, 0] = torch.nan
    return SparseCodes(values, indices)


@cache
def _threads(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="pursuit")


os.register_at_fork(after_in_child=_threads.cache_clear)  # threads do not survive a fork


@numba.njit(nogil=True, cache=True, fastmath={"nnan", "ninf", "nsz", "reassoc", "contract"})
def _pursue_rows(correlations, gram, values, indices, left, floor, nonnegative, start, stop):
    n, k = correlations.shape[1], values.shape[1]
    tiles = (n + _TILE - 1) // _TILE
    largest = np.empty(tiles, correlations.dtype)
    for i in range(start, stop):
        row = correlations[i]
        _update(row, row, correlations.dtype.type(0), largest, nonnegative)
        for step in range(k):
            tile = 0
            for t in range(1, tiles):
                if largest[t] > largest[tile]:
                    tile = t
            if largest[tile] <= 0 or left[i] <= floor[i]:
                break
            j = tile * _TILE
            while (row[j] if nonnegative else abs(row[j])) != largest[tile]:
                j += 1
            value = row[j]
            values[i, step], indices[i, step] = value, j
            left[i] -= value * value
            if step + 1 < k:
                _update(row, gram[j], value, largest, nonnegative)


@numba.njit(nogil=True, cache=True, inline="always", fastmath={"nnan", "ninf", "nsz", "reassoc", "contract"})
def _update(row, gram_row, value, largest, nonnegative):
    """Subtract `value * gram_row` from `row`, and take the largest entry of each tile."""
    n = len(row)
    for t in range(len(largest)):
        first, last = t * _TILE, min((t + 1) * _TILE, n)
        top = row.dtype.type(0)
        if nonnegative:
            for j in range(first, last):
                row[j] -= value * gram_row[j]
                top = max(top, row[j])
        else:
            for j in range(first, last):
                row[j] -= value * gram_row[j]
                top = max(top, abs(row[j]))
        largest[t] = top
