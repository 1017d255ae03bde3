"""How badly an activation is reconstructed: what decides whether it becomes an atom."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.settings import LossName as LossName


class Loss(NamedTuple):
    """A loss for each activation, and the range that it can take."""

    measure: Callable[[Tensor, Tensor, Tensor], Tensor]
    """From activations, reconstructions (both `[b, d]`, raw) and the bias to losses `[b]`."""
    upper: Callable[[int, bool], float]
    """The largest value that it can take, given the width and whether the mean is removed; the smallest is 0."""
    falls_with_steps: bool = False
    """Whether it is a squared relative residual norm, which no further step of pursuit raises."""


def relative(x: Float[Tensor, "b d"], x_hat: Float[Tensor, "b d"], bias: Float[Tensor, "*b d"]) -> Float[Tensor, " b"]:
    """`|x - x_hat|^2 / |x - b|^2`: the share of squared norm about the bias that is left. Never grows with steps."""
    scale = (x - bias).square().sum(-1)
    return ((x - x_hat).square().sum(-1) / scale).where(scale > 0, 0)


def cosine(x: Float[Tensor, "b d"], x_hat: Float[Tensor, "b d"], bias: Float[Tensor, "*b d"]) -> Float[Tensor, " b"]:
    """`1 - cos(x, x_hat)`, on raw activations."""
    return 1 - torch.nn.functional.cosine_similarity(x, x_hat, dim=-1)


def paper(x: Float[Tensor, "b d"], x_hat: Float[Tensor, "b d"], bias: Float[Tensor, "*b d"]) -> Float[Tensor, " b"]:
    """`mean over d of (x/|x| - x_hat/|x_hat|)^2 = 2 (1 - cos) / d`: what the paper's released code computes."""
    return (torch.nn.functional.normalize(x, dim=-1) - torch.nn.functional.normalize(x_hat, dim=-1)).square().mean(-1)


LOSSES: dict[str, Loss] = {
    "relative": Loss(relative, lambda d, centered: 1.0, falls_with_steps=True),
    "cosine": Loss(cosine, lambda d, centered: 2.0 if centered else 1.0),
    "paper": Loss(paper, lambda d, centered: 2.0 / d),
}


def rounding(loss: str, d_in: int, centered: bool) -> float:
    """A loss at or below this is rounding: such an activation is in the dictionary already."""
    return 1e-6 * LOSSES[loss].upper(d_in, centered)


def check_threshold(threshold: float, loss: str, d_in: int, centered: bool) -> None:
    """Raise a ValueError for a threshold that every token or no token can pass."""
    upper = LOSSES[loss].upper(d_in, centered)
    if not 0 <= threshold < upper:
        raise ValueError(
            f"threshold {threshold} can't be reached: the {loss!r} loss of width {d_in} lies between 0 and "
            f"{upper:.6g}, and a token becomes an atom above the threshold. Choose one in [0, {upper:.6g})"
        )
