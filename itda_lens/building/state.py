"""What a build carries from token to token."""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.building.growing import GrowingDictionary
from itda_lens.building.losses import Loss
from itda_lens.building.sizing import Sizing
from itda_lens.pursuit import SparseCodes

_ROOM = 1 - 1e-4
"""The residual norm at which a token leaves the loop is known to within rounding only."""


@dataclass
class Tally:
    """Running counts over the tokens judged so far."""

    tokens: int = 0
    added: int = 0
    dropped: int = 0
    loss: float = 0.0
    """Sum of the losses."""
    low: float = float("inf")
    high: float = 0.0

    def count(self, losses: Float[Tensor, " b"]) -> None:
        """Count tokens with these losses as judged."""
        if len(losses):
            self.tokens += len(losses)
            self.loss += float(losses.double().sum())
            self.low, self.high = min(self.low, float(losses.min())), max(self.high, float(losses.max()))


@dataclass
class BuildState:
    """The dictionary so far, and by what rule it grows."""

    k: int
    loss: Loss
    dictionary: GrowingDictionary
    sizing: Sizing
    bias: Float[Tensor, " d"]
    floor: float
    """Losses at or below this are rounding."""
    tally: Tally = field(default_factory=Tally)

    @property
    def done(self) -> bool:
        """Whether the size or the budget is reached."""
        return self.sizing.is_done(self.tally.tokens, self.dictionary.n)

    def encode(
        self, x: Float[Tensor, "b d"], products: Float[Tensor, "b n"]
    ) -> tuple[SparseCodes, Float[Tensor, " b"]]:
        """The codes of raw activations under the atoms so far, and their losses; `products` are of `x - bias`.

        Where further steps can't raise the loss, a token leaves the loop as soon as it is at or below the threshold.
        """
        leaves = math.sqrt(self.sizing.threshold) * _ROOM if self.loss.falls_with_steps else 0.0
        codes = self.dictionary.pursue(products, (x - self.bias).square().sum(dim=-1), self.k, leaves)
        return codes, self.losses(x, codes)

    def losses(self, x: Float[Tensor, "b d"], codes: SparseCodes) -> Float[Tensor, " b"]:
        """The loss of each raw activation under its code; 0 for all-zero activations, which never become atoms."""
        decoded = codes.decode(self.dictionary.atoms) if self.dictionary.n else torch.zeros_like(x)
        losses = self.loss.measure(x, self.bias + decoded, self.bias)
        return losses.masked_fill((losses <= self.floor) | (x == 0).all(dim=-1), 0)
