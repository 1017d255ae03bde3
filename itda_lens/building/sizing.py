"""How large the dictionary becomes: a threshold that stays, or one that moves to meet a number of atoms."""

import math
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
        return MovingThreshold(n_atoms, tokens)

    def room(self, n: int) -> int:
        """How many further atoms may be added."""
        return 2**62

    def is_full(self, n: int) -> bool:
        """Whether no further atom may be added at all."""
        return self.room(n) <= 0

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

    def room(self, n: int) -> int:
        return super().room(n) if self.n_atoms is None else self.n_atoms - n

    def tokens_to_next_step(self, judged: int) -> int:
        return 2**62 if self.tokens is None else self.tokens - judged

    def step(self, judged: int, admission: Float64[Tensor, " n"]) -> None:
        return None

    def best(self, admission: Float64[Tensor, " n"]) -> Int64[Tensor, " m"]:
        return torch.arange(len(admission))

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"threshold": self.threshold}


class MovingThreshold(Sizing):
    """Meets a number of atoms at the end of a budget; at fixed token counts the threshold moves.

    Under one threshold a dictionary grows about as a power of the tokens judged. Atoms beyond that curve are
    dropped, those with the smallest loss at admission first, and the threshold rises to the largest loss dropped;
    below the curve it falls a little. So it soon stays near the one threshold that would have given `n_atoms`.
    """

    is_fixed = False
    _GROWTH = 0.3
    """Dictionaries grow with this power of the tokens judged: 0.2 to 0.35 on small GPT-2 models."""
    _FALL = 0.95
    """What is left of the threshold after a hundredth of the budget below the curve."""
    _SLACK = 32

    def __init__(self, n_atoms: int, tokens: int):
        self.threshold, self.n_atoms, self.tokens = 0.0, n_atoms, tokens
        self._wanted, self._budget = n_atoms, tokens
        self._interval = max(1, min(tokens // 100, n_atoms // 4))
        self.history: list[tuple[int, float, int]] = []

    def tokens_to_next_step(self, judged: int) -> int:
        return min(self._interval - judged % self._interval, self._budget - judged)

    def step(self, judged: int, admission: Float64[Tensor, " n"]) -> Int64[Tensor, " m"] | None:
        left, n = self._budget - judged, len(admission)
        if judged % self._interval and left > 0:
            return None
        given = int(admission.isinf().sum())  # atoms that were there before this build always stay
        room = given + math.ceil((self._wanted - given) * (judged / self._budget) ** self._GROWTH)
        keep = None
        if n > room:
            order = admission.argsort(descending=True, stable=True)
            self.threshold = max(self.threshold, float(admission[order[room]]))
            if left <= 0 or n - room > room // self._SLACK:
                keep = order[:room].sort().values
        elif n < room:
            self.threshold *= self._FALL ** (100 * self._interval / self._budget)
        missing = self._wanted - min(n, room)
        if missing > 0 and left <= max(self._interval, 2 * missing):
            self.threshold = 0.0  # take everything to the end, and keep the best of it
        if left <= 0 or judged // self._interval % max(1, self._budget // self._interval // 100) == 0:
            self.history.append((judged, self.threshold, n if keep is None else len(keep)))
        return keep

    def best(self, admission: Float64[Tensor, " n"]) -> Int64[Tensor, " m"]:
        return admission.argsort(descending=True, stable=True)[: self._wanted].sort().values

    def record(self) -> dict[str, Any]:
        return super().record() | {"threshold_history": [list(entry) for entry in self.history]}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"history": [list(entry) for entry in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.history = [(int(t), float(h), int(n)) for t, h, n in state["history"]]
