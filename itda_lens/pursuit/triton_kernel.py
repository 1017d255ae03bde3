"""Triton kernels of the pursuit: one program for each activation, one row of the Gram matrix read per step.

Device functions alone live here; `itda_lens.pursuit.on_gpu` starts them.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def pursue_on_chip(
    correlations, gram, values, indices, left, floor, x, atoms, slack, n, k, d,
    correlations_stride, gram_stride, x_stride, atoms_stride,
    nonnegative: tl.constexpr, rescore: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """All correlations of an activation stay in registers.

    With `rescore` they may each be off by up to `slack`: an atom is taken once its product with the activation has
    been made again in float32 and no other, wherever it may truly lie, can be above it.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    c = tl.load(correlations + row * correlations_stride + columns, mask=inside, other=0.0)
    remaining, stop = tl.load(left + row), tl.load(floor + row)
    exact = columns >= n
    margin = tl.load(slack + row) if rescore else 0.0
    step = 0
    while step < k:
        if rescore:
            unsure = 1
            while unsure > 0:
                size = _size(c, nonnegative)
                sure = tl.max(tl.where(exact, size, 0.0), axis=0)
                open_size, j = tl.max(tl.where(exact, -1.0, size), axis=0, return_indices=True)
                unsure = (open_size + margin > sure).to(tl.int32)
                if unsure > 0:
                    here = columns == j
                    first = tl.load(correlations + row * correlations_stride + j)
                    again = _product(x + row * x_stride, atoms + j.to(tl.int64) * atoms_stride, d, PART)
                    c += tl.where(here, again - first, 0.0)
                    exact = exact | here
            size = tl.where(exact, _size(c, nonnegative), 0.0)
        else:
            size = _size(c, nonnegative)
        top, j = tl.max(size, axis=0, return_indices=True)
        if (top > 0) & (remaining > stop):
            along = tl.sum(tl.where(columns == j, c, 0.0), axis=0)
            value = along / tl.load(gram + j.to(tl.int64) * gram_stride + j)  # atoms may be off unit length
            tl.store(values + row * k + step, value)
            tl.store(indices + row * k + step, j.to(tl.int64))
            remaining -= value.to(tl.float64) * along
            step += 1
            if step < k:
                c -= value * tl.load(gram + j.to(tl.int64) * gram_stride + columns, mask=inside, other=0.0)
        else:
            step = k


@triton.jit
@no_type_check
def pursue_in_tiles(
    correlations, gram, values, indices, left, floor, n, k, correlations_stride, gram_stride,
    nonnegative: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Correlations stay in global memory, and are updated there: each step is one pass of tiles over them."""
    row = tl.program_id(0).to(tl.int64)
    own = correlations + row * correlations_stride
    remaining, stop = tl.load(left + row), tl.load(floor + row)
    value, chosen = 0.0, tl.zeros((), tl.int64)
    step = 0
    while step < k:
        top, best = 0.0, tl.zeros((), tl.int64)
        following = 0.0
        for start in range(0, n, TILE):
            columns = start + tl.arange(0, TILE)
            inside = columns < n
            c = tl.load(own + columns, mask=inside, other=0.0)
            if step > 0:
                c -= value * tl.load(gram + chosen * gram_stride + columns, mask=inside, other=0.0)
                tl.store(own + columns, c, mask=inside)
            size, j = tl.max(_size(c, nonnegative), axis=0, return_indices=True)
            if size > top:
                top, best = size, start + j.to(tl.int64)
                following = tl.sum(tl.where(columns == best, c, 0.0), axis=0)
        if (top > 0) & (remaining > stop):
            value, chosen = following / tl.load(gram + best * gram_stride + best), best
            tl.store(values + row * k + step, value)
            tl.store(indices + row * k + step, chosen)
            remaining -= value.to(tl.float64) * following
            step += 1
        else:
            step = k


@triton.jit
@no_type_check
def _size(c, nonnegative: tl.constexpr):
    return tl.maximum(c, 0.0) if nonnegative else tl.abs(c)


@triton.jit
@no_type_check
def _product(x, atom, d, PART: tl.constexpr):
    total = tl.zeros((PART,), tl.float32)
    for start in range(0, d, PART):
        columns = start + tl.arange(0, PART)
        inside = columns < d
        total += tl.load(x + columns, mask=inside, other=0.0) * tl.load(atom + columns, mask=inside, other=0.0)
    return tl.sum(total, axis=0)
