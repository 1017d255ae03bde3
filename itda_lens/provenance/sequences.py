"""Token sequences by row, in one tensor."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor


class Sequences(Mapping[int, Int64[Tensor, " _"]]):
    """The tokens of each row, views of one tensor: a mapping of many small tensors takes many times their size.

    Args:
        rows: rising.
        lengths: how many tokens each row has, at least one.
        tokens: of all rows, one after the other.

    Raises:
        ValueError: rows that do not rise, lengths below 1 or that are not those of the tokens.

    Example:
        >>> sequences = Sequences(torch.tensor([3, 8]), torch.tensor([2, 1]), torch.tensor([5, 6, 7]))
        >>> {row: tokens.tolist() for row, tokens in sequences.items()}
        {3: [5, 6], 8: [7]}
    """

    def __init__(self, rows: Int64[Tensor, " r"], lengths: Int64[Tensor, " r"], tokens: Int64[Tensor, " _"]):
        if len(rows) != len(lengths) or bool((rows[1:] <= rows[:-1]).any()):
            raise ValueError("the rows of its sequences are not in order, or not as many as their lengths")
        # Each is checked before they are summed, which could overflow.
        fits = not len(lengths) or 1 <= int(lengths.min()) <= int(lengths.max()) <= len(tokens)
        if not fits or int(lengths.sum()) != len(tokens):
            raise ValueError(f"its sequences have other lengths than the {len(tokens)} tokens need")
        self._rows, self._tokens = rows.numpy(), tokens
        self._ends = torch.cumsum(lengths, dim=0).numpy()

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        return (int(row) for row in self._rows)

    def __getitem__(self, row: int) -> Int64[Tensor, " _"]:
        i = int(np.searchsorted(self._rows, row))
        if i == len(self) or self._rows[i] != row:
            raise KeyError(row)
        return self._tokens[int(self._ends[i - 1]) if i else 0 : int(self._ends[i])]

    def lengths(self) -> dict[int, int]:
        """How many tokens each row has, quicker than one after the other."""
        return dict(zip(self._rows.tolist(), np.diff(self._ends, prepend=0).tolist(), strict=True))

    def __contains__(self, row: object) -> bool:
        return isinstance(row, int) and bool(
            (i := np.searchsorted(self._rows, row)) < len(self) and self._rows[i] == row
        )


def lengths(sequences: Mapping[int, Int64[Tensor, " _"]]) -> dict[int, int]:
    """How many tokens each row has."""
    if isinstance(sequences, Sequences):
        return sequences.lengths()
    return {row: len(tokens) for row, tokens in sequences.items()}


def ends(row: Int64[Tensor, " n"], position: Int64[Tensor, " n"]) -> dict[int, int]:
    """How many tokens of each row there are up to its last atom."""
    found: dict[int, int] = {}
    for r, p in zip(row.tolist(), position.tolist(), strict=True):
        found[r] = max(found.get(r, 0), p + 1)
    return found
