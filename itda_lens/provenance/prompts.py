"""The text of atoms' prompts, in which what they share is kept once."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np

# Text from a file may hold lone surrogates: they are kept as they are.
_ERRORS = "surrogatepass"


class Link(NamedTuple):
    """A prompt as what it adds to the one before it."""

    shared: int
    """With how many characters of the one before it begins."""
    rest: str
    start: int
    """Where the text of the last token begins."""


class _Branch(NamedTuple):
    """A stretch of text, and what stands before it."""

    parent: int
    """The branch that holds the character before this one's first; -1 where there is none."""
    offset: int
    text: bytes
    """In UTF-8, so that it is as large in memory as in a file, whatever characters it holds."""


class Prompts(Sequence[tuple[str, str]]):
    """For each atom the text before its token and the text of its token, made when asked for.

    Prompts of one sequence mostly go on where others end. Only what they add is kept, so the memory is linear in that.

    Args:
        links: the prompts in some order, best by sequence and position.
        order: which atom each is.

    Raises:
        ValueError: a prompt shares more than the one before it has, or its token begins past its end.

    Example:
        >>> prompts = Prompts([Link(0, "one", 0), Link(3, " two", 3)], [1, 0])
        >>> list(prompts)
        [('one', ' two'), ('', 'one')]
    """

    def __init__(self, links: Iterable[Link], order: Sequence[int]):
        self._at = np.zeros((len(order), 3), dtype=np.int64)  # branch, end and start of each atom
        self._branches: list[_Branch] = []
        pieces: list[str] = []
        path: list[tuple[int, int]] = []  # the branches that the text so far goes through, and where each begins
        parent = offset = length = 0

        def close() -> None:
            if path:
                self._branches.append(_Branch(parent, offset, "".join(pieces).encode(errors=_ERRORS)))
                pieces.clear()

        for atom, (shared, rest, start) in zip(order, links, strict=True):
            if not 0 <= shared <= length or not 0 <= start <= shared + len(rest):
                raise ValueError(f"the prompt of atom {atom} does not go on from the one before it")
            if shared < length or not path:
                close()
                while path and path[-1][1] >= shared:
                    path.pop()
                parent, offset = path[-1][0] if path else -1, shared
                path.append((len(self._branches), offset))
            pieces.append(rest)
            length = shared + len(rest)
            self._at[atom] = len(self._branches), length, start
        close()

    def __len__(self) -> int:
        return len(self._at)

    @overload
    def __getitem__(self, i: int) -> tuple[str, str]: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[tuple[str, str], ...]: ...
    def __getitem__(self, i: int | slice) -> tuple[str, str] | tuple[tuple[str, str], ...]:
        if isinstance(i, slice):
            return tuple(self[j] for j in range(len(self))[i])
        branch, end, start = self._at[i].tolist()
        parts = []
        while branch >= 0:
            parent, offset, text = self._branches[branch]
            parts.append(text.decode(errors=_ERRORS)[: end - offset])
            branch, end = parent, offset
        text = "".join(reversed(parts))
        return text[:start], text[start:]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Prompts of {len(self)} atoms"

    def select(self, atoms: Sequence[int]) -> "Prompts":
        """The prompts of some atoms, in the order given."""
        chosen = object.__new__(Prompts)
        chosen._at, chosen._branches = self._at[list(atoms)], self._branches
        return chosen


def links(prompts: Iterable[tuple[str, str]]) -> Iterator[Link]:
    """What each prompt adds to the one before it.

    Example:
        >>> list(links([("", "one"), ("one", " two")]))
        [Link(shared=0, rest='one', start=0), Link(shared=3, rest=' two', start=3)]
    """
    previous = ""
    for before, token in prompts:
        text = before + token
        shared = common_prefix(previous, text)
        yield Link(shared, text[shared:], len(before))
        previous = text


def common_prefix(a: str, b: str) -> int:
    """With how many characters of `a` another text begins.

    Example:
        >>> common_prefix("abcd", "abx"), common_prefix("ab", "abc")
        (2, 2)
    """
    if b.startswith(a):
        return len(a)
    same, different = 0, min(len(a), len(b))
    while same < different:  # halves, since comparing slices is fast
        middle = (same + different + 1) // 2
        if a[same:middle] == b[same:middle]:
            same = middle
        else:
            different = middle - 1
    return same
