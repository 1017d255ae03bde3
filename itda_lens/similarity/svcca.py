"""SVCCA: canonical correlations between the principal directions of two representations."""

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.similarity.declaration import UP_TO_ROTATION, check_pair, declare
from itda_lens.similarity.linear import check_tokens, tokens_for, whitening
from itda_lens.similarity.moments import Moments, PairMoments

VARIANCE = 0.99
_PAPER_DIRECTIONS = 20


def svcca_of_moments(m: PairMoments, variance: float = VARIANCE, directions: int | None = None) -> float:
    """`svcca` from second moments."""
    check_tokens(m, max(len(m.x.covariance), len(m.y.covariance)))
    a, b = (whitening(side, directions or _directions(side, variance)) for side in (m.x, m.y))
    return float(torch.linalg.svdvals(a.T @ m.cross @ b).clamp(max=1).mean())


@declare(
    (0.0, 1.0),
    symmetric=True,
    invariant=UP_TO_ROTATION,
    of_moments=svcca_of_moments,
    needs=tokens_for,
)
def svcca(
    x: Float[Tensor, "t d"],
    y: Float[Tensor, "u e"],
    *,
    variance: float = VARIANCE,
    directions: int | None = None,
    paper_variant: bool = False,
) -> float:
    """The mean canonical correlation of principal directions (Raghu et al. 2017, arXiv 1706.05806): 0 to 1.

    Args:
        x: activations of some tokens.
        y: activations of the same tokens, elsewhere.
        variance: the share of variance that the kept directions hold, above 0 and up to 1. At 1 this is CCA.
        directions: keep this many instead, of every layer. By share of variance the number differs between layers, and
            a layer of few directions then looks like all others.
        paper_variant: what the released code of arXiv 2505.17769 does, but for its unseeded approximation: 20
            directions, and a symmetric solver that sees the lower half of a matrix that is not symmetric. It may
            pass 1, and swapping the arguments changes it.

    Raises:
        ValueError: different tokens, fewer tokens than dimensions, values that are not finite, a constant
            representation, or a variance out of range.

    Example:
        >>> x = torch.randn(50, 4)
        >>> round(svcca(x, 3 * x.flip(1) + 1), 4)
        1.0
    """
    if directions is not None and directions < 1:
        raise ValueError(f"directions must be at least 1, got {directions}")
    if not 0 < variance <= 1:
        raise ValueError(f"variance must be above 0 and at most 1, got {variance}")
    width = max(x.shape[1], y.shape[1])
    check_pair(x, y, tokens=tokens_for(width), why=f", more than the {width} dimensions")
    moments = PairMoments.of(x, y)
    return _paper_svcca(moments) if paper_variant else svcca_of_moments(moments, variance, directions)


def _paper_svcca(m: PairMoments) -> float:
    a, b = (whitening(side, _PAPER_DIRECTIONS) for side in (m.x, m.y))
    between = a.T @ m.cross @ b
    scale = m.x.eigen[0][: len(between)].sqrt()
    seen = torch.linalg.eigvalsh((between @ between.T) * scale / scale[:, None], UPLO="L")
    return float(seen.clamp_min(0).sqrt().mean())


def _directions(moments: Moments, variance: float) -> int | None:
    if variance == 1:
        return None
    variances, _ = moments.eigen
    return int((variances.cumsum(0) < variance * variances.sum()).sum()) + 1
