"""The compiled kernel of orthogonal pursuit: each step refits all coefficients to the chosen atoms.

Each step subtracts a multiple of every Gram row chosen so far, and reading these rows is what takes the time. So they
are kept as whole numbers of 16 bits, with a bound on what that costs in precision; every atom that may be the best
within that bound is scored in full precision.

Compiled functions alone live here, which take arrays and know nothing of tensors.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import numba
import numpy as np

from itda_lens.pursuit.least_squares import DEPENDENT, extend_factor, outside_span, solve_nonnegative
from itda_lens.pursuit.vector import FAST, TILE, larger, subtract_rows

_LARGEST = 2**15 - 1
_ROUNDING = 0.51
"""A rounded entry is off by half a unit at most, and by what float32 adds to that."""
_BLURRED = 0.1
"""The share of the largest correlation that the bound may grow to, before all are computed anew."""


@numba.njit(nogil=True, cache=True, fastmath=set(FAST))
@no_type_check
def _pursue(correlations, gram, values, indices, left, floor, nonnegative):
    (b, n), k, kind = correlations.shape, values.shape[1], correlations.dtype
    tiles = (n + TILE - 1) // TILE
    # Side by side, at a distance that is no power of two, the chosen rows stay in the caches; padded to whole tiles.
    rows, row = np.zeros((k, tiles * TILE + 32), np.int16), np.zeros(tiles * TILE, kind)
    units, weights, largest = np.empty(k, kind), np.empty(k, kind), np.empty(tiles, kind)
    sign = kind.type(0 if nonnegative else -1)
    factor, system, right = np.zeros((k, k)), np.empty((k, k)), np.empty(k)
    fit, previous, along, active = np.zeros(k), np.zeros(k), np.empty(k), np.empty(k, np.bool_)
    for i in range(b):
        chosen, energy, m = indices[i], left[i], 0
        blur = _correlate(correlations[i], gram, chosen, fit, 0, row)
        top = _take(row, rows, weights, 0, largest, sign)
        noise = top * kind.type(16 * np.finfo(kind).eps)
        while m < k and left[i] > floor[i]:
            if blur > _BLURRED * top:
                blur = _correlate(correlations[i], gram, chosen, fit, m, row)
                top = _take(row, rows, weights, 0, largest, sign)
            if top <= noise:
                break
            j, best = _best(row, largest, top - 2 * blur, sign, correlations[i], gram, chosen, fit, m)
            outside = outside_span(gram[j], j, chosen, factor, system, along, m)
            if outside <= DEPENDENT:
                row[j] = 0  # what is left of its correlation is rounding
                top = _take(row, rows, weights, 0, largest, sign)
                continue
            chosen[m], newest = j, best / outside
            right[m] = best
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
            if m < k:
                units[m - 1] = _in_16_bits(gram[j], rows[m - 1])
                for s in range(m):
                    weights[s] = (fit[s] - previous[s]) * units[s]
                    blur += _ROUNDING * abs(weights[s])
                top = _take(row, rows, weights, m, largest, sign)
        for s in range(m):
            values[i, s] = fit[s]
            if fit[s] == 0:
                chosen[s] = 0


@numba.njit(nogil=True, cache=True, fastmath=set(FAST))
@no_type_check
def _take(row, rows, weights, m, largest, sign):
    """Subtract the first `m` rows from `row`, note the largest of each tile, and return the largest of all."""
    top = row.dtype.type(0)
    for t in range(len(largest)):
        largest[t] = subtract_rows(row, rows, weights, m, t * TILE, sign)
        top = larger(top, largest[t])
    return top


@numba.njit(nogil=True, cache=True, fastmath=set(FAST))
@no_type_check
def _correlate(start, gram, chosen, fit, m, row):
    """All correlations in full precision, into `row`. Returns their bound of error, 0."""
    for c in range(len(start)):
        row[c] = start[c]
    for s in range(m):
        gram_row, weight = gram[chosen[s]], row.dtype.type(fit[s])
        for c in range(len(start)):
            row[c] -= weight * gram_row[c]
    return 0.0


@numba.njit(nogil=True, cache=True, fastmath=set(FAST))
@no_type_check
def _best(row, largest, least, sign, start, gram, chosen, fit, m):
    """The atom of the largest correlation and that correlation, among all that are at least `least` in `row`."""
    best, size, atom = 0.0, -1.0, 0
    for t in range(len(largest)):
        if largest[t] < least:
            continue
        for c in range(t * TILE, min((t + 1) * TILE, len(start))):
            if larger(row[c], sign * row[c]) < least:
                continue
            exact = np.float64(start[c])
            for s in range(m):
                exact -= fit[s] * gram[c, chosen[s]]
            if max(exact, sign * exact) > size:
                best, size, atom = exact, max(exact, sign * exact), c
    return atom, best


@numba.njit(nogil=True, cache=True, fastmath=set(FAST))
@no_type_check
def _in_16_bits(gram_row, row):
    """Round a Gram row to whole multiples of a unit, which is returned."""
    top = gram_row.dtype.type(0)
    for c in range(len(gram_row)):
        top = larger(top, larger(gram_row[c], -gram_row[c]))
    unit = top / gram_row.dtype.type(_LARGEST)
    per_unit = 1 / unit
    for c in range(len(gram_row)):
        row[c] = np.int16(np.rint(gram_row[c] * per_unit))
    return unit


pursue_rows_orthogonal: Callable[..., Any] = _pursue
