"""The compiled kernel of orthogonal pursuit: each step refits all coefficients to the chosen atoms.

Each step subtracts a multiple of every Gram row chosen so far, and reading these rows is what takes the time. So they
are kept as whole numbers of 16 bits, with a bound on what that costs in precision; every atom that may be the best
within that bound is scored in full precision. Where inner products in float32 can't tell which is best, the
activation and the atoms themselves do. A row whose fit they could spoil is given up, to be done in float64.

Compiled functions alone live here, which take arrays and know nothing of tensors.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import numba
import numpy as np

from itda_lens.pursuit.least_squares import extend_factor, outside_span, solve_nonnegative
from itda_lens.pursuit.vector import FAST, TILE, larger, subtract_rows

_LARGEST = 2**15 - 1
_ROUNDING = 0.51
"""A rounded entry is off by half a unit at most, and by what float32 adds to that."""
_BLURRED = 0.1
"""The share of the largest correlation that the bound may grow to, before all are computed anew."""
_SLACK = 2
"""A bound, in units of rounding, of what rounded inner products change in a correlation; three times too large."""
_RISK = 1e-4
"""The share of a row's norm that rounded inner products may add to what is left of it."""


@numba.njit(nogil=True, cache=True, fastmath=set(FAST))
@no_type_check
def _pursue(correlations, gram, values, indices, left, floor, nonnegative, x, atoms, risky):
    """The codes of each row, save where `risky` is set: its atoms depend on each other more than `gram` can resolve.

    Solving with inner products that are off by `e` each adds about `e |c| sqrt(trace of the inverse)` to the norm that
    is left, for codes `c`. `x` and `atoms` may be empty.
    """
    (b, n), k, kind = correlations.shape, values.shape[1], correlations.dtype
    tiles = (n + TILE - 1) // TILE
    # Side by side, at a distance that is no power of two, the chosen rows stay in the caches; padded to whole tiles.
    rows, row = np.zeros((k, tiles * TILE + 32), np.int16), np.zeros(tiles * TILE, kind)
    units, weights, largest = np.empty(k, kind), np.empty(k, kind), np.empty(tiles, kind)
    sign = kind.type(0 if nonnegative else -1)
    factor, system, right = np.zeros((k, k)), np.empty((k, k)), np.empty(k)
    fit, previous, along, active = np.zeros(k), np.zeros(k), np.empty(k), np.empty(k, np.bool_)
    residual, eps = np.empty(x.shape[1]), np.finfo(kind).eps
    for i in range(b):
        chosen, energy, m = indices[i], left[i], 0
        known, size, inverse = energy, 0.0, 0.0
        blur = _correlate(correlations[i], gram, chosen, fit, 0, row)
        top = _take(row, rows, weights, 0, largest, sign)
        noise = top * kind.type(16 * eps)
        while m < k and left[i] > floor[i]:
            if blur > _BLURRED * top:
                blur = _correlate(correlations[i], gram, chosen, fit, m, row)
                top = _take(row, rows, weights, 0, largest, sign)
            if top <= noise:
                break
            slack = _SLACK * eps * np.sqrt((known + size) * (1 + inverse))
            least = top - 2 * blur - slack
            j, best, rival = _best(row, largest, least, sign, correlations[i], gram, chosen, fit, m)
            if len(x) > 0 and max(best, sign * best) - rival < slack:
                _refine(x[i], atoms, chosen, fit, m, residual, factor, along, nonnegative)
                j, best = _best_of_residual(row, largest, least, sign, residual, atoms)
                blur += slack  # by so much the refined fit has moved
            outside = outside_span(gram[j], j, chosen, factor, system, along, m)
            reach = 1.0
            for s in range(m):
                reach += along[s] * along[s]
            if outside <= 16 * eps * reach:
                risky[i] = True
                break
            inverse += reach / outside
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
            size, explained = 0.0, 0.0
            for s in range(m):
                size += fit[s] * fit[s]
                explained += fit[s] * right[s]
            left[i], known = energy - explained, max(energy, explained)
            if eps * eps * (known + size) * inverse > _RISK * _RISK * known:
                risky[i] = True
                break
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
    """The atom of the largest correlation among all that are at least `least` in `row`, that and the next in size."""
    best, size, rival, atom = 0.0, -1.0, -1.0, 0
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
                best, size, rival, atom = exact, max(exact, sign * exact), size, c
            else:
                rival = max(rival, max(exact, sign * exact))
    return atom, best, rival


@numba.njit(nogil=True, cache=True, fastmath=set(FAST))
@no_type_check
def _refine(x, atoms, chosen, fit, m, residual, factor, along, nonnegative):
    """What is left of `x`, from the atoms themselves, with the fit corrected by it (iterative refinement)."""
    for c in range(len(x)):
        residual[c] = x[c]
    _subtract(residual, atoms, chosen, fit, m)
    gradient = np.zeros(m)
    for s in range(m):
        along[s] = 0
        for c in range(len(x)):
            gradient[s] += residual[c] * atoms[chosen[s], c]
    for s in range(m):
        w = 0.0
        for u in range(s + 1):
            w += factor[s, u] * gradient[u]
        for u in range(s + 1):
            along[u] += factor[s, u] * w
    if nonnegative:
        for s in range(m):
            if fit[s] == 0 or fit[s] + along[s] <= 0:  # with some held at 0 the fit is another
                return
    _subtract(residual, atoms, chosen, along, m)
    for s in range(m):
        fit[s] += along[s]


@numba.njit(nogil=True, cache=True, fastmath=set(FAST))
@no_type_check
def _subtract(residual, atoms, chosen, weights, m):
    for s in range(m):
        for c in range(len(residual)):
            residual[c] -= weights[s] * atoms[chosen[s], c]


@numba.njit(nogil=True, cache=True, fastmath=set(FAST))
@no_type_check
def _best_of_residual(row, largest, least, sign, residual, atoms):
    """What `_best` finds, from the residual itself."""
    best, size, atom = 0.0, -1.0, 0
    for t in range(len(largest)):
        if largest[t] < least:
            continue
        for j in range(t * TILE, min((t + 1) * TILE, len(atoms))):
            if larger(row[j], sign * row[j]) < least:
                continue
            exact = 0.0
            for c in range(len(residual)):
                exact += residual[c] * atoms[j, c]
            if max(exact, sign * exact) > size:
                best, size, atom = exact, max(exact, sign * exact), j
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
