"""Comparing dictionaries by the prompts that their atoms are."""

import warnings
from collections.abc import Hashable, Sequence
from typing import TypeAlias

import numpy as np

from itda_lens.provenance import IdentityKind, Provenance, same_tokenizer, shared_kind
from itda_lens.sae import ITDA

Dictionary: TypeAlias = ITDA | Provenance

_ROWS_COMPARED = 200


def jaccard(a: Dictionary, b: Dictionary, *, kind: IdentityKind | None = None) -> float:
    """The Jaccard index of two dictionaries as sets of prompts (arXiv 2505.17769): 0 to 1.

    Both must have been built on the same stream, so that what is an atom of one was offered to the other too. The
    index depends on the sizes of both: compare at equal size (`docs/layer_matching.md` says what is left then).

    Args:
        a: an ITDA with provenance, or a provenance alone.
        b: another one.
        kind: what makes two atoms the same (see `Provenance.identities`); if not given, their token ids under one
            tokenizer (so that special tokens count), else their text, else their positions.

    Raises:
        ValueError: a dictionary has no provenance, or lacks this kind; token ids are of different tokenizers, and
            texts are not there; or both were built on streams that have nothing in common. Streams that share a part
            give a warning that says how large it is.

    Example:
        >>> import torch
        >>> start = torch.zeros(3, dtype=torch.int64)
        >>> jaccard(Provenance(torch.tensor([1, 2, 3]), start), Provenance(torch.tensor([2, 3, 4]), start))
        0.5
    """
    provenances = [provenance_of(a), provenance_of(b)]
    sets = identity_sets(provenances, kind)
    check_streams(*provenances, any_shared=not sets[0].isdisjoint(sets[1]))
    return jaccard_index(*sets)


def identity_sets(provenances: Sequence[Provenance], kind: IdentityKind | None = None) -> list[frozenset[Hashable]]:
    """The identities of the atoms of each, of the kind that `shared_kind` names if none is given."""
    kind = kind or shared_kind(provenances)
    return [provenance.identity_set(kind) for provenance in provenances]


def jaccard_index(a: frozenset[Hashable], b: frozenset[Hashable]) -> float:
    """The Jaccard index of two sets, not both empty."""
    both = len(a & b)
    return both / (len(a) + len(b) - both)


def provenance_of(dictionary: Dictionary) -> Provenance:
    """The provenance of an ITDA; ValueError where it has none."""
    if isinstance(dictionary, Provenance):
        return dictionary
    if dictionary.provenance is None:
        raise ValueError("this ITDA has no provenance, so nothing says which prompts its atoms are: build it anew")
    return dictionary.provenance


def check_streams(a: Provenance, b: Provenance, any_shared: bool) -> None:
    """Compare the beginnings of rows that both have atoms of; warn where some differ, and raise where all do."""
    by_tokens = bool(a.sequences and b.sequences) and same_tokenizer(a, b)
    if not by_tokens and not (a.prompts and b.prompts):
        return
    rows = np.intersect1d(a.row.numpy(), b.row.numpy())
    rows = rows[:: max(1, len(rows) // _ROWS_COMPARED)]
    beginnings = zip(_beginnings(a, rows, by_tokens), _beginnings(b, rows, by_tokens), strict=True)
    alike = sum(s[: min(len(s), len(t))] == t[: min(len(s), len(t))] for s, t in beginnings)
    if len(rows) and alike == 0 and not any_shared:
        raise ValueError(
            f"the dictionaries were built on different streams: of {len(rows)} rows that both have atoms of, none "
            "begins alike, and no atom is in both. Build both on the same text, with the same context_size"
        )
    if alike < len(rows):
        warnings.warn(
            f"these dictionaries (itda) were built on different streams: of {len(rows)} rows that both have atoms of, "
            f"{alike / len(rows):.0%} begin alike. Only text that both saw can be shared",
            stacklevel=3,
        )


def _beginnings(provenance: Provenance, rows: np.ndarray, by_tokens: bool) -> list[str] | list[list[int]]:
    if by_tokens:
        return [provenance.sequences[row].tolist() for row in rows.tolist()]
    order = np.lexsort((provenance.position.numpy(), provenance.row.numpy()))
    last = order[np.searchsorted(provenance.row.numpy()[order], rows, side="right") - 1]
    # A text that ends within a character ends in marks that the longer text does not have there.
    return [provenance.text(atom).rstrip("\N{REPLACEMENT CHARACTER}") for atom in last.tolist()]
