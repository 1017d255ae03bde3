"""Massive activations: a few tokens whose norm is far beyond that of all others."""

from jaxtyping import Bool, Float
from torch import Tensor

MASSIVE = 10.0
"""A token is massive when its norm is above this many times the median norm of the ordinary (not special) tokens."""


def is_massive(norms: Float[Tensor, "*n"], median: float | Float[Tensor, ""]) -> Bool[Tensor, "*n"]:
    """Where a norm is above `MASSIVE` times the median.

    Such tokens are few (one in thousands), mostly near the beginning of a row, and the models use them as sinks of
    attention (Sun et al., 2024, "Massive Activations in Large Language Models").

    Args:
        norms: the norms of activations.
        median: the median norm of the ordinary tokens at the same hook point.

    Example:
        >>> import torch
        >>> is_massive(torch.tensor([139.0, 25_000.0]), 139.0)
        tensor([False,  True])
    """
    return norms > MASSIVE * median
