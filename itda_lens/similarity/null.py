"""What is left of similarities when the tokens of one side are permuted."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from itda_lens.similarity.declaration import Declaration
from itda_lens.similarity.layers import layer_similarity
from itda_lens.similarity.moments import Moments, PairMoments, augmented


def orders(tokens: int, permutations: int, seed: int, block: int = 1) -> list[Int64[Tensor, " t"]]:
    """Random orders of the tokens, or of blocks of neighbouring ones, which are left as they are.

    Raises:
        ValueError: no permutations, or fewer than two blocks.

    Example:
        >>> order = orders(6, 1, seed=0, block=2)[0]
        >>> order.view(3, 2).diff().flatten().tolist()
        [1, 1, 1]
    """
    check_permutations(permutations)
    blocks = torch.arange(tokens).split(block)
    if len(blocks) < 2:
        raise ValueError(f"{tokens} tokens are {len(blocks)} block of {block}, which has one order: give more tokens")
    generator = torch.Generator().manual_seed(seed)
    mixed = [torch.randperm(len(blocks), generator=generator) for _ in range(permutations)]
    if block == 1:
        return mixed
    return [torch.cat([blocks[i] for i in order.tolist()]) for order in mixed]


def check_permutations(permutations: int) -> None:
    """ValueError where there are none."""
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}; 200 give p-values down to 0.005")


class Products:
    """Moments of all pairs of layers when the second model's tokens are permuted, from one product of matrices."""

    def __init__(self, layers_a: Sequence[Tensor], layers_b: Sequence[Tensor]):
        self._a, self._b = (
            [augmented(x.double() - x.double().mean(dim=0)) for x in side] for side in (layers_a, layers_b)
        )
        self._own_a, self._own_b = ([Moments(x.T @ x) for x in side] for side in (self._a, self._b))
        self._all_a, self._all_b = torch.cat(self._a, dim=1).T.contiguous(), torch.cat(self._b, dim=1)

    def of(self, order: Int64[Tensor, " t"]) -> list[list[PairMoments]]:
        product = self._all_a @ self._all_b[order]
        rows = product.split([x.shape[1] for x in self._a], dim=0)
        cells = [row.split([x.shape[1] for x in self._b], dim=1) for row in rows]
        return [
            [PairMoments(a, b, cell) for b, cell in zip(self._own_b, row, strict=True)]
            for a, row in zip(self._own_a, cells, strict=True)
        ]


class Sides:
    """A measure that needs the tokens themselves; what it needs of a layer by itself is computed once."""

    def __init__(self, measure: Declaration, layers_a: Sequence[Tensor], layers_b: Sequence[Tensor]):
        self._a: Sequence[Any] = layers_a
        self._b: Sequence[Any] = layers_b
        self._compare, self._permute = measure.compare, lambda x, order: x[order]
        if measure.in_steps is not None:
            prepare, self._permute, self._compare = measure.in_steps
            self._a, self._b = [prepare(x) for x in layers_a], [prepare(x) for x in layers_b]

    def of(self, order: Int64[Tensor, " t"]) -> Float64[Tensor, "la lb"]:
        return layer_similarity(self._a, [self._permute(b, order) for b in self._b], self._compare)
