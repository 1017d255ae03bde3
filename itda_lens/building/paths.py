"""Which recorded paths of pursuit a new atom would have changed."""

from typing import no_type_check

import numba
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from itda_lens.pursuit import SparseCodes


def mark_changed(
    stale: Bool[Tensor, " b"],
    product: Float[Tensor, " b"],
    products: Float[Tensor, " n"],
    codes: SparseCodes,
    ended: Bool[Tensor, " b"],
) -> None:
    """Set `stale` for the tokens at some step of whose path a new atom would have been chosen.

    Args:
        stale: changed in place.
        product: inner product of each token with the new atom.
        products: inner products of the older atoms with the new one.
        codes: the recorded paths.
        ended: tokens that left the loop because they were below the threshold: steps not taken decide nothing.
    """
    if stale.device.type == "cpu":
        _mark(*(t.numpy() for t in (stale, product, products, codes.values, codes.indices, ended)))
    else:
        stale |= changed_eager(product, products, codes, ended)


def changed_eager(
    product: Float[Tensor, " b"], products: Float[Tensor, " n"], codes: SparseCodes, ended: Bool[Tensor, " b"]
) -> Bool[Tensor, " b"]:
    """What `mark_changed` finds, for any device."""
    values, indices = codes
    if len(products) == 0:
        return (product != 0) & ~ended
    taken = (values * products[indices]).cumsum(dim=-1)
    along = product[:, None] - torch.nn.functional.pad(taken, (1, -1))
    return ((along.abs() > values.abs()) & ((values != 0) | ~ended[:, None])).any(dim=-1)


@numba.njit(nogil=True, cache=True)
@no_type_check
def _mark(stale, product, products, values, indices, ended):
    for i in range(len(stale)):
        along = product[i]
        for step in range(values.shape[1]):
            value = values[i, step]
            if stale[i] or (value == 0 and ended[i]):
                break
            if abs(along) > abs(value):
                stale[i] = True
            elif value != 0:
                along -= value * products[indices[i, step]]
