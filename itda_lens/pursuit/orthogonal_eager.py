"""Orthogonal pursuit for any device, in plain torch; it needs no Gram matrix."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.least_squares import DEPENDENT, solve_nonnegative


@torch.no_grad()
def pursue_orthogonal_eager(
    correlations: Float[Tensor, "b n"],
    atoms: Float[Tensor, "n d"],
    k: int,
    *,
    nonnegative: bool = False,
    energy: Float[Tensor, " b"] | None = None,
    tolerance: float = 0.0,
) -> SparseCodes:
    """What `pursue` computes with `orthogonal`, one atom of all rows at a time: a product with the atoms for each."""
    b, _ = correlations.shape
    values = correlations.new_zeros(b, k)
    indices = torch.zeros(b, k, dtype=torch.int64, device=correlations.device)
    passed_over = torch.zeros_like(correlations, dtype=torch.bool)
    size, rows = torch.zeros_like(indices[:, 0]), torch.arange(b, device=correlations.device)
    left, noise = correlations, None
    going = torch.ones_like(rows, dtype=torch.bool)
    while going.any():
        magnitude = (left if nonnegative else left.abs()).masked_fill(passed_over, 0)
        top, chosen = magnitude.max(dim=-1)
        noise = 16 * torch.finfo(top.dtype).eps * top if noise is None else noise
        going &= (top > noise) | top.isnan()
        slot = size.clamp(max=k - 1)
        indices[rows, slot] = chosen.where(going, indices[rows, slot])
        passed_over[rows, chosen] |= going
        used = torch.arange(k, device=rows.device) < (size + going)[:, None]
        system, right = _system(atoms[indices], used), correlations.gather(-1, indices) * used
        factor = torch.linalg.cholesky_ex(system).L
        adds = going & ((factor[rows, slot, slot].square() > DEPENDENT * system[rows, slot, slot]) | top.isnan())
        indices[rows[going & ~adds], slot[going & ~adds]] = 0
        if adds.any():
            of = adds.nonzero()[:, 0]
            if nonnegative:
                fit = _fit_nonnegative(system[of], right[of], values[of], used[of])
            else:
                fit = torch.cholesky_solve(right[of, :, None].double(), factor[of])[..., 0]
            values[of] = fit.to(values.dtype)
            size += adds
        if energy is not None and tolerance > 0:
            going &= energy - (values * correlations.gather(-1, indices)).sum(-1) > tolerance**2 * energy
        going &= size < k
        left = correlations - (values[:, None] @ atoms[indices])[:, 0] @ atoms.T
    return SparseCodes(values, indices.masked_fill(values == 0, 0))


def _system(chosen: Float[Tensor, "b k d"], used: Bool[Tensor, "b k"]) -> Float[Tensor, "b k k"]:
    """The Gram matrices of the chosen atoms, in float64, with ones on the diagonal of unused slots."""
    chosen = (chosen * used[..., None]).double()
    return chosen @ chosen.mT + torch.diag_embed((~used).double())


def _fit_nonnegative(
    system: Float[Tensor, "b k k"], right: Float[Tensor, "b k"], start: Float[Tensor, "b k"], used: Bool[Tensor, "b k"]
) -> Float[Tensor, "b k"]:
    fits, sizes = start.double().cpu(), used.sum(dim=-1).tolist()
    systems, rights = system.cpu().numpy(), right.double().cpu().numpy()
    for fit, system_of, right_of, size in zip(fits.numpy(), systems, rights, sizes, strict=True):
        solve_nonnegative(system_of, right_of, fit, np.empty(len(fit), np.bool_), size)
    return fits.to(start.device)
