"""The hot loop for a CPU: the compiled kernel, on tensors."""

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit.broken import marks_broken_rows
from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.kernel import pursue_rows
from itda_lens.pursuit.orthogonal_eager import pursue_orthogonal_eager
from itda_lens.pursuit.orthogonal_kernel import pursue_rows_orthogonal


@torch.no_grad()
@marks_broken_rows
def pursue_fused(
    correlations: Float[Tensor, "b n"],
    gram: Float[Tensor, "n capacity"],
    k: int,
    *,
    nonnegative: bool = False,
    energy: Float[Tensor, " b"] | None = None,
    tolerance: float = 0.0,
) -> SparseCodes:
    """What `pursue` computes with a stored Gram matrix, on one thread of a CPU."""
    values, indices, left, floor = _outputs(correlations, k, energy, tolerance)
    pursue_rows(*(t.numpy() for t in (correlations, gram, values, indices, left, floor)), nonnegative)
    return SparseCodes(values, indices)


@torch.no_grad()
@marks_broken_rows
def pursue_orthogonal_fused(
    correlations: Float[Tensor, "b n"],
    atoms: Float[Tensor, "n d"],
    gram: Float[Tensor, "n capacity"],
    k: int,
    *,
    x: Float[Tensor, "b d"] | None = None,
    nonnegative: bool = False,
    energy: Float[Tensor, " b"] | None = None,
    tolerance: float = 0.0,
) -> SparseCodes:
    """What `pursue` computes with `orthogonal` and a stored Gram matrix, on one thread of a CPU.

    Rows whose fit the rounding of the Gram matrix would spoil are done without it.
    """
    values, indices, left, floor = _outputs(correlations, k, energy, tolerance)
    own = (correlations.new_empty(0, 0),) * 2 if x is None else (x.contiguous(), atoms.contiguous())
    risky = torch.zeros(len(correlations), dtype=torch.bool)
    arrays = (t.numpy() for t in (correlations, gram, values, indices, left, floor))
    pursue_rows_orthogonal(*arrays, nonnegative, *(t.numpy() for t in own), risky.numpy())
    if risky.any():
        values[risky], indices[risky] = pursue_orthogonal_eager(
            correlations[risky],
            atoms,
            k,
            x=None if x is None else x[risky],
            nonnegative=nonnegative,
            energy=None if energy is None else energy[risky],
            tolerance=tolerance,
        )
    return SparseCodes(values, indices)


def _outputs(
    correlations: Tensor, k: int, energy: Tensor | None, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b = len(correlations)
    left = torch.zeros(b, dtype=torch.float64) if energy is None else energy.to(torch.float64, copy=True)
    floor = tolerance**2 * left if tolerance > 0 else torch.full_like(left, torch.finfo(left.dtype).min)
    return correlations.new_zeros(b, k), torch.zeros(b, k, dtype=torch.int64), left, floor
