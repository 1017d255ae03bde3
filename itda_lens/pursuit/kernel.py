"""The compiled kernel of the pursuit: each step updates a row of correlations and finds its largest in one pass.

Compiled functions alone live here, which take arrays and know nothing of tensors.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import numba
import numpy as np

from itda_lens.pursuit.vector import FAST, larger

TILE = 256
"""Correlations per partial maximum: the place of the largest is searched in one tile alone."""


@numba.njit(nogil=True, cache=True, fastmath=set(FAST))
@no_type_check
def _pursue(correlations, gram, values, indices, left, floor, nonnegative):
    n, k = correlations.shape[1], values.shape[1]
    row, largest = np.empty(n, correlations.dtype), np.empty((n + TILE - 1) // TILE, correlations.dtype)
    sign = correlations.dtype.type(0 if nonnegative else -1)
    for i in range(len(correlations)):
        for j in range(n):
            row[j] = correlations[i, j]
        _update(row, row, row.dtype.type(0), sign, largest)
        for step in range(k):
            top = row.dtype.type(0)
            for t in range(len(largest)):
                top = larger(top, largest[t])
            if top <= 0 or left[i] <= floor[i]:
                break
            tile = 0
            while largest[tile] != top:
                tile += 1
            j, last = tile * TILE, min((tile + 1) * TILE, n) - 1
            while j < last and larger(row[j], sign * row[j]) != top:
                j += 1
            value = row[j] / gram[j, j]  # atoms may be off unit length
            values[i, step], indices[i, step] = value, j
            left[i] -= value * row[j]
            if step + 1 < k:
                _update(row, gram[j], value, sign, largest)


@numba.njit(nogil=True, cache=True, fastmath=set(FAST))
@no_type_check
def _update(row, gram_row, value, sign, largest):
    """Subtract `value * gram_row` from `row`, and take the largest of each tile: in size, or (`sign` 0) as it is."""
    n = len(row)
    full = n // TILE
    for t in range(full):  # a loop of constant length, which the compiler unrolls
        top = row.dtype.type(0)
        for j in range(t * TILE, (t + 1) * TILE):
            left = row[j] - value * gram_row[j]
            row[j] = left
            top = larger(top, larger(left, sign * left))
        largest[t] = top
    if full < len(largest):
        top = row.dtype.type(0)
        for j in range(full * TILE, n):
            left = row[j] - value * gram_row[j]
            row[j] = left
            top = larger(top, larger(left, sign * left))
        largest[full] = top


pursue_rows: Callable[..., Any] = _pursue
