"""A dictionary that grows by one atom at a time, with its Gram matrix and where each atom came from."""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from itda_lens.pursuit import GramRows, SparseCodes, gram_fits, gram_matrix, pursue_correlations


class GrowingDictionary:
    """Unit rows and their inner products, in buffers with room to grow; the Gram matrix only while it fits.

    For each atom also the row and position it came from, and its loss at admission.
    """

    def __init__(self, d_in: int, device: torch.device):
        self.n = 0
        self._atoms = torch.empty(0, d_in, dtype=torch.float32, device=device)
        self._gram: Tensor | None = torch.empty(0, 0, dtype=torch.float32, device=device)
        self._places = torch.empty(0, 2, dtype=torch.int64)
        self._admission = torch.empty(0, dtype=torch.float64)

    @property
    def atoms(self) -> Float[Tensor, "n d"]:
        return self._atoms[: self.n]

    @property
    def row(self) -> Int64[Tensor, " n"]:
        return self._places[: self.n, 0]

    @property
    def position(self) -> Int64[Tensor, " n"]:
        return self._places[: self.n, 1]

    @property
    def admission(self) -> Float64[Tensor, " n"]:
        return self._admission[: self.n]

    def add(
        self, atom: Float[Tensor, " d"], products: Float[Tensor, " n"], row: int, position: int, loss: float
    ) -> None:
        """Append a unit vector, given its inner products with the atoms before it."""
        n = self.n
        if n == len(self._atoms):
            self._reserve(max(64, n + n // 2))
        self._atoms[n] = atom
        if self._gram is not None:
            self._gram[n, :n] = products
            self._gram[:n, n] = products
            self._gram[n, n] = atom @ atom
        self._places[n, 0], self._places[n, 1], self._admission[n] = row, position, loss
        self.n += 1

    def extend(
        self,
        atoms: Float[Tensor, "m d"],
        row: Int64[Tensor, " m"],
        position: Int64[Tensor, " m"],
        admission: Float64[Tensor, " m"],
    ) -> None:
        """Append many unit vectors at once."""
        self._atoms = torch.cat([self.atoms, atoms.to(self._atoms)])
        self._places = torch.cat([self._places[: self.n], torch.stack([row, position], dim=1)])
        self._admission = torch.cat([self.admission, admission])
        self.n = len(self._atoms)
        self._gram = gram_matrix(self._atoms) if gram_fits(self.n, self._atoms.device) else None

    def keep(self, indices: Int64[Tensor, " m"]) -> None:
        """Keep these atoms alone, in this order."""
        on_device = indices.to(self._atoms.device)
        if self._gram is not None:
            self._gram = self._gram[on_device[:, None], on_device]
        self._atoms = self._atoms[on_device]
        self._places, self._admission = self._places[indices], self._admission[indices]
        self.n = len(indices)

    def pursue(
        self, products: Float[Tensor, "b n"], energy: Float[Tensor, " b"], k: int, tolerance: float
    ) -> SparseCodes:
        """Matching pursuit with the atoms so far, from the products with them; empty codes where there are none."""
        if self.n == 0:
            empty = products.new_zeros(len(products), k)
            return SparseCodes(empty, torch.zeros_like(empty, dtype=torch.int64))
        gram = GramRows(self.atoms) if self._gram is None else self._gram[: self.n]
        return pursue_correlations(products, self.atoms, gram, k, energy=energy, tolerance=tolerance)

    def _reserve(self, capacity: int) -> None:
        self._atoms = _grown(self._atoms, capacity)
        self._places, self._admission = _grown(self._places, capacity), _grown(self._admission, capacity)
        if self._gram is not None and gram_fits(capacity, self._atoms.device):
            gram = self._gram.new_empty(capacity, capacity)
            gram[: self.n, : self.n] = self._gram[: self.n, : self.n]
            self._gram = gram
        else:
            self._gram = None


def _grown(buffer: Tensor, capacity: int) -> Tensor:
    larger = buffer.new_empty(capacity, *buffer.shape[1:])
    larger[: len(buffer)] = buffer
    return larger
