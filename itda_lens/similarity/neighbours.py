"""Measures from angles between tokens: mutual nearest neighbours and relative representations."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import normalize

from itda_lens.similarity.declaration import UP_TO_ROTATION, Steps, check_pair, declare

_BLOCK = 1024
_K = 10
ANCHORS = 300
"""Of relative representations, unless others are given."""


def _neighbours(x: Float[Tensor, "t d"], k: int) -> Int64[Tensor, "t k"]:
    unit = normalize(x.double(), dim=1)
    found: list[Tensor] = []
    for start in range(0, len(unit), _BLOCK):
        cosines = unit[start : start + _BLOCK] @ unit.T
        cosines.diagonal(start).fill_(-torch.inf)
        found.append(cosines.topk(k, dim=1).indices)
    return torch.cat(found)


def _tokens_for(k: int) -> int:
    return k + 2


def _shared(a: Int64[Tensor, "t k"], b: Int64[Tensor, "t k"]) -> float:
    return float((a[:, :, None] == b[:, None, :]).any(dim=2).double().mean())


def _permuted(neighbours: Int64[Tensor, "t k"], order: Int64[Tensor, " t"]) -> Int64[Tensor, "t k"]:
    # Token i is now what was token order[i], and neighbours go by their new numbers.
    return order.argsort()[neighbours[order]]


@declare(
    (0.0, 1.0),
    symmetric=True,
    invariant={**UP_TO_ROTATION, "shift": "neither"},
    in_steps=Steps(lambda x: _neighbours(x, _K), _permuted, _shared),
    needs=lambda d, e: _tokens_for(_K),
)
def mutual_knn(x: Float[Tensor, "t d"], y: Float[Tensor, "u e"], *, k: int = _K) -> float:
    """The share of a token's `k` nearest other tokens, by cosine, that are the same in both: 0 to 1.

    Huh et al. 2024 (arXiv 2405.07987, appendix A). By chance it is `k / (t - 1)`. The distances take `t^2` time: use
    some thousand tokens.

    Raises:
        ValueError: different tokens, no more than `k` of them, values that are not finite, or a constant
            representation.

    Example:
        >>> x = torch.randn(50, 4)
        >>> mutual_knn(x, 3 * x.flip(1), k=5)
        1.0
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    check_pair(x, y, tokens=_tokens_for(k), why=f" for k={k}")
    return _shared(_neighbours(x, k), _neighbours(y, k))


class _Described(NamedTuple):
    x: Float64[Tensor, "t d"]
    cosines: Float64[Tensor, "t a"]

    @staticmethod
    def by_random_anchors(x: Float64[Tensor, "t d"], seed: int) -> "_Described":
        return _Described(x, described(x, random_anchors(len(x), None, seed)))


def _relative_steps(seed: int) -> Steps:
    return Steps(
        lambda x: _Described.by_random_anchors(x.double(), seed),
        lambda y, order: _Described.by_random_anchors(y.x[order], seed),
        lambda a, b: mean_cosine(a.cosines, b.cosines),
    )


@declare(
    (-1.0, 1.0),
    symmetric=True,
    invariant={**UP_TO_ROTATION, "token permutation": "neither"},
    in_steps=_relative_steps(seed=0),
    seeded=_relative_steps,
)
def relative(
    x: Float[Tensor, "t d"],
    y: Float[Tensor, "u e"],
    *,
    anchors: int | Int64[Tensor, " a"] | None = None,
    center: bool = True,
    seed: int = 0,
) -> float:
    """Mean cosine between relative representations (Moschella et al. 2023, arXiv 2209.15430): -1 to 1.

    A token is described by its cosines with anchors, which are the same tokens in both.

    Args:
        x: activations of some tokens.
        y: activations of the same tokens, elsewhere.
        anchors: how many, chosen at random (300, or all tokens where there are fewer, if not given); or which rows,
            such as those that are atoms of an ITDA.
        center: take off the mean first. The published method does not; activations of language models share a large
            mean, and without this all cosines are much alike.
        seed: of the choice of anchors.

    Raises:
        ValueError: different or too few tokens, anchors that are no rows, values that are not finite, or a constant
            representation.

    Example:
        >>> x = torch.randn(50, 4)
        >>> round(relative(x, 3 * x.flip(1), anchors=torch.arange(20)), 4)
        1.0
    """
    check_pair(x, y)
    if anchors is None or isinstance(anchors, int):
        anchors = random_anchors(len(x), anchors, seed)
    elif len(anchors) == 0 or not bool(((anchors >= 0) & (anchors < len(x))).all()):
        raise ValueError(f"anchors must be one or more rows from 0 to {len(x) - 1}")
    return mean_cosine(*(described(side, anchors, center) for side in (x, y)))


def random_anchors(tokens: int, anchors: int | None, seed: int) -> Int64[Tensor, " a"]:
    """Some of the tokens at random, `ANCHORS` where there are as many if None; ValueError where there are not."""
    anchors = min(ANCHORS, tokens) if anchors is None else anchors
    if not 1 <= anchors <= tokens:
        raise ValueError(f"{anchors} anchors can't be chosen from {tokens} tokens: ask for 1 to {tokens}")
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:anchors]


def described(x: Float[Tensor, "t d"], anchors: Int64[Tensor, " a"], center: bool = True) -> Float64[Tensor, "t a"]:
    """The relative representation: cosines of each token with the anchors, as a unit vector."""
    x = x.double()
    unit = normalize(x - x.mean(dim=0) if center else x, dim=1)
    return normalize(unit @ unit[anchors].T, dim=1)


def mean_cosine(a: Float64[Tensor, "t a"], b: Float64[Tensor, "t a"]) -> float:
    """The mean over tokens of the cosine between unit vectors."""
    return float(torch.dot(a.flatten(), b.flatten()) / len(a))
