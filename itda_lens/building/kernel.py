"""The compiled judging of a block, for a CPU: what `sequential` does, from products that are all made beforehand.

Compiled functions alone live here, which take arrays and know nothing of tensors.
"""

from collections.abc import Callable
from typing import Any, no_type_check

import numba
import numpy as np

from itda_lens.pursuit.kernel import pursue_rows


@numba.njit(nogil=True, cache=True)
@no_type_check
def _judge(older, cross, lengths, limit, floor, values, indices, left, gram, n, added):
    """Add to the dictionary each token of a block of which more than `limit` is left under the atoms before it.

    Args:
        older: products of the tokens with the `n` atoms before the block.
        cross: products of the tokens with each other.
        lengths: of the tokens.
        limit: squared norm that may be left of each token.
        floor: squared norm at which a token leaves pursuit, at most its limit.
        values, indices: the path of each token under the atoms before the block.
        left: squared norm left of each token; what is judged, in the end.
        gram: inner products of the atoms, with room for new ones, which are entered.
        n: atoms before the block.
        added: as long as there are tokens that may become atoms; which did.

    Returns:
        How many tokens were judged, and how many became atoms.
    """
    (b, k), m = values.shape, 0
    row, again, path = np.empty(n + b, older.dtype), np.empty((1, k), values.dtype), np.empty((1, k), indices.dtype)
    rest, least = np.empty(1), np.empty(1)
    for i in range(b):
        if _is_stale(i, older, cross, lengths, limit, values, indices, left, added, m):
            for j in range(n):
                row[j] = older[i, j]
            for a in range(m):
                row[n + a] = cross[i, added[a]] / lengths[added[a]]
            again[:] = 0
            rest[0], least[0] = np.float64(lengths[i]) ** 2, floor[i]
            pursue_rows(row[: n + m].reshape(1, n + m), gram, again, path, rest, least, False)
            left[i] = rest[0]
        if left[i] <= limit[i]:
            continue
        for j in range(n):
            gram[n + m, j] = older[i, j] / lengths[i]
            gram[j, n + m] = gram[n + m, j]
        for a in range(m):
            gram[n + m, n + a] = cross[i, added[a]] / (lengths[i] * lengths[added[a]])
            gram[n + a, n + m] = gram[n + m, n + a]
        gram[n + m, n + m] = 1  # divided by, so that it must be there before the atom is pursued with
        added[m] = i
        m += 1
        if m == len(added):
            return i + 1, m
    return b, m


@numba.njit(nogil=True, cache=True)
@no_type_check
def _is_stale(i, older, cross, lengths, limit, values, indices, left, added, m):
    """Whether an atom that the block has added would have been chosen at some step of a token's path."""
    ended = left[i] <= limit[i]  # steps that it did not take decide nothing
    for a in range(m):
        t = added[a]
        along = cross[i, t] / lengths[t]
        for step in range(values.shape[1]):
            value = values[i, step]
            if value == 0 and ended:
                break
            if abs(along) > abs(value):
                return True
            if value != 0:
                along -= value * older[t, indices[i, step]] / lengths[t]
    return False


judge_block: Callable[..., Any] = _judge


@numba.njit(nogil=True, cache=True)
@no_type_check
def _keep(matrix, indices):
    """Move some rows and columns of a matrix, whose numbers rise, to its beginning."""
    for i in range(len(indices)):
        row, into = matrix[indices[i]], matrix[i]
        for j in range(len(indices)):
            into[j] = row[indices[j]]


keep_square: Callable[..., Any] = _keep
