"""What is left of similarities when the tokens of one side are permuted."""

from collections.abc import Sequence

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from itda_lens.similarity.declaration import Steps
from itda_lens.similarity.layers import layer_similarity


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


class Sides:
    """A measure of all pairs of layers; what it needs of a layer by itself is computed once."""

    def __init__(self, steps: Steps, layers_a: Sequence[Tensor], layers_b: Sequence[Tensor]):
        prepare, self._permute, self._compare = steps
        self._a, self._b = [prepare(x) for x in layers_a], [prepare(x) for x in layers_b]

    def of(self, order: Int64[Tensor, " t"]) -> Float64[Tensor, "la lb"]:
        """With the second model's tokens permuted."""
        return layer_similarity(self._a, [self._permute(b, order) for b in self._b], self._compare)
