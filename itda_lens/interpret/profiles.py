"""How activations stand to the same prompts in two models."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Profiled(NamedTuple):
    """Activations of one model beside the atoms of a dictionary in it; `b` tokens, `n` atoms, width `d`."""

    x: Float[Tensor, "b d"]
    atoms: Float[Tensor, "n d"]
    bias: Float[Tensor, " d"]

    def directions(self) -> Float[Tensor, "b d"]:
        """`(x - bias) / |x - bias|`, 0 where `x = bias`."""
        return torch.nn.functional.normalize(self.x - self.bias, dim=-1)


@torch.no_grad()
def profile_shift(one: Profiled, other: Profiled, reference: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """`1 - cosine` between each token's profiles in two models: 0 where it stands to all prompts as it did, at most 2.

    A profile is what a relative representation is (Moschella et al. 2023, arXiv 2209.15430), with the atoms for
    anchors: the cosine of the centred activation with each atom. Latent i is the same prompt in both models, so
    profiles compare though widths and bases differ. The mean profile of each model is removed first.

    Args:
        one: activations `[b, d]` and atoms `[n, d]` in one model.
        other: the same tokens and prompts in the other, of any width.
        reference: the mean directions to remove, `[d]` in each model; those of these tokens if not given.

    Returns:
        `[b]`. A token whose profile is zero has shift 0 where it is zero in both, else 1.

    Example:
        >>> x, atoms, zero = torch.randn(5, 3), torch.eye(3), torch.zeros(3)
        >>> rotation = torch.linalg.qr(torch.randn(3, 3)).Q
        >>> shift = profile_shift(Profiled(x, atoms, zero), Profiled(x @ rotation, atoms @ rotation, zero))
        >>> bool(shift.abs().max() < 1e-5)
        True
    """
    u, v = one.directions().double(), other.directions().double()
    mean_u, mean_v = (u.mean(0), v.mean(0)) if reference is None else reference
    u, v = u - mean_u.double(), v - mean_v.double()
    a, b = one.atoms.double(), other.atoms.double()
    # The profiles are u a^T and v b^T; their inner products need matrices of the models' widths alone.
    inner = ((u @ (a.T @ b)) * v).sum(-1)
    lengths = [((w @ (c.T @ c)) * w).sum(-1).clamp_min(0) for w, c in ((u, a), (v, b))]
    scale = (lengths[0] * lengths[1]).sqrt()
    both_zero = (lengths[0] == 0) & (lengths[1] == 0)
    shift = 1 - inner / scale.where(scale > 0, 1)
    return shift.masked_fill(both_zero, 0).clamp(0, 2).float()
