"""Matching pursuit as it is printed: the slow loop that every other path must agree with."""

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit.codes import SparseCodes


@torch.no_grad()
def matching_pursuit_reference(
    x: Float[Tensor, "b d"],
    atoms: Float[Tensor, "n d"],
    k: int,
    *,
    nonnegative: bool = False,
    tolerance: float = 0.0,
) -> SparseCodes:
    """Algorithm 2 of arXiv 2505.17769 (Mallat & Zhang 1993): one full product with the atoms for each step.

    Arguments and result are those of `matching_pursuit`, for two-dimensional `x`.
    """
    residual, floor = x.clone(), tolerance * x.norm(dim=-1)
    values = x.new_zeros(len(x), k)
    indices = torch.zeros(len(x), k, dtype=torch.int64, device=x.device)
    for step in range(k):
        correlations = residual @ atoms.T
        chosen = (correlations if nonnegative else correlations.abs()).argmax(dim=-1)
        value = correlations.gather(-1, chosen[:, None])[:, 0]
        going = (residual.norm(dim=-1) > floor) & ~((value <= 0) if nonnegative else (value == 0))
        going |= value.isnan()
        values[:, step] = value.where(going, 0)
        indices[:, step] = chosen.where(going, 0)
        residual -= values[:, step, None] * atoms[chosen]
    return SparseCodes(values, indices)
