"""Which prompt and which token each atom is."""

import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

IdentityKind = Literal["text", "tokens", "position"]

_PIECE = "\N{REPLACEMENT CHARACTER}"
"""The text of a token that ends within a character."""
_TOKENS_ADDED = 16
"""How many added tokens are looked for, where only a digest of the whole vocabulary is known."""


@runtime_checkable
class Tokenizer(Protocol):
    """The one method of a tokenizer that provenance needs: `transformers` tokenizers have it."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


class Vocabulary(NamedTuple):
    """What the token ids of some sequences mean: a tokenizer that only has more tokens is the same for them."""

    digest: str
    """Of the whole vocabulary, see `tokenizer_digest`."""
    base: str
    """Of the tokens below `size`."""
    size: int
    """How many tokens the tokenizer had before some were added to it."""
    added: dict[int, str]
    """Those tokens of the sequences that were added."""

    @staticmethod
    def of(tokenizer: object, sequences: Iterable[Int64[Tensor, " _"]]) -> "Vocabulary | None":
        """What a tokenizer says of some sequences; None where it does not list its tokens."""
        ids, size = _ids(tokenizer), getattr(tokenizer, "vocab_size", None)
        if ids is None or not isinstance(size, int):
            return None
        used = {i for sequence in sequences for i in sequence[sequence >= size].tolist()}
        added = {i: token for token, i in sorted(ids.items()) if i in used}
        return Vocabulary(_vocabulary_digest(ids), _vocabulary_digest(ids, size), size, added)


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
    prompts: tuple[tuple[str, str], ...] = ()
    """For each atom the text before its token and the text of its token, special tokens left out; or nothing."""
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
        if self.sequences:
            for atom, (row, position) in enumerate(zip(self.row.tolist(), self.position.tolist(), strict=True)):
                if row not in self.sequences or not 0 <= position < len(self.sequences[row]):
                    raise ValueError(f"atom {atom} is at row {row}, position {position}, which sequences do not cover")

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

        prompts = tuple(
            _split(tokenizer, sequences[r][: p + 1].tolist(), skip_special_tokens=True)
            for r, p in zip(row.tolist(), position.tolist(), strict=True)
        )
        return Provenance(row, position, sequences, prompts).of_tokenizer(tokenizer)

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
            return [_digest(self.text(i).encode() + self._unfinished(i)) for i in range(len(self))]
        return [_digest(self._token_bytes(i)) for i in range(len(self))]

    def identity_set(self, kind: IdentityKind = "text") -> frozenset[Hashable]:
        """The different identities, kept after the first call; raises a ValueError as `identities` does."""
        if kind not in self._sets:
            self._sets[kind] = frozenset(self.identities(kind))
        return self._sets[kind]

    def select(self, atoms: Sequence[int] | Int64[Tensor, " m"]) -> "Provenance":
        """The provenance of some of the atoms, in the order given."""
        chosen = torch.as_tensor(atoms, dtype=torch.int64)
        row, position = self.row[chosen], self.position[chosen]
        ends = _ends(row, position)
        return Provenance(
            row,
            position,
            {r: self.sequences[r][:end] for r, end in ends.items()} if self.sequences else {},
            tuple(self.prompts[i] for i in chosen.tolist()) if self.prompts else (),
            self.tokenizer_digest,
            self.vocabulary,
        )

    def to_bytes(self) -> UInt8[Tensor, " size"]:
        """A compressed form in bytes 0 to 255, which survive any cast of a weights file."""
        ends = _ends(self.row, self.position)
        rows = sorted(ends) if self.sequences else []
        # A prompt mostly begins as the one before it in its row does: only the rest is written.
        order = np.lexsort((self.position.numpy(), self.row.numpy()))
        written, previous = [], ""
        for i in order.tolist() if self.prompts else []:
            text = self.text(i)
            shared = _common_prefix(previous, text)
            written.append([shared, text[shared:], len(self.prompts[i][0])])
            previous = text
        parts = {
            "row": self.row,
            "position": self.position,
            "sequence_row": torch.tensor(rows, dtype=torch.int64),
            "sequence_end": torch.tensor([ends[r] for r in rows], dtype=torch.int64),
            "sequence": torch.cat([self.sequences[r][: ends[r]] for r in rows]) if rows else self.row.new_empty(0),
        }
        header = {"prompts": json.dumps(written), "tokenizer_digest": self.tokenizer_digest or ""}
        if self.vocabulary is not None:
            _, base, size, added = self.vocabulary
            header["vocabulary"] = json.dumps([base, size, list(added.items())])
        packed = zlib.compress(safetensors.torch.save({k: v.contiguous() for k, v in parts.items()}, header), 6)
        return torch.frombuffer(bytearray(packed), dtype=torch.uint8)

    @staticmethod
    def from_bytes(packed: UInt8[Tensor, " size"]) -> "Provenance":
        """The inverse of `to_bytes`; raises a ValueError for bytes that it did not write."""
        try:
            raw = zlib.decompress(packed.numpy().tobytes())
            parts = safetensors.torch.load(raw)
            header = _header(raw)
            row, position = parts["row"], parts["position"]
            pieces = parts["sequence"].split(parts["sequence_end"].tolist())
            sequences = dict(zip(parts["sequence_row"].tolist(), pieces, strict=True))
            written = json.loads(header["prompts"])
            prompts: list[tuple[str, str]] = [("", "")] * len(written)
            order, previous = np.lexsort((position.numpy(), row.numpy())).tolist(), ""
            for i, (shared, rest, start) in zip(order if written else [], written, strict=True):
                previous = previous[:shared] + rest
                prompts[i] = (previous[:start], previous[start:])
            digest, vocabulary = header["tokenizer_digest"] or None, None
            if digest is not None and "vocabulary" in header:
                base, size, added = json.loads(header["vocabulary"])
                vocabulary = Vocabulary(digest, str(base), int(size), {int(i): str(token) for i, token in added})
            return Provenance(row, position, sequences, tuple(prompts), digest, vocabulary)
        except (zlib.error, safetensors.SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as e:
            raise ValueError(f"the provenance in this file can't be read ({e}): it was truncated or edited") from e

    @cached_property
    def n_prompts(self) -> int:
        """How many different rows the atoms come from."""
        return len(self.row.unique())

    def _token_bytes(self, i: int) -> bytes:
        return np.asarray(self.tokens(i), dtype="<i8").tobytes()

    def _unfinished(self, i: int) -> bytes:
        """What tells the pieces of one character from each other, which have the same text."""
        return self._token_bytes(i) if self.sequences and self.text(i).endswith(_PIECE) else b""

    def _require(self, kind: IdentityKind) -> None:
        if kind not in ("text", "tokens", "position"):
            raise ValueError(f"kind must be 'text', 'tokens' or 'position', got {kind!r}")
        if kind not in self.kinds:
            needed = "a tokenizer and tokens" if kind == "text" else "tokens"
            raise ValueError(
                f"this dictionary was built without {needed}, so its atoms have no {kind}: they have {self.kinds}. "
                f"Pass {needed} to the builder"
            )


def tokenizer_digest(tokenizer: object) -> str | None:
    """A digest of a tokenizer's vocabulary: equal digests mean that token ids mean the same."""
    ids = _ids(tokenizer)
    return None if ids is None else _vocabulary_digest(ids)


def same_tokenizer(prompts: Provenance, other: object) -> bool:
    """Whether the token ids of some prompts mean the same to a tokenizer, or in other prompts.

    A tokenizer to which tokens were added is the same for prompts that have none of these. Prompts that don't say which
    tokenizer they belong to are taken for those of any tokenizer.

    Args:
        prompts: with tokens.
        other: a tokenizer, or a `Provenance`.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from itda_lens import embedded
        >>> tokenizer, more = (AutoTokenizer.from_pretrained(embedded.path()) for _ in range(2))
        >>> more.add_tokens(["<think>"])
        1
        >>> here = torch.zeros(1, dtype=torch.int64)
        >>> prompts = Provenance.from_tokens(here, here + 1, {0: torch.tensor([0, 5])}, tokenizer)
        >>> same_tokenizer(prompts, more)
        True
        >>> same_tokenizer(Provenance.from_tokens(here, here, {0: torch.tensor([2048])}, more), tokenizer)
        False
    """
    own = prompts.vocabulary
    if isinstance(other, Provenance):
        if prompts.tokenizer_digest == other.tokenizer_digest:
            return True
        found = other.vocabulary
        if own is None or found is None or own[1:3] != found[1:3]:
            return False
        return all(found.added.get(i, token) == token for i, token in own.added.items())
    if prompts.tokenizer_digest in (None, tokenizer_digest(other)):
        return True
    ids = _ids(other) or {}
    if own is not None:
        return _vocabulary_digest(ids, own.size) == own.base and all(ids.get(t) == i for i, t in own.added.items())
    ends = range(max(ids.values(), default=0), 0, -1)[:_TOKENS_ADDED]
    return any(_vocabulary_digest(ids, end) == prompts.tokenizer_digest for end in ends)


def shared_kind(provenances: Sequence[Provenance]) -> IdentityKind:
    """By what atoms compare: token ids under one tokenizer, else text, else their positions.

    Raises:
        ValueError: there are token ids of different tokenizers alone.
    """
    by_tokens = all(provenance.sequences for provenance in provenances)
    if by_tokens and all(same_tokenizer(a, b) for a, b in itertools.combinations(provenances, 2)):
        return "tokens"
    if all(provenance.prompts for provenance in provenances):
        return "text"
    if by_tokens:
        raise ValueError(
            "the dictionaries hold token ids of different tokenizers, and not all of them texts: build them with their "
            "tokenizers, so that atoms compare by text"
        )
    return "position"


def _ids(tokenizer: object) -> dict[str, int] | None:
    get_vocab: Callable[[], dict[str, int]] | None = getattr(tokenizer, "get_vocab", None)
    return None if get_vocab is None else get_vocab()


def _vocabulary_digest(ids: dict[str, int], end: int | None = None) -> str:
    """Of all tokens, or of those whose ids are below `end`."""
    return _digest(json.dumps(sorted(item for item in ids.items() if end is None or item[1] < end)).encode())


def _split(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool) -> tuple[str, str]:
    """The text of all tokens but the last, and what the last one adds to it."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    text = decode(ids)
    start = _common_prefix(decode(ids[:-1]), text)
    return text[:start], text[start:]


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _common_prefix(a: str, b: str) -> int:
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _ends(row: Tensor, position: Tensor) -> dict[int, int]:
    ends: dict[int, int] = {}
    for r, p in zip(row.tolist(), position.tolist(), strict=True):
        ends[r] = max(ends.get(r, 0), p + 1)
    return ends


def _header(raw: bytes) -> dict[str, str]:
    # safetensors reads the metadata of files only; its layout is a length, then JSON (format documentation).
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size])["__metadata__"]
