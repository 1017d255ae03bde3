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
    orthogonal: bool = False,
    tolerance: float = 0.0,
) -> SparseCodes:
    """Algorithm 2 of arXiv 2505.17769 (Mallat & Zhang 1993): one full product with the atoms for each step.

    Arguments and result are those of `matching_pursuit`, for two-dimensional `x`. With `orthogonal`, each step ends
    with a least-squares fit (Pati, Rezaiifar & Krishnaprasad 1993), by scipy where it must not be negative.
    """
    residual, floor = x.clone(), tolerance * x.norm(dim=-1)
    noise = (x @ atoms.T).abs().amax(dim=-1) * torch.finfo(x.dtype).eps * 16 if orthogonal else torch.zeros_like(floor)
    values = x.new_zeros(len(x), k)
    indices = torch.zeros(len(x), k, dtype=torch.int64, device=x.device)
    for step in range(k):
        correlations = residual @ atoms.T
        chosen = (correlations if nonnegative else correlations.abs()).argmax(dim=-1)
        value = correlations.gather(-1, chosen[:, None])[:, 0]
        going = (residual.norm(dim=-1) > floor) & ((value if nonnegative else value.abs()) > noise)
        value = value / atoms[chosen].square().sum(dim=-1)
        going |= value.isnan()
        values[:, step] = value.where(going, 0)
        indices[:, step] = chosen.where(going, 0)
        if orthogonal:
            for row in going.nonzero()[:, 0].tolist():
                values[row, : step + 1] = _fit(atoms[indices[row, : step + 1]], x[row], nonnegative)
            residual = x - (values[:, None] @ atoms[indices])[:, 0]
        else:
            residual -= values[:, step, None] * atoms[chosen]
    return SparseCodes(values, indices)


def _fit(chosen: Float[Tensor, "k d"], x: Float[Tensor, " d"], nonnegative: bool) -> Float[Tensor, " k"]:
    if nonnegative:
        from scipy.optimize import nnls

        return torch.as_tensor(nnls(chosen.T.numpy(), x.numpy())[0]).to(x)
    return torch.linalg.lstsq(chosen.T, x[:, None]).solution[:, 0]
