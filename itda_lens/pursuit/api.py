"""The face of the package: one function, whichever way is fastest behind it."""

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.contexts import is_transformed, without_autocast
from itda_lens.pursuit.gradient import differentiable
from itda_lens.pursuit.gram import Gram, GramCache, GramRows, gram_within_limit
from itda_lens.pursuit.operator import pursue_transformed
from itda_lens.pursuit.solver import pursue

NORM_TOLERANCE = 2e-2
"""Atoms may be off unit length by this much: the rounding of bfloat16, with room."""
_EXACT_NORM_TOLERANCE = 1e-5
"""Unit rows in float32 are off by less than this; rows that came through bfloat16 by far more."""


@without_autocast
def matching_pursuit(
    x: Float[Tensor, "*batch d"],
    atoms: Float[Tensor, "n _"],
    k: int,
    *,
    gram: Float[Tensor, "_ _"] | GramRows | GramCache | None = None,
    nonnegative: bool = False,
    orthogonal: bool = False,
    tolerance: float = 0.0,
) -> SparseCodes:
    """Decompose activations into at most `k` atoms each (arXiv 2505.17769, Algorithm 2; Mallat & Zhang 1993).

    Each step takes the atom whose inner product with the residual is largest in size, adds that product (over the
    atom's squared length, which may be a little off 1) to its coefficient and subtracts the projection from the
    residual. Coefficients are signed. The loop runs in float32 at least, whatever the dtype of `x`. No step leaves more
    than the one before it. A row with NaN or infinite values stays NaN and touches no other.
    Coefficients have gradients to `x` and `atoms`; the choice of atoms has none.

    Args:
        x: activations, of any leading shape.
        atoms: the dictionary, rows of unit length.
        k: steps; it may be larger than `n`, as an atom may be chosen again.
        gram: the inner products of the atoms, float32 (or its rows on demand, or a cache of either); computed as it
            pays if not given.
        nonnegative: only positive coefficients; a row stops when no atom correlates positively.
        orthogonal: after each step all coefficients are the least-squares fit to the chosen atoms (with `nonnegative`,
            the non-negative one, in which some may be 0), so no atom is chosen twice, and one within the span of those
            before it is passed over (Batch-OMP: Rubinstein, Zibulevsky & Elad 2008).
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
    flat, settings = x.reshape(-1, x.shape[-1]).to(dtype), (nonnegative, orthogonal, tolerance)
    if is_transformed():
        cache = gram if isinstance(gram, GramCache) else None
        values, indices = pursue_transformed(flat, atoms, k, cache, *settings)
    else:
        work = atoms.to(dtype)
        values, indices = differentiable(flat, work, lambda: solve(flat, atoms, k, gram, *settings), orthogonal)
    return SparseCodes(values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k))


@torch.no_grad()
def solve(
    x: Float[Tensor, "b d"],
    atoms: Float[Tensor, "n d"],
    k: int,
    gram: Gram | GramCache | None,
    nonnegative: bool,
    orthogonal: bool,
    tolerance: float,
) -> SparseCodes:
    """`matching_pursuit` of rows in the dtype of `x`, without gradients."""
    work = atoms.detach().to(x.dtype)
    products = gram.get(atoms) if isinstance(gram, GramCache) else gram
    check_unit_rows(atoms.detach().float().norm(dim=-1) if products is None else products.diagonal().sqrt())
    if products is None:
        products = _gram_that_pays(len(x), work, k)
    elif isinstance(products, Tensor):
        products = products.to(work).contiguous()
    settings = {"nonnegative": nonnegative, "orthogonal": orthogonal, "tolerance": tolerance}
    return pursue(x.detach(), work, products, k, **settings)


def _gram_that_pays(b: int, atoms: Tensor, k: int) -> Gram:
    # The matrix costs n products with the atoms; computing rows costs one for each activation and step at most.
    return gram_within_limit(atoms) if len(atoms) < b * k else GramRows(atoms)


def _check(x: Tensor, atoms: Tensor, k: int, gram: Gram | GramCache | None, tolerance: float) -> None:
    n, d = atoms.shape
    if n == 0:
        raise ValueError("atoms is empty: matching pursuit needs at least one atom")
    if x.shape[-1] != d:
        raise ValueError(f"x has width {x.shape[-1]}, but the atoms have width {d}: both must come from one hook point")
    if k < 1:
        raise ValueError(f"k is the number of steps and must be at least 1, got {k}")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is a relative residual norm and must be in [0, 1), got {tolerance}")
    if not isinstance(gram, GramCache | None) and gram.shape != (n, n):
        raise ValueError(f"gram has shape {tuple(gram.shape)}, but {n} atoms need ({n}, {n})")


@torch.no_grad()
def unit_rows(atoms: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows brought back to unit length where a narrower dtype had taken them off it; exact rows are not touched.

    Those of 16 bits stay: no scaling brings them nearer.
    """
    if atoms.element_size() < 4:
        return atoms
    norms = atoms.norm(dim=-1, keepdim=True)
    return torch.where((norms - 1).abs() > _EXACT_NORM_TOLERANCE, atoms / norms, atoms)


def check_unit_rows(norms: Float[Tensor, " n"]) -> None:
    """Raise a ValueError that names the worst atom when a norm is off 1 by more than `NORM_TOLERANCE`."""
    off = (norms - 1).abs().nan_to_num(nan=float("inf"))
    worst = int(off.argmax())
    if off[worst] > NORM_TOLERANCE:
        raise ValueError(
            f"atom {worst} has length {norms[worst].item():.4g}, and atoms must be of unit length to within "
            f"{NORM_TOLERANCE}: divide each row by its norm first"
        )
