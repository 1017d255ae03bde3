"""A dictionary that grows by one atom at a time, with its Gram matrix and where each atom came from."""

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from itda_lens.building.kernel import keep_square
from itda_lens.pursuit import GramRows, SparseCodes, gram_fits, gram_matrix, pursue_correlations


class GrowingDictionary:
    """Unit rows and their inner products, in buffers with room to grow; the Gram matrix only while it fits.

    For each atom also the row and position it came from, its loss at admission, and whether it is a sink's.
    """

    def __init__(self, d_in: int, device: torch.device):
        self.n = 0
        self._atoms = torch.empty(0, d_in, dtype=torch.float32, device=device)
        self._gram: Tensor | None = torch.empty(0, 0, dtype=torch.float32, device=device)
        self._places = torch.empty(0, 3, dtype=torch.int64)
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
    def sink(self) -> Bool[Tensor, " n"]:
        """Which atoms are massive activations."""
        return self._places[: self.n, 2] > 0

    @property
    def admission(self) -> Float64[Tensor, " n"]:
        return self._admission[: self.n]

    def add(
        self, atom: Float[Tensor, " d"], products: Float[Tensor, " n"], row: int, position: int, loss: float, sink: bool
    ) -> None:
        """Append a unit vector, given its inner products with the atoms before it."""
        n = self.n
        self._reserve(n + 1)
        self._atoms[n] = atom
        if self._gram is not None:
            self._gram[n, :n] = products
            self._gram[:n, n] = products
            self._gram[n, n] = atom @ atom
        self._places[n], self._admission[n] = torch.tensor([row, position, sink]), loss
        self.n += 1

    def gram_with_room(self, more: int) -> Float[Tensor, "capacity capacity"] | None:
        """The Gram matrix with room for so many further atoms, to be filled before `entered`; None if it can't fit."""
        self._reserve(self.n + more)
        return self._gram

    def entered(
        self,
        atoms: Float[Tensor, "m d"],
        row: Int64[Tensor, " m"],
        position: Int64[Tensor, " m"],
        admission: Float64[Tensor, " m"],
        sink: Bool[Tensor, " m"],
    ) -> None:
        """Append unit vectors whose inner products are in the Gram matrix already."""
        into = slice(self.n, self.n + len(atoms))
        self._atoms[into], self._admission[into] = atoms, admission
        self._places[into] = torch.stack([row, position, sink.long()], dim=1)
        self.n += len(atoms)

    def extend(
        self,
        atoms: Float[Tensor, "m d"],
        row: Int64[Tensor, " m"],
        position: Int64[Tensor, " m"],
        admission: Float64[Tensor, " m"],
        sink: Bool[Tensor, " m"] | None = None,
    ) -> None:
        """Append many unit vectors at once."""
        self._atoms = torch.cat([self.atoms, atoms.to(self._atoms)])
        sink = torch.zeros(len(row), dtype=torch.bool) if sink is None else sink
        self._places = torch.cat([self._places[: self.n], torch.stack([row, position, sink.long()], dim=1)])
        self._admission = torch.cat([self.admission, admission])
        self.n = len(self._atoms)
        self._gram = gram_matrix(self._atoms) if gram_fits(self.n, self._atoms.device) else None

    def keep(self, indices: Int64[Tensor, " m"]) -> None:
        """Keep these atoms alone; `indices` must rise."""
        m, on_device = len(indices), indices.to(self._atoms.device)
        if self._gram is not None and self._gram.device.type == "cpu":
            keep_square(self._gram.numpy(), indices.numpy())
        elif self._gram is not None:
            self._gram[:m, :m] = self._gram[on_device[:, None], on_device]
        self._atoms[:m] = self._atoms[on_device]
        self._places[:m], self._admission[:m] = self._places[indices], self._admission[indices]
        self.n = m

    def pursue(
        self, products: Float[Tensor, "b n"], energy: Float[Tensor, " b"], k: int, tolerance: float
    ) -> SparseCodes:
        """Matching pursuit with the atoms so far, from the products with them; empty codes where there are none."""
        if self.n == 0:
            empty = products.new_zeros(len(products), k)
            return SparseCodes(empty, torch.zeros_like(empty, dtype=torch.int64))
        gram = GramRows(self.atoms) if self._gram is None else self._gram[: self.n]
        return pursue_correlations(products, self.atoms, gram, k, energy=energy, tolerance=tolerance)

    def _reserve(self, size: int) -> None:
        if size <= len(self._atoms):
            return
        capacity = max(64, size, self.n + self.n // 2)
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
