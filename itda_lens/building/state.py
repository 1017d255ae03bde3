"""What a build carries from token to token."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from itda_lens.building.growing import GrowingDictionary
from itda_lens.building.losses import Loss
from itda_lens.building.sizing import Sizing
from itda_lens.pursuit import SparseCodes
from itda_lens.streams.massive import is_massive

ROOM = 1 - 1e-4
"""The residual norm at which a token leaves the loop is known to within rounding only."""


class Tokens(NamedTuple):
    """Some tokens of the stream, in order."""

    x: Float[Tensor, "b d"]
    """Raw activations."""
    row: Int64[Tensor, " b"]
    position: Int64[Tensor, " b"]
    massive: Bool[Tensor, " b"]
    """Judged by what is left of them in all, and counted nowhere (see `BuildState.scale`)."""

    def part(self, which: slice) -> "Tokens":
        return Tokens(*(field[which] for field in self))


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
    scale: float = 0.0
    """The median norm of ordinary tokens about the bias; 0 where it is not known, and then no token is massive.

    A share of a massive token's norm is more than all of another's. So what is left of it may be as large as an
    ordinary token; beyond that it becomes an atom, which stays.
    """
    tally: Tally = field(default_factory=Tally)

    @property
    def done(self) -> bool:
        """Whether the size or the budget is reached."""
        return self.sizing.is_done(self.tally.tokens, self.dictionary.n)

    def massive(self, x: Float[Tensor, "b d"]) -> Bool[Tensor, " b"]:
        """Which raw activations are massive."""
        norms = (x - self.bias).norm(dim=-1)
        return is_massive(norms, self.scale) if self.scale > 0 else torch.zeros_like(norms, dtype=torch.bool)

    def encode(
        self, x: Float[Tensor, "b d"], products: Float[Tensor, "b n"], massive: Bool[Tensor, " b"]
    ) -> tuple[SparseCodes, Float[Tensor, " b"]]:
        """The codes of raw activations under the atoms so far, and their losses; `products` are of `x - bias`.

        Where further steps can't raise the loss, a token leaves the loop as soon as it is at or below the threshold.
        """
        leaves = math.sqrt(self.sizing.threshold) * ROOM if self.loss.falls_with_steps else 0.0
        energy = (x - self.bias).square().sum(dim=-1)
        codes = self.dictionary.pursue(products, energy, self.k, leaves)
        if massive.any():
            whole = self.dictionary.pursue(products[massive], energy[massive], self.k, 0.0)
            codes.values[massive], codes.indices[massive] = whole
        return codes, self.losses(x, codes, massive)

    def losses(
        self, x: Float[Tensor, "b d"], codes: SparseCodes, massive: Bool[Tensor, " b"] | None = None
    ) -> Float[Tensor, " b"]:
        """The loss of each raw activation under its code; 0 for all-zero activations, which never become atoms.

        Of massive ones 0 or infinite: whether they pass or become atoms, whatever the threshold.
        """
        decoded = codes.decode(self.dictionary.atoms) if self.dictionary.n else torch.zeros_like(x)
        losses = self.loss.measure(x, self.bias + decoded, self.bias)
        if massive is not None and massive.any():
            left = (x[massive] - self.bias - decoded[massive]).norm(dim=-1)
            losses[massive] = torch.where(left > self.scale, torch.inf, 0.0)
        return losses.masked_fill((losses <= self.floor) | (x == 0).all(dim=-1), 0)
