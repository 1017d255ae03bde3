"""The hot loop for any device, in plain torch."""

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit.broken import marks_broken_rows
from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.gram import Gram


@torch.no_grad()
@marks_broken_rows
def pursue_eager(
    correlations: Float[Tensor, "b n"],
    gram: Gram,
    k: int,
    *,
    nonnegative: bool = False,
    energy: Float[Tensor, " b"] | None = None,
    tolerance: float = 0.0,
) -> SparseCodes:
    """What `pursue` computes, one step of all rows at a time. Overwrites `correlations`."""
    b, n = correlations.shape
    values = correlations.new_zeros(k, b)
    indices = torch.zeros(k, b, dtype=torch.int64, device=correlations.device)
    gram = gram[:, :n] if isinstance(gram, Tensor) else gram
    squares = gram.diagonal()  # atoms may be off unit length
    left = None if energy is None or tolerance == 0 else energy.clone()
    floor = None if left is None else tolerance**2 * left
    magnitude = correlations if nonnegative else torch.empty_like(correlations)
    for step in range(k):
        if not nonnegative:
            torch.abs(correlations, out=magnitude)
        chosen = magnitude.argmax(dim=-1)
        top = correlations.gather(-1, chosen[:, None])[:, 0]
        value = (top.clamp(min=0) if nonnegative else top) / squares[chosen]
        if left is not None and floor is not None:
            value = value.masked_fill(left <= floor, 0)
            left -= value * top
        stopped = value == 0
        if stopped.all():
            break
        values[step], indices[step] = value, chosen.masked_fill(stopped, 0)
        if step + 1 < k:
            correlations.addcmul_(gram[chosen], value[:, None], value=-1)
    return SparseCodes(values.T.contiguous(), indices.T.contiguous())
