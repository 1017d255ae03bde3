"""The hot loop for a CPU: the compiled kernel, on tensors."""

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.kernel import pursue_rows
from itda_lens.pursuit.orthogonal_kernel import pursue_rows_orthogonal


@torch.no_grad()
def pursue_fused(
    correlations: Float[Tensor, "b n"],
    gram: Float[Tensor, "n capacity"],
    k: int,
    *,
    nonnegative: bool = False,
    orthogonal: bool = False,
    energy: Float[Tensor, " b"] | None = None,
    tolerance: float = 0.0,
) -> SparseCodes:
    """What `pursue` computes with a stored Gram matrix, on one thread of a CPU."""
    b, _ = correlations.shape
    values = correlations.new_zeros(b, k)
    indices = torch.zeros(b, k, dtype=torch.int64)
    # The compiled loop assumes finite numbers: a row with others is emptied, and comes out as NaN.
    broken = (correlations.sum(dim=-1) if energy is None else energy).isfinite().logical_not()
    if broken.any():
        correlations = correlations.masked_fill(broken[:, None], 0)
    left = torch.zeros(b, dtype=torch.float64) if energy is None else energy.to(torch.float64, copy=True)
    floor = tolerance**2 * left if tolerance > 0 else torch.full_like(left, torch.finfo(left.dtype).min)
    arrays = (t.numpy() for t in (correlations, gram, values, indices, left, floor))  # views, not copies
    (pursue_rows_orthogonal if orthogonal else pursue_rows)(*arrays, nonnegative)
    values[broken, 0] = torch.nan
    return SparseCodes(values, indices)
