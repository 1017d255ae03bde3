"""Which path a pursuit takes: by device, and by what there is of the Gram matrix."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.contexts import untraced
from itda_lens.pursuit.eager import pursue_eager
from itda_lens.pursuit.fused import pursue_fused, pursue_orthogonal_fused
from itda_lens.pursuit.gram import Gram
from itda_lens.pursuit.on_gpu import ON_CHIP, pursue_on_gpu
from itda_lens.pursuit.orthogonal_eager import pursue_orthogonal_eager
from itda_lens.pursuit.product import inner_products, products_in_tf32
from itda_lens.pursuit.scale import near_one
from itda_lens.pursuit.threads import in_threads

# A block of correlations (8 MiB on a CPU): large enough for its product to be fast, small enough for caches and memory.
_BLOCK_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}


@untraced
@torch.no_grad()
def pursue(
    x: Float[Tensor, "b d"],
    atoms: Float[Tensor, "n d"],
    gram: Gram,
    k: int,
    *,
    nonnegative: bool = False,
    orthogonal: bool = False,
    tolerance: float = 0.0,
) -> SparseCodes:
    """Matching pursuit of any number of activations, in blocks.

    Args:
        x: activations, of the dtype of the atoms.
        atoms: the dictionary.
        gram: its Gram matrix, perhaps with room on the right, or the rows of it on demand.
        k: steps.
        nonnegative: choose among positive correlations alone, and stop when there is none.
        orthogonal: fit all coefficients anew at each step.
        tolerance: relative residual norm at which a row stops; in float32 it resolves about 1e-3.
    """
    settings = {"nonnegative": nonnegative, "orthogonal": orthogonal, "tolerance": tolerance}
    x, factors = near_one(x)
    size = block_rows(len(atoms), x.device)
    if orthogonal and not _is_compiled(x, gram):  # which keeps a basis for each row
        size = min(size, block_rows(k * x.shape[1], x.device))

    def solve(rows: slice) -> SparseCodes:
        parts = []
        for block in x[rows].split(size):
            energy = block.square().sum(dim=-1)
            rough = _is_for_triton(block, gram, orthogonal) and len(atoms) <= ON_CHIP and products_in_tf32()
            products = block @ atoms.T if rough else inner_products(block, atoms)
            parts.append(_block(products, atoms, gram, k, x=block, rough=rough, energy=energy, **settings))
        return _joined(parts)

    return _all_rows(solve, x, gram, factors)


@untraced
@torch.no_grad()
def pursue_correlations(
    correlations: Float[Tensor, "b n"],
    atoms: Float[Tensor, "n d"],
    gram: Gram,
    k: int,
    *,
    nonnegative: bool = False,
    orthogonal: bool = False,
    energy: Float[Tensor, " b"] | None = None,
    tolerance: float = 0.0,
) -> SparseCodes:
    """Matching pursuit from `<x, d_j>`: of `x` itself only `energy`, its squared norm, for a `tolerance`.

    Subtracting `v d_i` from the residual subtracts `v <d_i, d_j>` from its correlation with each atom `j`
    (Mallat & Zhang 1993, eq. 19), which is `v` times a row of the Gram matrix; the residual's squared norm
    falls by `v^2`.
    """
    correlations, factors = near_one(correlations)
    if energy is not None and factors is not None:
        energy = energy / factors / factors

    def solve(rows: slice) -> SparseCodes:
        settings = {"nonnegative": nonnegative, "orthogonal": orthogonal, "tolerance": tolerance}
        start = correlations[rows] if _is_compiled(correlations, gram) else correlations[rows].clone()
        return _block(start, atoms, gram, k, energy=None if energy is None else energy[rows], **settings)

    return _all_rows(solve, correlations, gram, factors)


def block_rows(n: int, device: torch.device) -> int:
    """How many activations are pursued together."""
    return max(16, _BLOCK_ELEMENTS.get(device.type, 2**24) // max(n, 1))


def _joined(parts: list[SparseCodes]) -> SparseCodes:
    return parts[0] if len(parts) == 1 else SparseCodes(*map(torch.cat, zip(*parts, strict=True)))


def _all_rows(solve: Callable[[slice], SparseCodes], x: Tensor, gram: Gram, factors: Tensor | None) -> SparseCodes:
    codes = _joined(in_threads(solve, x, split=_is_compiled(x, gram)))
    return codes if factors is None else codes._replace(values=codes.values * factors[:, None])


def _is_compiled(x: Tensor, gram: Gram) -> bool:
    return isinstance(gram, Tensor) and x.device.type == "cpu"


def _is_for_triton(x: Tensor, gram: Gram, orthogonal: bool) -> bool:
    whole = isinstance(gram, Tensor) and x.dtype == gram.dtype == torch.float32
    return whole and not orthogonal and x.device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _block(
    correlations: Tensor,
    atoms: Tensor,
    gram: Gram,
    k: int,
    *,
    orthogonal: bool,
    x: Tensor | None = None,
    rough: bool = False,
    **settings: Any,
) -> SparseCodes:
    if isinstance(gram, Tensor) and _is_compiled(correlations, gram):
        if orthogonal:
            return pursue_orthogonal_fused(correlations, atoms, gram, k, x=x, **settings)
        return pursue_fused(correlations, gram, k, **settings)
    if isinstance(gram, Tensor) and _is_for_triton(correlations, gram, orthogonal):
        return pursue_on_gpu(correlations, gram, k, rough=(x, atoms) if rough and x is not None else None, **settings)
    if orthogonal:
        return pursue_orthogonal_eager(correlations, atoms, k, x=x, **settings)
    return pursue_eager(correlations, gram, k, **settings)
