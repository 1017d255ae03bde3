"""The face of the package: one function, whichever way is fastest behind it."""

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.gradient import differentiable
from itda_lens.pursuit.gram import gram_fits, gram_matrix
from itda_lens.pursuit.solver import pursue

NORM_TOLERANCE = 2e-2
"""Atoms may be off unit length by this much: the rounding of bfloat16, with room."""


def matching_pursuit(
    x: Float[Tensor, "*batch d"],
    atoms: Float[Tensor, "n _"],
    k: int,
    *,
    gram: Float[Tensor, "_ _"] | None = None,
    nonnegative: bool = False,
    tolerance: float = 0.0,
) -> SparseCodes:
    """Decompose activations into at most `k` atoms each (arXiv 2505.17769, Algorithm 2; Mallat & Zhang 1993).

    Each step takes the atom whose inner product with the residual is largest in size, adds that product to
    its coefficient and subtracts the projection from the residual. Coefficients are signed. The loop runs in
    float32 at least, whatever the dtype of `x`. A row with NaN stays NaN and touches no other row.
    Coefficients have gradients to `x` and `atoms`; the choice of atoms has none.

    Args:
        x: activations, of any leading shape.
        atoms: the dictionary, rows of unit length.
        k: steps; it may be larger than `n`, as an atom may be chosen again.
        gram: the inner products of the atoms, float32; computed where it pays if not given.
        nonnegative: only positive coefficients; a row stops when no atom correlates positively.
        tolerance: a row stops when its residual's norm is at most this part of its own; resolves about 1e-3.

    Returns:
        `values [*batch, k]` and `indices [*batch, k]` in order of choice.

    Raises:
        ValueError: a width, `k`, `tolerance`, the shape of `gram` or the length of an atom is out of range.

    Example:
        >>> codes = matching_pursuit(torch.tensor([3.0, -4.0]), torch.eye(2), k=2)
        >>> codes.values, codes.indices
        (tensor([-4.,  3.]), tensor([1, 0]))
    """
    _check(x, atoms, k, gram, tolerance)
    dtype = torch.promote_types(torch.promote_types(x.dtype, atoms.dtype), torch.float32)
    flat, work = x.reshape(-1, x.shape[-1]).to(dtype), atoms.to(dtype)
    gram = _gram_if_it_pays(len(flat), work, k) if gram is None else gram.to(work).contiguous()

    def solve() -> SparseCodes:
        return pursue(flat.detach(), work.detach(), gram, k, nonnegative=nonnegative, tolerance=tolerance)

    values, indices = differentiable(flat, work, solve)
    return SparseCodes(values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k))


def _gram_if_it_pays(b: int, atoms: Tensor, k: int) -> Tensor | None:
    # The matrix costs n products with the atoms; computing rows costs one for each activation and step.
    n = len(atoms)
    return gram_matrix(atoms) if n < b * k and gram_fits(n, atoms.element_size()) else None


def _check(x: Tensor, atoms: Tensor, k: int, gram: Tensor | None, tolerance: float) -> None:
    n, d = atoms.shape
    if n == 0:
        raise ValueError("atoms is empty: matching pursuit needs at least one atom")
    if x.shape[-1] != d:
        raise ValueError(f"x has width {x.shape[-1]}, but the atoms have width {d}: both must come from one hook point")
    if k < 1:
        raise ValueError(f"k is the number of steps and must be at least 1, got {k}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is a relative residual norm and must be in [0, 1), got {tolerance}")
    if gram is not None and gram.shape != (n, n):
        raise ValueError(f"gram has shape {tuple(gram.shape)}, but {n} atoms need ({n}, {n})")
    check_unit_rows(atoms.detach().float().norm(dim=-1) if gram is None else gram.diagonal().sqrt())


def check_unit_rows(norms: Float[Tensor, " n"]) -> None:
    """Raise a ValueError that names the worst atom when a norm is off 1 by more than `NORM_TOLERANCE`."""
    off = (norms - 1).abs().nan_to_num(nan=float("inf"))
    worst = int(off.argmax())
    if off[worst] > NORM_TOLERANCE:
        raise ValueError(
            f"atom {worst} has length {norms[worst].item():.4g}, and atoms must be of unit length to within "
            f"{NORM_TOLERANCE}: divide each row by its norm first"
        )
