"""Which prompt and which token each atom is."""

import hashlib
import json
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

IdentityKind = Literal["text", "tokens", "position"]


@runtime_checkable
class Tokenizer(Protocol):
    """The one method of a tokenizer that provenance needs: `transformers` tokenizers have it."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


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
    _sets: dict[IdentityKind, frozenset[Hashable]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.row.shape != self.position.shape or self.row.ndim != 1:
            raise ValueError(
                f"row and position must be one-dimensional and equally long, "
                f"got shapes {tuple(self.row.shape)} and {tuple(self.position.shape)}"
            )
        if self.prompts and len(self.prompts) != len(self):
            raise ValueError(f"prompts has {len(self.prompts)} entries for {len(self)} atoms")
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

        def decode(ids: list[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

        prompts = []
        for r, p in zip(row.tolist(), position.tolist(), strict=True):
            ids = sequences[r][: p + 1].tolist()
            text = decode(ids)
            start = _common_prefix(decode(ids[:-1]), text)
            prompts.append((text[:start], text[start:]))
        return Provenance(row, position, sequences, tuple(prompts), tokenizer_digest(tokenizer))

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

    @property
    def kinds(self) -> tuple[IdentityKind, ...]:
        """The kinds of identity that these atoms have, the strongest first."""
        has: list[tuple[IdentityKind, bool]] = [("text", bool(self.prompts)), ("tokens", bool(self.sequences))]
        return (*(kind for kind, present in has if present), "position")

    def identities(self, kind: IdentityKind = "text") -> list[Hashable]:
        """What makes two atoms the same: a digest of the text, of the token ids, or `(row, position)`.

        Two atoms may share an identity (one prompt that occurs twice); sets collapse them.

        Raises:
            ValueError: this provenance lacks what the kind needs.
        """
        self._require(kind)
        if kind == "position":
            return list(zip(self.row.tolist(), self.position.tolist(), strict=True))
        if kind == "text":
            return [_digest(before.encode() + token.encode()) for before, token in self.prompts]
        return [_digest(np.asarray(self.tokens(i), dtype="<i8").tobytes()) for i in range(len(self))]

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
            return Provenance(row, position, sequences, tuple(prompts), header["tokenizer_digest"] or None)
        except (zlib.error, safetensors.SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as e:
            raise ValueError(f"the provenance in this file can't be read ({e}): it was truncated or edited") from e

    @cached_property
    def n_prompts(self) -> int:
        """How many different rows the atoms come from."""
        return len(self.row.unique())

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
    get_vocab: Callable[[], dict[str, int]] | None = getattr(tokenizer, "get_vocab", None)
    return None if get_vocab is None else _digest(json.dumps(sorted(get_vocab().items())).encode())


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
