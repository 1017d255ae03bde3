"""What a similarity is worth: how far it lies above that of tokens put out of step."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from itda_lens.similarity.declaration import MEASURES
from itda_lens.similarity.jaccard import Dictionary, identity_sets, jaccard_index, provenance_of
from itda_lens.similarity.layers import layer_similarity
from itda_lens.similarity.null import Products, Sides, check_permutations, orders


class Calibration(NamedTuple):
    """Similarities of layers `[la, lb]` beside what chance gives."""

    similarity: Float64[Tensor, "la lb"]
    chance: Float64[Tensor, "la lb"]
    """The mean under the null."""
    effect: Float64[Tensor, "la lb"]
    """`(similarity - chance) / (largest - chance)`: 0 is chance, 1 the largest value that the measure can take."""
    p: Float64[Tensor, "la lb"]
    """How often chance gives as much: `(1 + exceedances) / (1 + permutations)`, of each cell by itself."""
    p_adjusted: Float64[Tensor, "la lb"]
    """The same for all cells together: the chance that the largest of them comes out as high."""


def calibrate(
    layers_a: Sequence[Float[Tensor, "t _"]],
    layers_b: Sequence[Float[Tensor, "t _"]],
    measure: str | Callable[[Tensor, Tensor], float] = "linear_cka",
    *,
    largest: float = 1.0,
    permutations: int = 200,
    seed: int = 0,
) -> Calibration:
    """Similarities of layers against a permutation null (after arXiv 2602.14486).

    The tokens of the second model are permuted, alike in all its layers. What similarity is left is what width,
    spectrum and a small number of tokens give by themselves. Several cells are tested at once: `p_adjusted` compares
    each cell, in units of its own null's deviation, with the largest of all cells under each permutation (Westfall and
    Young 1993, max-T), which bounds the chance of any false finding, however the cells depend on one another.

    Args:
        layers_a: activations of some tokens, some thousand of them, not neighbours in the text.
        layers_b: activations of the same tokens in another model.
        measure: a name in `MEASURES`, or a function of two layers.
        largest: the largest value that a function can take; known for names.
        permutations: how many; no p-value can be below `1 / (1 + permutations)`.
        seed: of the permutations.

    Raises:
        ValueError: no permutations, an unknown name, or what the measure raises.

    Example:
        >>> x = torch.randn(200, 8)
        >>> found = calibrate([x], [x + torch.randn(200, 8)], permutations=99)
        >>> found.p_adjusted.item()
        0.01
    """
    name = measure if isinstance(measure, str) else "measure"
    if name in MEASURES:
        return calibrate_all(layers_a, layers_b, [name], permutations=permutations, seed=seed)[name]
    permuted = orders(len(layers_b[0]), permutations, seed)
    observed = layer_similarity(layers_a, layers_b, measure)
    null = [layer_similarity(layers_a, [b[order] for b in layers_b], measure) for order in permuted]
    return against(observed, torch.stack(null), largest)


def calibrate_all(
    layers_a: Sequence[Float[Tensor, "t _"]],
    layers_b: Sequence[Float[Tensor, "t _"]],
    names: Sequence[str],
    *,
    permutations: int = 200,
    seed: int = 0,
) -> dict[str, Calibration]:
    """`calibrate` for several measures, with the same permutations and what they share computed once."""
    permuted = orders(len(layers_b[0]), permutations, seed)
    observed = {name: layer_similarity(layers_a, layers_b, name) for name in names}
    null: dict[str, list[Tensor]] = {name: [] for name in names}
    declared = {name: MEASURES[name] for name in names}
    linear = {name: m.of_moments for name, m in declared.items() if m.of_moments is not None}
    products = Products(layers_a, layers_b) if linear else None
    others = {name: Sides(m, layers_a, layers_b) for name, m in declared.items() if m.of_moments is None}
    for order in permuted:
        if products is not None:
            pairs = products.of(order)
            for name, of_moments in linear.items():
                null[name].append(
                    torch.tensor([[of_moments(pair) for pair in row] for row in pairs], dtype=torch.float64)
                )
        for name, sides in others.items():
            null[name].append(sides.of(order))
    return {name: against(observed[name], torch.stack(null[name]), m.range[1]) for name, m in declared.items()}


def calibrate_jaccard(
    layers_a: Sequence[Dictionary],
    layers_b: Sequence[Dictionary],
    tokens: int,
    *,
    draws: int = 200,
    seed: int = 0,
) -> Calibration:
    """Jaccard indices of dictionaries against chance: atoms that are tokens of the same stream drawn at random.

    Then the number of shared atoms is hypergeometric, so that `effect` is an index corrected for both sizes. Cells are
    drawn independently.

    Args:
        layers_a: the dictionaries of one model.
        layers_b: those of another.
        tokens: how many tokens of the stream were judged.
        draws: of chance; no p-value can be below `1 / (1 + draws)`.
        seed: of the draws.

    Raises:
        ValueError: no draws, fewer tokens than atoms, or what `jaccard` raises of provenances.

    Example:
        >>> from itda_lens import Provenance
        >>> atoms = Provenance(torch.arange(50), torch.zeros(50, dtype=torch.int64))
        >>> calibrate_jaccard([atoms], [atoms], tokens=5000).effect.item()
        1.0
    """
    check_permutations(draws)
    sets = identity_sets([provenance_of(d) for d in (*layers_a, *layers_b)])
    sides = sets[: len(layers_a)], sets[len(layers_a) :]
    if tokens < max(map(len, sets)):
        raise ValueError(f"tokens={tokens}, but there are {max(map(len, sets))} atoms, and each is a token")
    observed = layer_similarity(*sides, jaccard_index)
    n, m = (np.array([len(atoms) for atoms in side]) for side in sides)
    n, m = np.broadcast_arrays(n[:, None], m[None])
    shared = np.random.default_rng(seed).hypergeometric(n, tokens - n, m, size=(draws, *n.shape))
    return against(observed, torch.from_numpy(shared / (n + m - shared)), 1.0)


def against(observed: Float64[Tensor, "la lb"], null: Float64[Tensor, "n la lb"], largest: float) -> Calibration:
    """The calibration that draws of a null give."""
    permutations = len(null)
    chance, deviation = null.mean(dim=0), null.std(dim=0, correction=0).clamp_min(1e-12)
    height = (observed - chance) / deviation
    highest = ((null - chance) / deviation).flatten(1).amax(dim=1)
    room = (largest - chance).clamp_min(1e-12)
    return Calibration(
        similarity=observed,
        chance=chance,
        effect=(observed - chance) / room,
        p=((null >= observed).sum(dim=0) + 1).double() / (permutations + 1),
        p_adjusted=((highest[:, None, None] >= height).sum(dim=0) + 1).double() / (permutations + 1),
    )
