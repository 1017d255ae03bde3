"""The compiled kernel of the pursuit: each step updates a row of correlations and finds its largest in one pass.

Compiled functions alone live here, which take arrays and know nothing of tensors.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import numba
import numpy as np

_FAST = {"nnan", "ninf", "nsz", "reassoc", "contract"}
_TILE = 128
"""Correlations per partial maximum: a maximum of values vectorises where that of positions does not."""


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
@no_type_check
def _pursue(correlations, gram, values, indices, left, floor, nonnegative, start, stop):
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
            j, last = tile * _TILE, min((tile + 1) * _TILE, n) - 1
            while j < last and (row[j] if nonnegative else abs(row[j])) != largest[tile]:
                j += 1
            value = row[j]
            values[i, step], indices[i, step] = value, j
            left[i] -= value * value
            if step + 1 < k:
                _update(row, gram[j], value, largest, nonnegative)


@numba.njit(nogil=True, cache=True, inline="always", fastmath=_FAST)
@no_type_check
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


pursue_rows: Callable[..., Any] = _pursue
