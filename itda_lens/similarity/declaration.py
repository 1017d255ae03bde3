"""What a measure of two representations promises, as data: its tests are generated from this."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

from jaxtyping import Float
from torch import Tensor

from itda_lens.similarity.moments import PairMoments

Transform = Literal["orthogonal", "isotropic scaling", "invertible linear", "shift", "token permutation"]
Side = Literal["both", "first", "neither"]


class Declaration(NamedTuple):
    """A measure of `x [t, d]` and `y [t, e]`, whose rows are the same tokens; larger always means more alike."""

    compare: Callable[..., float]
    range: tuple[float, float]
    """The least and the largest value; the largest is that of a representation with itself."""
    symmetric: bool
    """Whether the arguments may be swapped. If not, the measure has a direction: from `x` to `y`."""
    invariant: Mapping[Transform, Side]
    """Which transforms leave it as it is, and of which argument. The same permutation is applied to both."""
    of_moments: Callable[[PairMoments], float] | None
    """The same from second moments, for streams; None where the tokens themselves are needed."""
    in_steps: "Steps | None"
    """The same in steps, where much of the work is on each argument by itself."""
    needs: Callable[[int, int], int] = lambda d, e: 2
    """How many tokens it needs, for the widths of `x` and `y`."""
    seeded: "Callable[[int], Steps] | None" = None
    """The steps for a seed, of a measure that draws at random; `compare` then takes a `seed`, too."""

    def with_seed(self, seed: int) -> "Declaration":
        """The measure with its draws from another seed; most draw nothing, and stay as they are."""
        if self.seeded is None:
            return self
        return self._replace(compare=partial(self.compare, seed=seed), in_steps=self.seeded(seed))

    @property
    def steps(self) -> "Steps":
        """`in_steps`, or `compare` as the only step."""
        return self.in_steps or Steps(lambda x: x, lambda y, order: y[order], self.compare)


class Steps(NamedTuple):
    """A measure as `compare(prepare(x), permute(prepare(y), order))`, the same as of `x` and `y[order]`."""

    prepare: Callable[[Tensor], Any]
    permute: Callable[[Any, Tensor], Any]
    compare: Callable[[Any, Any], float]


UP_TO_ROTATION: dict[Transform, Side] = {
    "orthogonal": "both",
    "isotropic scaling": "both",
    "invertible linear": "neither",
    "shift": "both",
    "token permutation": "both",
}
"""What most measures here leave out of account."""

MEASURES: dict[str, Declaration] = {}
"""Every measure by its name."""

Measure = TypeVar("Measure", bound=Callable[..., float])


def declare(
    range: tuple[float, float],
    *,
    symmetric: bool,
    invariant: Mapping[Transform, Side],
    of_moments: Callable[[PairMoments], float] | None = None,
    in_steps: Steps | None = None,
    needs: Callable[[int, int], int] = lambda d, e: 2,
    seeded: Callable[[int], Steps] | None = None,
) -> Callable[[Measure], Measure]:
    """Enter a measure in `MEASURES`, under the name of its function.

    Example:
        >>> @declare((0.0, 1.0), symmetric=True, invariant={})
        ... def same_width(x, y):
        ...     return float(x.shape[1] == y.shape[1])
        >>> MEASURES.pop("same_width").symmetric
        True
    """

    def enter(compare: Measure) -> Measure:
        MEASURES[compare.__name__] = Declaration(
            compare, range, symmetric, invariant, of_moments, in_steps, needs, seeded
        )
        return compare

    return enter


def check_pair(x: Float[Tensor, "t d"], y: Float[Tensor, "u e"], *, tokens: int = 2, why: str = "") -> None:
    """Raise a ValueError unless both hold the same tokens, enough of them, are finite, and neither is constant."""
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} tokens and y has {len(y)}: give activations of the same tokens")
    if len(x) < tokens:
        raise ValueError(f"there are {len(x)} tokens, and {tokens} are needed{why}: give more tokens")
    for name, side in (("x", x.double()), ("y", y.double())):
        if not bool(side.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinite values: leave those tokens out")
        variance = float((side - side.mean(dim=0)).square().mean())
        if variance <= 1e-12 * float(side.square().mean()):
            raise ValueError(
                f"{name} is the same for every token (variance {variance:.3g}), so there is nothing to compare: "
                "choose another hook point"
            )
