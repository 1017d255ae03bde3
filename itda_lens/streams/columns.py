"""Which column of a dataset holds what a model reads: text, token ids or messages."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from jaxtyping import Int64
from torch import Tensor

TOKEN_COLUMNS = ("tokens", "input_ids")
TEXT_COLUMNS = ("text", "problem")
CHAT_COLUMNS = ("messages", "conversations", "conversation")
MASK_COLUMN = "attention_mask"

ContentKind = Literal["tokens", "text", "messages"]

_AHEAD = 100
"""So many rows are looked at, where the first ones hold nothing."""


class Column(NamedTuple):
    """Where the content is."""

    name: str
    kind: ContentKind


def find_column(rows: Iterable[Any], column: str | None = None) -> Column:
    """The column to read: the one that is named, else the first of the usual ones that holds something readable.

    Args:
        rows: a dataset.
        column: its name, where it is not to be guessed.

    Raises:
        ValueError: there are no rows, no such column, or it holds nothing that a model reads; the message says what.

    Example:
        >>> find_column([{"tokens": 7, "text": "seven words"}])
        Column(name='text', kind='text')
    """
    wanted = (*TOKEN_COLUMNS, *TEXT_COLUMNS, *CHAT_COLUMNS) if column is None else (column,)
    present: dict[str, None] = {}
    seen: dict[str, Any] = {}
    n = 0
    for n, row in enumerate(rows, 1):
        present |= dict.fromkeys(row)
        seen |= {name: row[name] for name in wanted if name in row and name not in seen and not is_empty(row[name])}
        candidates = [name for name in wanted if name in present]
        if (seen and len(seen) == len(candidates)) or (n >= _AHEAD and (seen or not candidates)):
            break
    if n == 0:
        raise ValueError("the dataset is empty")
    kinds: dict[str, ContentKind | None] = {name: kind_of(seen[name]) for name in wanted if name in seen}
    for name, kind in kinds.items():
        if kind is not None:
            return Column(name, kind)
    if seen:
        held = "; ".join(f"{name!r} holds {describe(seen[name])}" for name in kinds)
        raise ValueError(
            f"no column with text, token ids or messages (each with role and content): {held}. Name another"
        )
    if names := [name for name in wanted if name in present]:
        raise ValueError(f"the column {names[0]!r} holds nothing in any of the {n} rows: name another")
    raise ValueError(f"the dataset has no column {' or '.join(map(repr, wanted))}, only {sorted(present)}: name it")


def kind_of(value: Any) -> ContentKind | None:
    """What a value is to a model; None where it is nothing."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, Sequence) and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in value):
        return "messages"
    return None if token_ids(value) is None else "tokens"


def token_ids(value: Any) -> Int64[Tensor, " s"] | None:
    """A list or array of whole numbers as a tensor; None where it is none."""
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    if ids.ndim != 1 or (len(ids) and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)):
        return None
    return ids.to(torch.int64)


def is_missing(value: Any) -> bool:
    """Whether a value is None, or what pandas writes for it."""
    return value is None or bool(pd.api.types.is_scalar(value) and pd.isna(value))


def is_empty(value: Any) -> bool:
    """Whether a value is missing, or a list without anything in it."""
    is_list = not isinstance(value, str) and hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0
    return is_missing(value) or (is_list and len(value) == 0)


def describe(value: Any) -> str:
    """A value for an error message: its type, what it holds, its beginning."""
    inside = f" of {type(value[0]).__name__}" if isinstance(value, Sequence) and not isinstance(value, str) else ""
    return f"{type(value).__name__}{inside} ({str(value)[:40]!r})"
