"""Which tokenizer token ids belong to."""

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Int64
from torch import Tensor

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

    def is_of(self, tokenizer: object) -> bool:
        """Whether these ids mean the same to a tokenizer."""
        ids = _ids(tokenizer) or {}
        return _vocabulary_digest(ids, self.size) == self.base and all(ids.get(t) == i for i, t in self.added.items())

    def agrees(self, other: "Vocabulary") -> bool:
        """Whether the ids that two have in common mean the same."""
        same_base = (self.base, self.size) == (other.base, other.size)
        return same_base and all(other.added.get(i, token) == token for i, token in self.added.items())


def tokenizer_digest(tokenizer: object) -> str | None:
    """A digest of a tokenizer's vocabulary: equal digests mean that token ids mean the same."""
    ids = _ids(tokenizer)
    return None if ids is None else _vocabulary_digest(ids)


def has_added_to(digest: str | None, tokenizer: object) -> bool:
    """Whether a tokenizer is one of this digest to which a few tokens were added."""
    ids = _ids(tokenizer) or {}
    ends = range(max(ids.values(), default=0), 0, -1)[:_TOKENS_ADDED]
    return any(_vocabulary_digest(ids, end) == digest for end in ends)


def digest_of(data: bytes) -> str:
    """16 bytes of blake2b, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _ids(tokenizer: object) -> dict[str, int] | None:
    get_vocab: Callable[[], dict[str, int]] | None = getattr(tokenizer, "get_vocab", None)
    return None if get_vocab is None else get_vocab()


def _vocabulary_digest(ids: dict[str, int], end: int | None = None) -> str:
    """Of all tokens, or of those whose ids are below `end`."""
    return digest_of(json.dumps(sorted(item for item in ids.items() if end is None or item[1] < end)).encode())
