"""What a build carries from token to token."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from itda_lens.building.growing import GrowingDictionary
from itda_lens.building.losses import Loss
from itda_lens.building.sizing import Sizing
from itda_lens.pursuit import SparseCodes, lengths, near_one
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


class Units(NamedTuple):
    """Activations, each with the bias in a unit of its own that brings it near 1 (see `near_one`); losses stay."""

    x: Float[Tensor, "b d"]
    bias: Float[Tensor, "*b d"]
    unit: Float64[Tensor, "*b"]

    @staticmethod
    def of(x: Float[Tensor, "b d"], bias: Float[Tensor, " d"]) -> "Units":
        _, units = near_one(x - bias)
        if units is None:
            return Units(x, bias, torch.ones((), dtype=torch.float64, device=x.device))
        return Units(x / units[:, None], bias / units[:, None], units.double())

    @property
    def centered(self) -> Float[Tensor, "b d"]:
        return self.x - self.bias

    def part(self, which: slice | Tensor) -> "Units":
        return Units(self.x[which], *((self.bias[which], self.unit[which]) if self.unit.ndim else self[1:]))


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
        norms = lengths(x - self.bias)
        return is_massive(norms, self.scale) if self.scale > 0 else torch.zeros_like(norms, dtype=torch.bool)

    def encode(
        self, x: Units, products: Float[Tensor, "b n"], massive: Bool[Tensor, " b"]
    ) -> tuple[SparseCodes, Float[Tensor, " b"]]:
        """The codes of activations under the atoms so far, in the same units, and their losses.

        `products` are of what is centered.

        Where further steps can't raise the loss, a token leaves the loop as soon as it is at or below the threshold.
        """
        leaves = math.sqrt(self.sizing.threshold) * ROOM if self.loss.falls_with_steps else 0.0
        energy = x.centered.square().sum(dim=-1)
        codes = self.dictionary.pursue(products, energy, self.k, leaves)
        if massive.any():
            whole = self.dictionary.pursue(products[massive], energy[massive], self.k, 0.0)
            codes.values[massive], codes.indices[massive] = whole
        return codes, self.losses(x, codes, massive)

    def losses(self, x: Units, codes: SparseCodes, massive: Bool[Tensor, " b"] | None = None) -> Float[Tensor, " b"]:
        """The loss of each activation under its code; 0 for all-zero activations, which never become atoms.

        Of massive ones 0 or infinite: whether they pass or become atoms, whatever the threshold.
        """
        decoded = codes.decode(self.dictionary.atoms) if self.dictionary.n else torch.zeros_like(x.x)
        losses = self.loss.measure(x.x, x.bias + decoded, x.bias)
        if massive is not None and massive.any():
            left = (x.centered[massive] - decoded[massive]).norm(dim=-1) * x.part(massive).unit
            losses[massive] = torch.where(left > self.scale, torch.inf, 0.0)
        return losses.masked_fill((losses <= self.floor) | (x.x == 0).all(dim=-1), 0)
