"""Linear measures of two representations: CKA, Procrustes and regression, each from second moments."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from itda_lens.similarity.declaration import UP_TO_ROTATION, check_pair, declare
from itda_lens.similarity.moments import Moments, PairMoments

_RANK = 1e-10
"""Directions with less than this share of the largest variance are rounding."""


def _cka(m: PairMoments) -> float:
    return float(m.cross.square().sum() / (m.x.covariance.norm() * m.y.covariance.norm()))


def debiased_cka_of_moments(m: PairMoments) -> float:
    """`linear_cka` with `debiased`, from second moments."""
    own = _unbiased_hsic(m.x.sums) * _unbiased_hsic(m.y.sums)
    return float(_unbiased_hsic(m.sums) / own.sqrt())


def _procrustes(m: PairMoments) -> float:
    total = m.x.covariance.trace() * m.y.covariance.trace()
    return float((torch.linalg.svdvals(m.cross).sum() / total.sqrt()).clamp(max=1))


def _r2(m: PairMoments) -> float:
    check_tokens(m, len(m.x.covariance))
    whitened = whitening(m.x).T @ m.cross
    return float((whitened.square().sum() / m.y.covariance.trace()).clamp(max=1))


@declare(
    (0.0, 1.0),
    symmetric=True,
    invariant=UP_TO_ROTATION,
    of_moments=_cka,
)
def linear_cka(
    x: Float[Tensor, "t d"], y: Float[Tensor, "u e"], *, debiased: bool = False, paper_variant: bool = False
) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414, eq. 2): 0 to 1.

    Args:
        x: activations of some tokens.
        y: activations of the same tokens, elsewhere.
        debiased: from the unbiased estimate (Song et al. 2012), which does not grow as tokens get few; it may be
            negative.
        paper_variant: first scale every feature to unit norm, as the released code of arXiv 2505.17769 does. That is
            no linear CKA: a rotation of the features changes it.

    Raises:
        ValueError: different or too few tokens, values that are not finite, a constant representation or, with
            `paper_variant`, a constant feature.

    Example:
        >>> x = torch.randn(50, 4)
        >>> round(linear_cka(x, 3 * x.flip(1) + 1), 4)
        1.0
    """
    check_pair(x, y, tokens=4 if debiased else 2)
    if paper_variant:
        x, y = _unit_features(x), _unit_features(y)
    if len(x) < max(x.shape[1], y.shape[1]):
        return _gram_cka(x, y, debiased)
    moments = PairMoments.of(x, y)
    return debiased_cka_of_moments(moments) if debiased else _cka(moments)


@declare(
    (0.0, 1.0),
    symmetric=True,
    invariant=UP_TO_ROTATION,
    of_moments=_procrustes,
)
def procrustes(x: Float[Tensor, "t d"], y: Float[Tensor, "u e"]) -> float:
    """The cosine that the best rotation gives (Williams et al. 2021, arXiv 2110.14739): 0 to 1.

    The nuclear norm of the cross-covariance over the root of the product of both variances; its arc cosine is a metric.

    Raises:
        ValueError: different or too few tokens, values that are not finite, or a constant representation.

    Example:
        >>> x = torch.randn(50, 4)
        >>> round(procrustes(x, 3 * x.flip(1) + 1), 4)
        1.0
    """
    check_pair(x, y)
    return _procrustes(PairMoments.of(x, y))


@declare(
    (0.0, 1.0),
    symmetric=False,
    invariant={**UP_TO_ROTATION, "invertible linear": "first"},
    of_moments=_r2,
    needs=lambda d, _: tokens_for(d),
)
def linear_regression_r2(x: Float[Tensor, "t d"], y: Float[Tensor, "u e"], *, paper_variant: bool = False) -> float:
    """The share of the variance of `y` that a linear map of `x`, with an intercept, predicts: 0 to 1.

    Kornblith et al. 2019 (arXiv 1905.00414), table 1, which names the arguments the other way round.

    Args:
        x: activations of some tokens: the predictors.
        y: activations of the same tokens, elsewhere: what is predicted.
        paper_variant: without an intercept, while the variance is still about the mean, as the released code of
            arXiv 2505.17769 does: it may be negative.

    Raises:
        ValueError: different tokens, no more tokens than `x` has dimensions, values that are not finite, or a constant
            representation.

    Example:
        >>> x = torch.randn(50, 4)
        >>> round(linear_regression_r2(x, x[:, :2] + 1), 4)
        1.0
    """
    check_pair(x, y, tokens=tokens_for(x.shape[1]), why=f", more than the {x.shape[1]} dimensions of x")
    if not paper_variant:
        return _r2(PairMoments.of(x, y))
    x, y = x.double(), y.double()
    residual = y - x @ torch.linalg.lstsq(x, y, driver="gelsd").solution
    return float(1 - residual.square().sum() / (y - y.mean(dim=0)).square().sum())


def whitening(moments: Moments, directions: int | None = None) -> Float64[Tensor, "d r"]:
    """The map after which the principal directions (the first ones, or all but rounding) have unit variance."""
    variances, vectors = moments.eigen
    rank = int((variances > _RANK * variances[0]).sum())
    kept = slice(min(directions or rank, rank))
    return vectors[:, kept] * variances[kept].rsqrt()


def tokens_for(*widths: int) -> int:
    """How many tokens a fit of these widths needs: with no more than dimensions it would be perfect by itself."""
    return max(widths) + 2


def check_tokens(m: PairMoments, width: int) -> None:
    """Raise a ValueError where there are too few tokens for a fit of some width."""
    if m.x.tokens < tokens_for(width):
        raise ValueError(f"there are {m.x.tokens} tokens for {width} dimensions: give more tokens than that")


def _unbiased_hsic(sums: Float64[Tensor, "d_and_2 e_and_2"]) -> Float64[Tensor, ""]:
    # Song et al. 2012, eq. 5, for the kernels x.x' and y.y' with empty diagonals, from sums over (x, |x|^2, 1).
    n = sums[-1, -1]
    products, both_norms = sums[:-2, :-2], sums[-2, -2]
    x, y = sums[:-2, -1], sums[-1, :-2]
    alone = products.square().sum() - both_norms
    totals = (x.square().sum() - sums[-2, -1]) * (y.square().sum() - sums[-1, -2])
    chained = x @ products @ y - x @ sums[:-2, -2] - sums[-2, :-2] @ y + both_norms
    return (alone + totals / ((n - 1) * (n - 2)) - 2 * chained / (n - 2)) / (n * (n - 3))


def _gram_cka(x: Tensor, y: Tensor, debiased: bool) -> float:
    x, y = ((side.double() - side.double().mean(dim=0)) for side in (x, y))
    k, q = x @ x.T, y @ y.T
    if not debiased:
        return float((k * q).sum() / (k.norm() * q.norm()))
    return float(_u_centred(k, q) / (_u_centred(k, k) * _u_centred(q, q)).sqrt())


def _u_centred(k: Tensor, q: Tensor) -> Tensor:
    n = len(k)
    k, q = (matrix - matrix.diag().diag() for matrix in (k, q))
    totals = k.sum() * q.sum() / ((n - 1) * (n - 2))
    return ((k * q).sum() + totals - 2 * k.sum(dim=0) @ q.sum(dim=0) / (n - 2)) / (n * (n - 3))


def _unit_features(x: Tensor) -> Tensor:
    x = x.double() - x.double().mean(dim=0)
    norms = x.norm(dim=0)
    if not bool((norms > 0).all()):
        raise ValueError(
            f"feature {int((norms == 0).nonzero()[0])} is constant, and paper_variant divides by its norm: leave it out"
        )
    return x / norms
