"""Pursuit that goes on past `k` steps, for the few activations that must not be lost."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from itda_lens.pursuit.api import matching_pursuit
from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.gram import Gram, GramCache
from itda_lens.pursuit.scale import lengths


def pursue_further(
    x: Float[Tensor, "b d"],
    codes: SparseCodes,
    atoms: Float[Tensor, "n _"],
    which: Bool[Tensor, " b"],
    limit: float | Float[Tensor, ""],
    *,
    gram: Gram | GramCache | None = None,
    nonnegative: bool = False,
) -> SparseCodes:
    """Codes in which some activations have as many atoms as it takes: until no more than `limit` is left of them.

    By orthogonal pursuit, to as many atoms as there are dimensions. Codes that leave no more stay as they are.

    Args:
        x: activations.
        codes: their codes.
        atoms: the dictionary.
        which: the activations to go on with.
        limit: the norm that may be left.
        gram: the inner products of the atoms.
        nonnegative: only positive coefficients.

    Returns:
        As many slots for each activation as the longest code needs.

    Example:
        >>> x, atoms = torch.tensor([[9.0, 8.0], [3.0, 2.0]]), torch.eye(2)
        >>> codes = matching_pursuit(x, atoms, 1)
        >>> pursue_further(x, codes, atoms, torch.tensor([True, False]), 1.0).to_dense(2)
        tensor([[9., 8.],
                [3., 0.]])
    """

    def left(rows: Tensor, codes: SparseCodes) -> Tensor:
        return lengths((rows - codes.decode(atoms.to(rows.dtype)).detach()).detach())

    x, rows = x.to(torch.promote_types(x.dtype, torch.float32)), which.nonzero()[:, 0]
    before = left(x[rows], SparseCodes(codes.values[rows], codes.indices[rows]))
    rows, before = rows[before > limit], before[before > limit]
    if len(rows) == 0:
        return codes
    distinct, place = x[rows], torch.arange(len(rows), device=x.device)
    if not (torch.is_grad_enabled() and x.requires_grad):  # BOS is the same in every row
        distinct, place = distinct.unique(dim=0, return_inverse=True)
    steps, tolerance = min(atoms.shape), float(limit / lengths(distinct.detach()).max())
    longer = matching_pursuit(
        distinct, atoms, steps, gram=gram, nonnegative=nonnegative, orthogonal=True, tolerance=tolerance
    )
    longer = SparseCodes(longer.values[place], longer.indices[place])
    better = left(x[rows], longer) < before
    rows, longer = rows[better], SparseCodes(longer.values[better], longer.indices[better])
    slots = max(codes.values.shape[-1], int((longer.values != 0).sum(dim=-1).max())) if len(rows) else 0
    if slots == 0:
        return codes
    values, indices = (pad(part, (0, slots - part.shape[-1])) for part in codes)
    return SparseCodes(
        values.index_put((rows,), longer.values[:, :slots].to(values.dtype)),
        indices.index_put((rows,), longer.indices[:, :slots]),
    )
