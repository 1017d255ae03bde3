"""Least squares on a few chosen atoms, from their inner products alone: the small systems of orthogonal pursuit.

Compiled functions alone live here, in float64: a system has at most as many unknowns as a code has atoms.
"""

from typing import no_type_check

import numba
import numpy as np

from itda_lens.pursuit.vector import FAST


@numba.njit(nogil=True, cache=True, fastmath=set(FAST))
@no_type_check
def outside_span(gram_row, j, chosen, factor, system, along, m):
    """The squared norm of atom `j` outside the span of the first `m` chosen; its fit to them is left in `along`.

    `factor` is the inverse of the lower Cholesky factor of the chosen atoms' Gram matrix, so that with
    `w = factor @ g` the fit is `factor.T @ w` and the squared norm inside the span `|w|^2`
    (Rubinstein, Zibulevsky & Elad 2008, section 3.2).
    """
    norm = np.float64(gram_row[j])
    for s in range(m):
        system[m, s] = system[s, m] = gram_row[chosen[s]]
        along[s] = 0
    system[m, m] = norm
    outside = norm
    for s in range(m):
        w = 0.0
        for u in range(s + 1):
            w += factor[s, u] * system[m, u]
        outside -= w * w
        for u in range(s + 1):
            along[u] += factor[s, u] * w
    return outside


@numba.njit(nogil=True, cache=True)
@no_type_check
def extend_factor(factor, along, outside, m):
    """Row `m` of `factor`, from what `outside_span` found."""
    factor[m, m] = 1 / np.sqrt(outside)
    for s in range(m):
        factor[m, s] = -along[s] * factor[m, m]


@numba.njit(nogil=True, cache=True)
@no_type_check
def solve_nonnegative(system, right, fit, active, m):
    """Minimise `x system x / 2 - right x` over `x >= 0` (Lawson & Hanson 1974, chapter 23), from the `fit` given.

    The first `m` unknowns are solved for, in place; `fit` must not be negative, and `active` is working memory.
    """
    size = 0.0
    for s in range(m):
        active[s] = fit[s] > 0
        size = max(size, abs(right[s]))
    trial, lower = np.empty(m), np.empty((m, m))
    for _ in range(4 * m):
        best, entering = 1e-12 * size, -1
        for s in range(m):
            gradient = right[s]
            for u in range(m):
                gradient -= system[s, u] * fit[u]
            if not active[s] and gradient > best:
                best, entering = gradient, s
        if entering < 0:
            return
        active[entering] = True
        while True:
            _solve(system, right, active, trial, lower, m)
            step, leaving = 1.0, -1
            for s in range(m):
                if active[s] and trial[s] <= 0 and fit[s] <= step * (fit[s] - trial[s]):
                    step, leaving = fit[s] / (fit[s] - trial[s]) if fit[s] > trial[s] else 0.0, s
            for s in range(m):
                if active[s]:
                    fit[s] += step * (trial[s] - fit[s])
            if leaving < 0:
                break
            fit[leaving], active[leaving] = 0.0, False


@numba.njit(nogil=True, cache=True)
@no_type_check
def _solve(system, right, active, trial, lower, m):
    """Solve for the active unknowns, the others held at 0, by a Cholesky factorisation."""
    for s in range(m):
        if not active[s]:
            trial[s] = 0
            continue
        total = right[s]
        for u in range(s + 1):
            if not active[u]:
                continue
            entry = system[s, u]
            for v in range(u):
                if active[v]:
                    entry -= lower[s, v] * lower[u, v]
            lower[s, u] = entry / lower[u, u] if u < s else np.sqrt(entry)
            if u < s:
                total -= lower[s, u] * trial[u]
        trial[s] = total / lower[s, s]
    for s in range(m - 1, -1, -1):
        if active[s]:
            for u in range(s + 1, m):
                if active[u]:
                    trial[s] -= lower[u, s] * trial[u]
            trial[s] /= lower[s, s]
