"""How large the dictionary becomes: a threshold that stays, or one that rises to meet a number of atoms."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor


class Sizing(ABC):
    """Decides the threshold at each moment, which atoms are dropped, and when the dictionary is finished."""

    threshold: float
    n_atoms: int | None
    tokens: int | None
    is_fixed: bool

    @staticmethod
    def choose(threshold: float | None, n_atoms: int | None, tokens: int | None) -> "Sizing":
        """The way of sizing that the given arguments mean; raises a ValueError when they say too little."""
        if threshold is not None:
            return FixedThreshold(threshold, n_atoms, tokens)
        if n_atoms is None or tokens is None:
            raise ValueError(
                f"got threshold=None, n_atoms={n_atoms}, tokens={tokens}: give a threshold, or n_atoms together with "
                "tokens, the budget in which they are chosen (about a hundred times n_atoms is a good start)"
            )
        if tokens < n_atoms:
            raise ValueError(f"tokens={tokens} is a budget too small for n_atoms={n_atoms}: each atom is one token")
        return RisingThreshold(n_atoms, tokens)

    @abstractmethod
    def is_full(self, n: int) -> bool:
        """Whether no further atom may be added at all."""

    @abstractmethod
    def tokens_to_next_step(self, judged: int) -> int:
        """How many tokens may be judged before `step` must be called."""

    @abstractmethod
    def step(self, judged: int, admission: Float64[Tensor, " n"]) -> Int64[Tensor, " m"] | None:
        """Move the threshold; which atoms stay, or None for all of them."""

    @abstractmethod
    def best(self, admission: Float64[Tensor, " n"]) -> Int64[Tensor, " m"]:
        """The atoms of the dictionary if it ended now."""

    def is_done(self, judged: int, n: int) -> bool:
        """Whether the size or the budget is reached."""
        return self.is_full(n) or (self.tokens is not None and judged >= self.tokens)

    def settings(self) -> dict[str, Any]:
        return {"n_atoms": self.n_atoms, "tokens": self.tokens}

    def record(self) -> dict[str, Any]:
        return self.settings() | {"threshold": self.threshold}

    def state_dict(self) -> dict[str, Any]:
        return {"threshold": self.threshold}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.threshold = state["threshold"]


class FixedThreshold(Sizing):
    """One threshold; stops at `n_atoms` or after `tokens`, where given."""

    is_fixed = True

    def __init__(self, threshold: float, n_atoms: int | None, tokens: int | None):
        self.threshold, self.n_atoms, self.tokens = threshold, n_atoms, tokens

    def is_full(self, n: int) -> bool:
        return self.n_atoms is not None and n >= self.n_atoms

    def tokens_to_next_step(self, judged: int) -> int:
        return 2**62 if self.tokens is None else self.tokens - judged

    def step(self, judged: int, admission: Float64[Tensor, " n"]) -> None:
        return None

    def best(self, admission: Float64[Tensor, " n"]) -> Int64[Tensor, " m"]:
        return torch.arange(len(admission))

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"threshold": self.threshold}


class RisingThreshold(Sizing):
    """Starts by taking everything; at fixed token counts the threshold rises above the loss of the surplus.

    An atom stays while its loss at admission is among the `n_atoms` largest, so late tokens compete with early
    ones on the same terms, the dictionary is full from early on and spans the whole budget.
    """

    is_fixed = False
    _SLACK = 16

    def __init__(self, n_atoms: int, tokens: int):
        self.threshold, self.n_atoms, self.tokens = 0.0, n_atoms, tokens
        self._wanted, self._budget = n_atoms, tokens
        self.interval = max(1, min(tokens // 50, n_atoms // 4))
        self.history: list[tuple[int, float, int]] = []

    def is_full(self, n: int) -> bool:
        return False

    def tokens_to_next_step(self, judged: int) -> int:
        return min(self.interval - judged % self.interval, self._budget - judged)

    def step(self, judged: int, admission: Float64[Tensor, " n"]) -> Int64[Tensor, " m"] | None:
        if judged % self.interval and judged < self._budget:
            return None
        surplus = len(admission) - self._wanted
        if surplus <= (0 if judged >= self._budget else self._wanted // self._SLACK):
            return None
        keep = self.best(admission)
        dropped = torch.ones(len(admission), dtype=torch.bool)
        dropped[keep] = False
        self.threshold = max(self.threshold, float(admission[dropped].max()))
        self.history.append((judged, self.threshold, len(admission)))
        return keep

    def best(self, admission: Float64[Tensor, " n"]) -> Int64[Tensor, " m"]:
        return admission.argsort(descending=True, stable=True)[: self.n_atoms].sort().values

    def record(self) -> dict[str, Any]:
        return super().record() | {"threshold_history": [list(entry) for entry in self.history]}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"history": [list(entry) for entry in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.history = [(int(t), float(h), int(n)) for t, h, n in state["history"]]
