"""Rows of any size, brought near 1 by powers of two, so that no square leaves a dtype's range: pursuit scales along."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

_USUAL = 2.0**40


def near_one(x: Float[Tensor, "b d"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, " b"] | None]:
    """`x` and None where no row is far from 1 in size; else rows that are not, and the power of two that each lacks.

    Rows of zeros, and broken ones, stay as they are. Scaling so is exact.

    Example:
        >>> rows, factors = near_one(torch.tensor([[3e30, 0.0], [0.25, 1.0]]))
        >>> rows.tolist(), [math.log2(f) for f in factors.tolist()]
        ([[0.5916456..., 0.0], [0.25, 1.0]], [102.0, 0.0])
    """
    size = x.abs().amax(dim=-1) if x.shape[-1] else x.new_zeros(len(x))
    usual = ((size > 1 / _USUAL) & (size < _USUAL)) | (size == 0) | ~size.isfinite()
    if usual.all():
        return x, None
    most = -math.frexp(torch.finfo(x.dtype).tiny)[1]
    exponent = torch.frexp(size).exponent.clamp(-most, most).masked_fill(usual, 0)
    factors = torch.ldexp(torch.ones_like(size), exponent)
    return x / factors[:, None], factors


def lengths(x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
    """The norms of rows, of which no square overflows or vanishes; infinite only where the norm itself is.

    Example:
        >>> lengths(torch.tensor([[3e30, 4e30], [3e-30, 4e-30]]))
        tensor([5.0000e+30, 5.0000e-30])
    """
    rows, factors = near_one(x.reshape(-1, x.shape[-1]))
    norms = rows.norm(dim=-1)
    return (norms if factors is None else norms * factors).view(x.shape[:-1])
