"""Which prompt and which token each atom is."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from itda_lens.provenance.packing import Parts, order_of, pack, unpack
from itda_lens.provenance.prompts import Prompts, common_prefix, links
from itda_lens.provenance.sequences import ends, lengths
from itda_lens.provenance.vocabulary import Tokenizer, Vocabulary, digest_of, tokenizer_digest

IdentityKind = Literal["text", "tokens", "position"]

_PIECE = "\N{REPLACEMENT CHARACTER}"
"""The text of a token that ends within a character."""


@dataclass(frozen=True, eq=False)
class Provenance:
    """For each atom the row (sequence) of the stream and the position in it; with tokens, also the prompt.

    The activation of a causal model at a position is a function of the tokens up to it, so the text up to and
    including an atom's token *is* the atom, in any model. Sequences are kept once each, up to their last atom.

    Example:
        >>> prov = Provenance(torch.tensor([4, 4]), torch.tensor([0, 2]), {4: torch.tensor([7, 8, 9])})
        >>> prov.tokens(1), prov.row[1].item(), prov.position[1].item()
        ([7, 8, 9], 4, 2)
        >>> prov.identities("position")
        [(4, 0), (4, 2)]
    """

    row: Int64[Tensor, " n"]
    position: Int64[Tensor, " _"]
    sequences: Mapping[int, Int64[Tensor, " _"]] = field(default_factory=dict)
    """The tokens of each row that has an atom, at least up to its last one; empty without tokens."""
    prompts: Sequence[tuple[str, str]] = ()
    """For each atom the text before its token and the text of its token, special tokens left out; or nothing.

    Kept as `Prompts`, in which prompts share what they share.
    """
    tokenizer_digest: str | None = None
    """Which tokenizer the token ids belong to."""
    vocabulary: Vocabulary | None = None
    """What these ids mean to it; None in older files."""
    _sets: dict[IdentityKind, frozenset[Hashable]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.row.shape != self.position.shape or self.row.ndim != 1:
            raise ValueError(
                f"row and position must be one-dimensional and equally long, "
                f"got shapes {tuple(self.row.shape)} and {tuple(self.position.shape)}"
            )
        if self.prompts and len(self.prompts) != len(self):
            raise ValueError(f"prompts has {len(self.prompts)} entries for {len(self)} atoms")
        if self.vocabulary is not None and self.vocabulary.digest != self.tokenizer_digest:
            object.__setattr__(self, "vocabulary", None)  # the tokens were said to be of another tokenizer
        if not isinstance(self.prompts, Prompts):
            order = order_of(self.row, self.position) if self.prompts else []
            object.__setattr__(self, "prompts", Prompts(links(self.prompts[i] for i in order), order))
        if self.sequences:
            self._check_covered()

    @staticmethod
    def from_tokens(
        row: Int64[Tensor, " n"],
        position: Int64[Tensor, " n"],
        sequences: Mapping[int, Int64[Tensor, " _"]],
        tokenizer: Tokenizer | None = None,
    ) -> "Provenance":
        """The provenance of atoms in known sequences, with their texts where there is a tokenizer."""
        if tokenizer is None:
            return Provenance(row, position, sequences)

        order = order_of(row, position)
        at = zip(row[order].tolist(), position[order].tolist(), strict=True)
        texts = (_split(tokenizer, sequences[r][: p + 1].tolist(), skip_special_tokens=True) for r, p in at)
        return Provenance(row, position, sequences, Prompts(links(texts), order)).of_tokenizer(tokenizer)

    def of_tokenizer(self, tokenizer: object) -> "Provenance":
        """The same, which says that its token ids belong to a tokenizer."""
        vocabulary = Vocabulary.of(tokenizer, self.sequences.values())
        digest = tokenizer_digest(tokenizer) if vocabulary is None else vocabulary.digest
        return replace(self, tokenizer_digest=digest, vocabulary=vocabulary)

    def __len__(self) -> int:
        return len(self.row)

    def tokens(self, i: int) -> list[int]:
        """The token ids up to and including atom `i`; raises a ValueError where no tokens were given."""
        self._require("tokens")
        return self.sequences[int(self.row[i])][: int(self.position[i]) + 1].tolist()

    def text(self, i: int) -> str:
        """The text up to and including atom `i`'s token; raises a ValueError where there was no tokenizer."""
        return "".join(self.prompt(i))

    def prompt(self, i: int) -> tuple[str, str]:
        """The text before atom `i`'s token, and the text of that token."""
        self._require("text")
        return self.prompts[i]

    def shown(self, i: int, tokenizer: Tokenizer) -> tuple[str, str]:
        """The prompt of atom `i` with its special tokens (the roles of a chat), but for a BOS that it begins with."""
        ids = self.tokens(i)
        if len(ids) > 1 and ids[0] == getattr(tokenizer, "bos_token_id", None):
            ids = ids[1:]
        return _split(tokenizer, ids, skip_special_tokens=False)

    @property
    def kinds(self) -> tuple[IdentityKind, ...]:
        """The kinds of identity that these atoms have, the strongest first."""
        has: list[tuple[IdentityKind, bool]] = [("text", bool(self.prompts)), ("tokens", bool(self.sequences))]
        return (*(kind for kind, present in has if present), "position")

    def identities(self, kind: IdentityKind = "text") -> list[Hashable]:
        """What makes two atoms the same: a digest of the text, of the token ids, or `(row, position)`.

        Two atoms may share an identity (one prompt that occurs twice); sets collapse them. A text that ends within a
        character is told from others by its token ids.

        Raises:
            ValueError: this provenance lacks what the kind needs.
        """
        self._require(kind)
        if kind == "position":
            return list(zip(self.row.tolist(), self.position.tolist(), strict=True))
        if kind == "text":
            return [digest_of(self._text_bytes(i)) for i in range(len(self))]
        return [digest_of(self._token_bytes(i)) for i in range(len(self))]

    def identity_set(self, kind: IdentityKind = "text") -> frozenset[Hashable]:
        """The different identities, kept after the first call; raises a ValueError as `identities` does."""
        if kind not in self._sets:
            self._sets[kind] = frozenset(self.identities(kind))
        return self._sets[kind]

    def select(self, atoms: Sequence[int] | Int64[Tensor, " m"]) -> "Provenance":
        """The provenance of some of the atoms, in the order given."""
        chosen = torch.as_tensor(atoms, dtype=torch.int64)
        row, position = self.row[chosen], self.position[chosen]
        sequences = {r: self.sequences[r][:end] for r, end in ends(row, position).items()} if self.sequences else {}
        prompts = self._parts.prompts.select(chosen.tolist()) if self.prompts else ()
        return Provenance(row, position, sequences, prompts, self.tokenizer_digest, self.vocabulary)

    def to_bytes(self) -> UInt8[Tensor, " size"]:
        """A compressed form in bytes 0 to 255, which survive any cast of a weights file."""
        return pack(self._parts)

    @staticmethod
    def from_bytes(packed: UInt8[Tensor, " size"], atoms: int | None = None) -> "Provenance":
        """The inverse of `to_bytes`, in time and memory that the number of bytes bounds, whoever wrote them.

        Args:
            packed: what `to_bytes` gave.
            atoms: how many there must be; any number if not given.

        Raises:
            ValueError: bytes that `to_bytes` did not write, or another number of atoms.
        """
        return Provenance(*unpack(packed, atoms))

    @cached_property
    def n_prompts(self) -> int:
        """How many different rows the atoms come from."""
        return len(self.row.unique())

    def _token_bytes(self, i: int) -> bytes:
        return np.asarray(self.tokens(i), dtype="<i8").tobytes()

    def _text_bytes(self, i: int) -> bytes:
        text = self.text(i)
        # The pieces of one character have the same text: their token ids tell them from each other.
        return text.encode() + (self._token_bytes(i) if self.sequences and text.endswith(_PIECE) else b"")

    @property
    def _parts(self) -> Parts:
        assert isinstance(self.prompts, Prompts)
        return Parts(self.row, self.position, self.sequences, self.prompts, self.tokenizer_digest, self.vocabulary)

    def _check_covered(self) -> None:
        held = lengths(self.sequences)
        known = np.array([held.get(r, 0) for r in self.row.tolist()])
        position = self.position.numpy()
        bad = np.flatnonzero((position < 0) | (position >= known))
        if len(bad):
            atom = int(bad[0])
            row, place = int(self.row[atom]), int(position[atom])
            raise ValueError(f"atom {atom} is at row {row}, position {place}, which sequences do not cover")

    def _require(self, kind: IdentityKind) -> None:
        if kind not in ("text", "tokens", "position"):
            raise ValueError(f"kind must be 'text', 'tokens' or 'position', got {kind!r}")
        if kind not in self.kinds:
            needed = "a tokenizer and tokens" if kind == "text" else "tokens"
            raise ValueError(
                f"this dictionary was built without {needed}, so its atoms have no {kind}: they have {self.kinds}. "
                f"Pass {needed} to the builder"
            )


def _split(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool) -> tuple[str, str]:
    """The text of all tokens but the last, and what the last one adds to it."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    text = decode(ids)
    start = common_prefix(decode(ids[:-1]), text)
    return text[:start], text[start:]
