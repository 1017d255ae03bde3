"""Second moments of representations over a stream: all that linear measures need, in memory that does not grow."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

LIMIT_GIB = 4


class CrossMoments:
    """Sums of products of several representations of the same tokens, in float64, in one pass.

    To each activation its squared norm and a one are appended: these columns hold the count, the means, and
    what unbiased estimates need of each token's own norm. The first tokens' mean is taken off, for the sake of
    rounding; nothing that is computed from the sums depends on it.

    Args:
        widths: the width of each representation.

    Raises:
        ValueError: the sums would not fit in 4 GiB.

    Example:
        >>> x = torch.randn(100, 3)
        >>> moments = CrossMoments([3, 3])
        >>> for part in x.split(60):
        ...     moments.update([part, 2 * part])
        >>> torch.allclose(moments.pair(0, 1).cross, 2 * x.double().T.cov(correction=0))
        True
    """

    def __init__(self, widths: Sequence[int]):
        ends = torch.tensor([width + 2 for width in widths]).cumsum(0).tolist()
        if (gib := CrossMoments.gib(widths)) > LIMIT_GIB:
            raise ValueError(
                f"{len(widths)} layers of {ends[-1]:,} numbers for each token need {gib:.1f} GiB of moments, "
                f"and {LIMIT_GIB} GiB is the limit: compare fewer layers or models at a time"
            )
        self._columns = [slice(end - width - 2, end) for width, end in zip(widths, ends, strict=True)]
        self._sums = torch.zeros(ends[-1], ends[-1], dtype=torch.float64)
        self._origins: list[Tensor] = []
        self._own: dict[int, Moments] = {}

    @staticmethod
    def gib(widths: Sequence[int]) -> float:
        """The GiB that the sums take."""
        return 8 * sum(width + 2 for width in widths) ** 2 / 2**30

    @torch.no_grad()
    def update(self, activations: Sequence[Float[Tensor, "t _"]]) -> None:
        """Add the activations of some tokens, the same ones in every representation."""
        batch = [x.detach().cpu().double() for x in activations]
        self._origins = self._origins or [x.mean(dim=0) for x in batch]
        self._own.clear()
        columns: list[Tensor] = []
        for x, origin in zip(batch, self._origins, strict=True):
            columns.append(augmented(x - origin))
        stacked = torch.cat(columns, dim=1)
        self._sums += stacked.T @ stacked

    def pair(self, i: int, j: int) -> "PairMoments":
        """The moments of two of the representations."""
        return PairMoments(self._moments(i), self._moments(j), self._sums[self._columns[i], self._columns[j]])

    def _moments(self, i: int) -> "Moments":
        if i not in self._own:  # kept, with its decomposition, for all the pairs that it is in
            self._own[i] = Moments(self._sums[self._columns[i], self._columns[i]])
        return self._own[i]


class Moments:
    """The moments of one representation."""

    def __init__(self, sums: Float64[Tensor, "d_and_2 d_and_2"]):
        self.sums = sums
        self.tokens = int(sums[-1, -1])
        self.covariance = _centred(sums)

    @cached_property
    def eigen(self) -> tuple[Float64[Tensor, " d"], Float64[Tensor, "d d"]]:
        """Variances along the principal directions, the largest first, and these directions as columns."""
        variances, directions = torch.linalg.eigh(self.covariance)
        return variances.flip(0).clamp_min(0), directions.flip(1)


class PairMoments(NamedTuple):
    """The moments of two representations `x` and `y` of the same tokens."""

    x: Moments
    y: Moments
    sums: Float64[Tensor, "d_and_2 e_and_2"]
    """Sums over tokens of the products of `(x, |x|^2, 1)` with `(y, |y|^2, 1)`."""

    @staticmethod
    def of(x: Float[Tensor, "t d"], y: Float[Tensor, "t e"]) -> "PairMoments":
        return Held.of(x).beside(Held.of(y))

    @property
    def cross(self) -> Float64[Tensor, "d e"]:
        """The cross-covariance."""
        return _centred(self.sums)


class Held(NamedTuple):
    """A representation whose tokens are all at hand, with its moments."""

    rows: Float64[Tensor, "t d_and_2"]
    moments: Moments

    @staticmethod
    def of(x: Float[Tensor, "t d"]) -> "Held":
        x = x.detach().cpu().double()
        rows = augmented(x - x.mean(dim=0))
        return Held(rows, Moments(rows.T @ rows))

    def permuted(self, order: Int64[Tensor, " t"]) -> "Held":
        """The same with its tokens in another order, which its own moments don't depend on."""
        return self._replace(rows=self.rows[order])

    def beside(self, other: "Held") -> PairMoments:
        """The moments of this one and another of the same tokens."""
        return PairMoments(self.moments, other.moments, self.rows.T @ other.rows)


def augmented(x: Float64[Tensor, "t d"]) -> Float64[Tensor, "t d_and_2"]:
    """Activations with their squared norm and a one appended."""
    return torch.cat([x, x.square().sum(dim=1, keepdim=True), x.new_ones(len(x), 1)], dim=1)


def _centred(sums: Tensor) -> Tensor:
    tokens = sums[-1, -1]
    return (sums[:-2, :-2] - sums[:-2, -1:] @ sums[-1:, :-2] / tokens) / tokens
