"""Which path a pursuit takes: by device, and by what there is of the Gram matrix."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.eager import pursue_eager
from itda_lens.pursuit.fused import pursue_fused
from itda_lens.pursuit.product import inner_products
from itda_lens.pursuit.threads import in_threads

# A block of correlations (8 MiB on a CPU): large enough for its product to be fast, small enough for caches and memory.
_BLOCK_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}


@torch.no_grad()
def pursue(
    x: Float[Tensor, "b d"],
    atoms: Float[Tensor, "n d"],
    gram: Float[Tensor, "n capacity"] | None,
    k: int,
    *,
    nonnegative: bool = False,
    tolerance: float = 0.0,
) -> SparseCodes:
    """Matching pursuit of any number of activations, in blocks.

    Args:
        x: activations, of the dtype of the atoms.
        atoms: the dictionary.
        gram: the Gram matrix, perhaps with room on the right; rows are computed from the atoms without it.
        k: steps.
        nonnegative: choose among positive correlations alone, and stop when there is none.
        tolerance: relative residual norm at which a row stops; in float32 it resolves about 1e-3.
    """

    def solve(rows: slice) -> SparseCodes:
        with torch.no_grad():  # a setting of the thread
            parts = [
                _pursue_block(
                    inner_products(block, atoms),
                    atoms,
                    gram,
                    k,
                    nonnegative=nonnegative,
                    energy=block.square().sum(dim=-1),
                    tolerance=tolerance,
                )
                for block in x[rows].split(block_rows(len(atoms), x.device))
            ]
        return SparseCodes(*map(torch.cat, zip(*parts, strict=True)))

    return in_threads(solve, len(x)) if _is_compiled(x, gram) else solve(slice(None))


@torch.no_grad()
def pursue_correlations(
    correlations: Float[Tensor, "b n"],
    atoms: Float[Tensor, "n d"],
    gram: Float[Tensor, "n capacity"] | None,
    k: int,
    *,
    nonnegative: bool = False,
) -> SparseCodes:
    """Matching pursuit from `<x, d_j>`: `x` itself is not needed. Overwrites `correlations` with the residual's.

    Subtracting `v d_i` from the residual subtracts `v <d_i, d_j>` from its correlation with each atom `j`
    (Mallat & Zhang 1993, eq. 19), which is `v` times a row of the Gram matrix; the residual's squared norm
    falls by `v^2`.
    """

    def solve(rows: slice) -> SparseCodes:
        return _pursue_block(correlations[rows], atoms, gram, k, nonnegative=nonnegative)

    return in_threads(solve, len(correlations)) if _is_compiled(correlations, gram) else solve(slice(None))


def block_rows(n: int, device: torch.device) -> int:
    """How many activations are pursued together."""
    return max(16, _BLOCK_ELEMENTS.get(device.type, 2**24) // max(n, 1))


def _is_compiled(x: Tensor, gram: Tensor | None) -> bool:
    return gram is not None and x.device.type == "cpu"


def _pursue_block(correlations: Tensor, atoms: Tensor, gram: Tensor | None, k: int, **settings: Any) -> SparseCodes:
    if gram is not None and _is_compiled(correlations, gram):
        return pursue_fused(correlations, gram, k, **settings)
    return pursue_eager(correlations, atoms, gram, k, **settings)
