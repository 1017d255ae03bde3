"""Every layer of one model against every layer of another, and how often the right one is found."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from itda_lens.similarity.declaration import MEASURES

Matrices = Mapping[tuple[Any, Any], Tensor] | Sequence[Tensor]


def layer_similarity(
    layers_a: Sequence[Any], layers_b: Sequence[Any], measure: Callable[[Any, Any], float] | str
) -> Float64[Tensor, "la lb"]:
    """The similarity of every layer of one model with every layer of another.

    Args:
        layers_a: activations of the same tokens, `[t, d]` each; or dictionaries.
        layers_b: the same of another model.
        measure: of two layers: a function such as `linear_cka` or `jaccard`, or the name of one in `MEASURES`.

    Raises:
        ValueError: no layers, an unknown name, or what the measure raises, with the layers' numbers.

    Example:
        >>> from itda_lens.similarity import linear_cka
        >>> layers = [torch.randn(50, 4), torch.randn(50, 4)]
        >>> layer_similarity(layers, layers, linear_cka).diagonal().round(decimals=4).tolist()
        [1.0, 1.0]
    """
    if not layers_a or not layers_b:
        raise ValueError(f"there are {len(layers_a)} and {len(layers_b)} layers to compare: give at least one of each")
    if isinstance(measure, str):
        if measure not in MEASURES:
            raise ValueError(f"there is no measure {measure!r}, only {sorted(MEASURES)}")
        measure = MEASURES[measure].compare
    found = torch.empty(len(layers_a), len(layers_b), dtype=torch.float64)
    for i, a in enumerate(layers_a):
        for j, b in enumerate(layers_b):
            try:
                found[i, j] = measure(a, b)
            except ValueError as e:
                raise ValueError(f"layers {i} and {j}: {e}") from e
    return found


def layer_matching_accuracy(matrices: Matrices) -> float:
    """How often a layer's most similar layer in another model is the one of the same index: 0 to 1.

    Kornblith et al. 2019 (arXiv 1905.00414, section 6.1), the mean over all matrices and rows. Where several layers are
    most similar alike, the right one counts as its share of them, so that a constant measure scores `1 / layers`.

    Args:
        matrices: `[layers, layers]` for each ordered pair of models: a layer of the first in each row.

    Raises:
        ValueError: no matrix, one that is not square or holds NaN, or a single layer, which can only match itself.

    Example:
        >>> layer_matching_accuracy([torch.tensor([[0.9, 0.5], [0.8, 0.7]])])
        0.5
    """
    found = [matches(matrix) for matrix in _listed(matrices)]
    if not found:
        raise ValueError("there are no matrices: compare at least two models")
    return float(torch.cat(found).mean())


def less_layer_mean(matrices: Mapping[tuple[str, str], Float[Tensor, "l l"]]) -> dict[tuple[str, str], Tensor]:
    """The similarities after each model's mean over layers is taken off, as `MembershipProfiles.similarity` does.

    For a measure that is an inner product of unit vectors (CKA of Gram matrices, the cosine of sets) this is exactly
    the cosine of what is left of them; for others it is the same formula. A model with itself must be among the pairs.

    Raises:
        ValueError: a layer is like the mean of its model, so that nothing is left.
    """
    centred = {pair: m - m.mean(0) - m.mean(1, keepdim=True) + m.mean() for pair, m in matrices.items()}
    own = {a: centred[a, a].diagonal() for a, _ in matrices}
    if not all(bool((left > 0).all()) for left in own.values()):
        raise ValueError("a layer is like the mean of its model: nothing is left when that is taken off")
    return {(a, b): m / (own[a][:, None] * own[b]).sqrt() for (a, b), m in centred.items()}


def matches(matrix: Float[Tensor, "la lb"]) -> Float64[Tensor, " la"]:
    """For each row 1 where the largest value is on the diagonal, 0 where it is not, a share where it is tied."""
    rows, columns = matrix.shape
    if rows != columns or rows < 2:
        raise ValueError(
            f"a matrix of {rows} by {columns} layers can't be matched: as many layers of each are needed, two or more"
        )
    if bool(matrix.isnan().any()):
        raise ValueError("a similarity matrix holds NaN: the measure could not compare some layers")
    best = matrix == matrix.amax(dim=1, keepdim=True)
    return (best.diagonal() / best.sum(dim=1)).double()


class Matching(NamedTuple):
    """A layer-matching accuracy and its bootstrap interval."""

    accuracy: float
    low: float
    high: float
    cells: int
    """How many layers were matched, over all ordered pairs."""


def matching_interval(
    matrices: Mapping[tuple[str, str], Float[Tensor, "l l"]],
    *,
    self_pairs: bool = False,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Matching:
    """Layer-matching accuracy with a bootstrap interval over pairs of models.

    A pair is drawn with both its directions, since these are not independent. With few models the interval is coarse:
    three models make three pairs.

    Args:
        matrices: by the names of both models.
        self_pairs: count a model with itself too, as the paper's table does: a measure that is largest for identity
            scores 1 there.
        level: of the interval.
        resamples: how often pairs are drawn.
        seed: of the draws.

    Raises:
        ValueError: as `layer_matching_accuracy`.

    Example:
        >>> ab = torch.tensor([[0.9, 0.5], [0.8, 0.7]])
        >>> matching_interval({("a", "b"): ab, ("b", "a"): ab.T}).accuracy
        0.75
    """
    chosen = {pair: matrix for pair, matrix in matrices.items() if self_pairs or pair[0] != pair[1]}
    accuracy = layer_matching_accuracy(chosen)
    pairs: dict[frozenset[str], list[Tensor]] = {}
    for pair, matrix in chosen.items():
        pairs.setdefault(frozenset(pair), []).append(matches(matrix))
    sums = torch.stack([torch.cat(found).sum() for found in pairs.values()])
    counts = torch.tensor([len(torch.cat(found)) for found in pairs.values()])
    drawn = torch.randint(len(pairs), (resamples, len(pairs)), generator=torch.Generator().manual_seed(seed))
    spread = sums[drawn].sum(dim=1) / counts[drawn].sum(dim=1)
    tail = (1 - level) / 2
    low, high = spread.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Matching(accuracy, low, high, int(counts.sum()))


def _listed(matrices: Matrices) -> list[Tensor]:
    return list(matrices.values()) if isinstance(matrices, Mapping) else list(matrices)
