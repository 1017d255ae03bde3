"""Pursuit on correlations alone, which each step updates with one row of the Gram matrix."""

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.eager import pursue_eager
from itda_lens.pursuit.fused import pursue_fused

# A block of correlations (16 MiB on a CPU): large enough for its product to be fast, small enough for memory.
_BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}


def block_rows(n: int, device: torch.device) -> int:
    """How many activations are pursued together."""
    return max(16, _BLOCK_ELEMENTS.get(device.type, 2**24) // max(n, 1))


def pursue(
    correlations: Float[Tensor, "b n"],
    atoms: Float[Tensor, "n d"],
    gram: Float[Tensor, "n capacity"] | None,
    k: int,
    *,
    nonnegative: bool = False,
    energy: Float[Tensor, " b"] | None = None,
    tolerance: float = 0.0,
) -> SparseCodes:
    """Matching pursuit from `<x, d_j>`: `x` itself is not needed. Overwrites `correlations` with the residual's.

    Subtracting `v d_i` from the residual subtracts `v <d_i, d_j>` from its correlation with each atom `j`
    (Mallat & Zhang 1993, eq. 19), which is `v` times a row of the Gram matrix; the residual's squared norm
    falls by `v^2`.

    Args:
        correlations: inner products of each activation with each atom.
        atoms: the dictionary, for rows of the Gram matrix that are not stored.
        gram: the Gram matrix, perhaps with room on the right; rows are computed from the atoms without it.
        k: steps.
        nonnegative: choose among positive correlations alone, and stop when there is none.
        energy: squared norms of the activations; needed with `tolerance`.
        tolerance: relative residual norm at which a row stops; in float32 it resolves about 1e-3.
    """
    if gram is not None and correlations.device.type == "cpu":
        return pursue_fused(correlations, gram, k, nonnegative=nonnegative, energy=energy, tolerance=tolerance)
    return pursue_eager(correlations, atoms, gram, k, nonnegative=nonnegative, energy=energy, tolerance=tolerance)
