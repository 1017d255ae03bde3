"""The Gram matrix of the atoms: what makes a step of pursuit one row of additions instead of a product."""

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit.product import inner_products

GRAM_LIMIT_BYTES = 4 * 2**30
"""A Gram matrix above this size is not made; the solver then computes the rows that it needs."""


def gram_matrix(atoms: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """The inner products of all pairs of atoms, in float32 (float64 for float64 atoms)."""
    work = atoms.detach().to(torch.promote_types(atoms.dtype, torch.float32))
    return inner_products(work, work)


def gram_fits(n: int, element_bytes: int = 4) -> bool:
    """Whether the Gram matrix of `n` atoms stays within `GRAM_LIMIT_BYTES`."""
    return n * n * element_bytes <= GRAM_LIMIT_BYTES


class GramCache:
    """Holds the Gram matrix of one tensor of atoms, and makes it anew when the atoms are not the same any more.

    Edits through `.data` do not bump a tensor's version, so besides storage, shape, dtype and device the
    product with a fixed random vector is compared: cheap beside a pursuit, and any edit changes it.
    Copies and pickles of a cache are empty.
    """

    def __init__(self) -> None:
        self._gram: Tensor | None = None
        self._key: tuple[object, ...] = ()
        self._print: Tensor | None = None

    def __reduce__(self) -> tuple[type["GramCache"], tuple[()]]:
        return GramCache, ()

    @torch.no_grad()
    def get(self, atoms: Float[Tensor, "n d"]) -> Float[Tensor, "n n"] | None:
        """The Gram matrix of `atoms`; none where it would not fit."""
        n, d = atoms.shape
        if not gram_fits(n):
            self._gram = self._print = None
            return None
        key = (atoms.data_ptr(), atoms.shape, atoms.stride(), atoms.dtype, atoms.device)
        with torch.inference_mode(False):
            fingerprint = atoms.detach() @ _probe(d).to(atoms)
            if self._print is None or key != self._key or not torch.equal(fingerprint, self._print):
                self._gram, self._key, self._print = gram_matrix(atoms), key, fingerprint
        return self._gram

    @property
    def is_warm(self) -> bool:
        """Whether a matrix is held."""
        return self._gram is not None


def _probe(d: int) -> Tensor:
    return torch.randn(d, generator=torch.Generator().manual_seed(0))
