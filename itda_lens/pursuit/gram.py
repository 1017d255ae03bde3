"""The Gram matrix of the atoms: what makes a step of pursuit one row of additions instead of a product."""

import os
import warnings
from functools import cache
from itertools import count
from threading import Lock
from typing import ClassVar
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from itda_lens.pursuit.contexts import untraced, without_autocast
from itda_lens.pursuit.product import inner_products

_CPU_LIMIT = 4 * 2**30
_ROWS_AT_ONCE = 256
_limit: int | None = None


def gram_limit(device: torch.device | str = "cpu") -> int:
    """How many bytes a Gram matrix may take: what `set_gram_limit` set, else 4 GiB, or a quarter of a GPU's memory."""
    device = torch.device(device)
    if _limit is not None:
        return _limit
    return torch.cuda.get_device_properties(device).total_memory // 4 if device.type == "cuda" else _CPU_LIMIT


def set_gram_limit(size: int | None) -> None:
    """Let a Gram matrix take `size` bytes at most, in this process; None brings the defaults back.

    A dictionary of `n` atoms needs `4 n^2` bytes. Above the limit, pursuit makes the rows that it needs and keeps as
    many as the limit allows: the same codes, more slowly.

    Raises:
        ValueError: `size` is negative.

    Example:
        >>> set_gram_limit(16 * 2**30)  # 65,536 atoms
        >>> set_gram_limit(None)
    """
    global _limit
    if size is not None and size < 0:
        raise ValueError(f"the limit is a number of bytes and can't be negative, got {size}; 0 keeps no matrix at all")
    _limit = size


def gram_fits(n: int, device: torch.device | str = "cpu", element_bytes: int = 4) -> bool:
    """Whether the Gram matrix of `n` atoms stays within `gram_limit`."""
    return n * n * element_bytes <= gram_limit(device)


def gram_matrix(atoms: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """The inner products of all pairs of atoms, in float32 (float64 for float64 atoms)."""
    work = _work(atoms)
    gram = work.new_empty(len(work), len(work))
    for rows, into in zip(work.split(_ROWS_AT_ONCE), gram.split(_ROWS_AT_ONCE), strict=True):
        into.copy_(inner_products(rows, work))
    return gram


class GramRows:
    """Rows of a Gram matrix that is too large to hold: made when asked for, kept while the limit allows.

    Text uses some atoms far more than others, so most rows that are asked for are there already.

    Example:
        >>> GramRows(torch.eye(3))[torch.tensor([2, 0])]
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """

    def __init__(self, atoms: Float[Tensor, "n d"]):
        self._atoms = _work(atoms)
        self._squares = self._atoms.norm(dim=-1).square()
        self._start()

    def _start(self) -> None:
        self._held = self._atoms.new_empty(0, len(self._atoms))
        self._place = torch.full((len(self._atoms),), -1, device=self._atoms.device)
        self._count = 0
        self._lock, self._process = Lock(), os.getpid()

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._atoms), len(self._atoms)

    def diagonal(self) -> Float[Tensor, " n"]:
        return self._squares

    @torch.no_grad()
    def __getitem__(self, chosen: Int64[Tensor, " b"]) -> Float[Tensor, "b n"]:
        if self._process != os.getpid():  # a fork may have come while another thread held the lock
            self._start()
        with self._lock:
            missing = chosen[self._place[chosen] < 0].unique()
            if self._count + len(missing) > self._room():
                self._place.fill_(-1)
                self._count, missing = 0, chosen.unique()
            if len(missing) > self._room():
                return inner_products(self._atoms[chosen], self._atoms)
            if len(missing):
                self._keep(missing)
            return self._held[self._place[chosen]]

    def _room(self) -> int:
        row_bytes = len(self._atoms) * self._atoms.element_size()
        return min(len(self._atoms), gram_limit(self._atoms.device) // row_bytes)

    def _keep(self, missing: Tensor) -> None:
        stop = self._count + len(missing)
        if stop > len(self._held):
            held = self._held.new_empty(min(self._room(), max(stop, 2 * len(self._held))), len(self._atoms))
            held[: self._count] = self._held[: self._count]
            self._held = held
        self._held[self._count : stop] = inner_products(self._atoms[missing], self._atoms)
        self._place[missing] = torch.arange(self._count, stop, device=missing.device)
        self._count = stop


Gram = Tensor | GramRows


def gram_within_limit(atoms: Float[Tensor, "n d"]) -> Gram:
    """The Gram matrix of the atoms, or its rows on demand where it would not fit; says so once."""
    work = _work(atoms)
    size, limit = len(work) ** 2 * work.element_size(), gram_limit(work.device)
    if size <= limit:
        return gram_matrix(work)
    _say_once(len(work), size, limit)
    return GramRows(work)


class GramCache:
    """Holds the Gram matrix of one tensor of atoms, and makes it anew when the atoms are not the same any more.

    Edits through `.data` do not bump a tensor's version, so besides version, storage, shape, dtype and device the
    product with a fixed random vector is compared: cheap beside a pursuit, and an edit that pursuit could tell changes
    it.
    Copies and pickles of a cache are empty.
    """

    _numbers = count(1)
    _living: ClassVar["WeakValueDictionary[int, GramCache]"] = WeakValueDictionary()

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self._living[self.number] = self
        self._gram: Gram | None = None
        self._key: tuple[object, ...] = ()
        self._print: Tensor | None = None

    def __reduce__(self) -> tuple[type["GramCache"], tuple[()]]:
        return GramCache, ()

    @staticmethod
    def numbered(number: int) -> "GramCache | None":
        """The cache of a number, by which a traced graph names it; None where it is gone."""
        return GramCache._living.get(number)

    @untraced
    @torch.no_grad()
    @without_autocast
    def get(self, atoms: Float[Tensor, "n d"]) -> Gram:
        """The Gram matrix of `atoms`, whole or by rows."""
        d = atoms.shape[1]
        version = None if atoms.is_inference() else atoms._version
        place = (atoms.data_ptr(), version, atoms.shape, atoms.stride(), atoms.dtype, atoms.device)
        key = (*place, gram_limit(atoms.device))
        with torch.inference_mode(False):
            work = _work(atoms)
            fingerprint = work @ _probe(d).to(work)
            if self._gram is None or self._print is None or key != self._key or not fingerprint.equal(self._print):
                self._gram, self._key, self._print = None, key, fingerprint  # not two matrices at once
                self._gram = gram_within_limit(atoms)
        return self._gram

    @property
    def is_warm(self) -> bool:
        """Whether a matrix is held."""
        return self._gram is not None


def _work(atoms: Tensor) -> Tensor:
    return atoms.detach().to(torch.promote_types(atoms.dtype, torch.float32))


@cache
def _say_once(n: int, size: int, limit: int) -> None:
    warnings.warn(
        f"the Gram matrix of {n:,} atoms takes {size / 2**30:.2g} GiB, more than the {limit / 2**30:.2g} GiB it may: "
        "pursuit makes the rows that it needs, more slowly. itda_lens.pursuit.set_gram_limit sets how much it may take",
        stacklevel=4,
    )


def _probe(d: int) -> Tensor:
    return torch.randn(d, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
