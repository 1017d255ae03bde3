"""The compiled kernel of orthogonal pursuit: each step refits all coefficients to the chosen atoms.

Compiled functions alone live here, which take arrays and know nothing of tensors.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import numba
import numpy as np

from itda_lens.pursuit.least_squares import DEPENDENT, extend_factor, outside_span, solve_nonnegative
from itda_lens.pursuit.vector import FAST, TILE, larger, subtract_rows


@numba.njit(nogil=True, cache=True, fastmath=set(FAST))
@no_type_check
def _pursue(correlations, gram, values, indices, left, floor, nonnegative):
    (b, n), k, kind = correlations.shape, values.shape[1], correlations.dtype
    tiles = (n + TILE - 1) // TILE
    # The chosen Gram rows are read at every step: side by side, at a distance that is no power of two, they stay in
    # the caches, and padded to whole tiles.
    rows, row = np.zeros((k, tiles * TILE + 16), kind), np.zeros(tiles * TILE, kind)
    largest, change, sign = np.empty(tiles, kind), np.empty(k, kind), kind.type(0 if nonnegative else -1)
    factor, system, right = np.zeros((k, k)), np.empty((k, k)), np.empty(k)
    fit, previous, along, active = np.zeros(k), np.zeros(k), np.empty(k), np.empty(k, np.bool_)
    for i in range(b):
        chosen, energy, noise, m = indices[i], left[i], kind.type(0), 0
        for c in range(n):
            row[c] = correlations[i, c]
        for t in range(tiles):
            largest[t] = subtract_rows(row, rows, change, 0, t * TILE, sign)
        while m < k and left[i] > floor[i]:
            top = kind.type(0)
            for t in range(tiles):
                top = larger(top, largest[t])
            if m == 0:
                noise = top * kind.type(16 * np.finfo(kind).eps)
            if top <= noise:
                break
            tile = 0
            while largest[tile] != top:
                tile += 1
            j = tile * TILE
            while larger(row[j], sign * row[j]) != top:
                j += 1
            outside = outside_span(gram[j], j, chosen, factor, system, along, m)
            if outside <= DEPENDENT:
                row[j] = 0  # what is left of its correlation is rounding
                largest[tile] = subtract_rows(row, rows, change, 0, tile * TILE, sign)
                continue
            chosen[m], newest = j, row[j] / outside
            right[m] = row[j]
            all_positive = newest > 0
            for s in range(m):
                right[m] += fit[s] * system[m, s]
                all_positive &= fit[s] > max(newest * along[s], 0.0)
            extend_factor(factor, along, outside, m)
            previous[m] = 0
            for s in range(m):
                previous[s] = fit[s]
            if nonnegative and not all_positive:
                fit[m] = 0
                m += 1
                solve_nonnegative(system, right, fit, active, m)
            else:
                for s in range(m):
                    fit[s] -= newest * along[s]
                fit[m] = newest
                m += 1
            left[i] = energy
            for s in range(m):
                left[i] -= fit[s] * right[s]
                change[s] = fit[s] - previous[s]
            if m < k:
                for c in range(n):
                    rows[m - 1, c] = gram[j, c]
                for t in range(tiles):
                    largest[t] = subtract_rows(row, rows, change, m, t * TILE, sign)
        for s in range(m):
            values[i, s] = fit[s]
            if fit[s] == 0:
                chosen[s] = 0


pursue_rows_orthogonal: Callable[..., Any] = _pursue
