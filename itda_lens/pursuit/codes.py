"""Sparse codes: for each activation the atoms that were chosen, and how much of each."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from itda_lens.pursuit.contexts import is_transformed, without_autocast

# A dense product is faster once more than one coefficient in so many is not zero.
_SPARSE = 16


class SparseCodes(NamedTuple):
    """The path of a pursuit: `k` pairs of coefficient and atom for each activation, in order of choice.

    An index may repeat (its coefficients add up); unused slots hold index 0 and value 0.

    Example:
        >>> codes = SparseCodes(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([3, 1, 3]))
        >>> codes.merge()
        SparseCodes(values=tensor([ 2.5000, -1.0000,  0.0000]), indices=tensor([3, 1, 0]))
        >>> codes.to_dense(4)
        tensor([ 0.0000, -1.0000,  0.0000,  2.5000])
    """

    values: Float[Tensor, "*batch k"]
    indices: Int64[Tensor, "*batch k"]

    def merge(self) -> "SparseCodes":
        """The same codes with each atom named once, at its first place; freed slots move to the end."""
        ordered, order = self.indices.sort(dim=-1, stable=True)
        starts = torch.ones_like(ordered, dtype=torch.bool)
        starts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
        slots = torch.arange(ordered.shape[-1], device=ordered.device).expand_as(ordered)
        start_of_run = torch.where(starts, slots, 0).cummax(dim=-1).values
        first = torch.empty_like(order).scatter_(-1, order, order.gather(-1, start_of_run))
        values = torch.zeros_like(self.values).scatter_add(-1, first, self.values)
        to_front = (values == 0).to(torch.uint8).argsort(dim=-1, stable=True)
        values = values.gather(-1, to_front)
        return SparseCodes(values, self.indices.gather(-1, to_front).masked_fill(values == 0, 0))

    def to_dense(self, n: int) -> Float[Tensor, "*batch n"]:
        """One coefficient for each of `n` atoms, mostly zeros. Memory: `n` values for each activation."""
        dense = self.values.new_zeros((*self.values.shape[:-1], n))
        return dense.scatter_add(-1, self.indices, self.values)

    def to_coo(self, n: int) -> Tensor:
        """The merged codes as a sparse COO tensor `[..., n]`."""
        merged = self.merge()
        used = merged.values != 0
        *places, _ = used.nonzero(as_tuple=True)
        return torch.sparse_coo_tensor(
            torch.stack([*places, merged.indices[used]]),
            merged.values[used],
            (*self.values.shape[:-1], n),
            check_invariants=False,
        )

    def decode(self, atoms: Float[Tensor, "n d"]) -> Float[Tensor, "*batch d"]:
        """The weighted sum of the chosen atoms, in the wider dtype of the two."""
        dtype = torch.promote_types(self.values.dtype, atoms.dtype)
        *batch, k = self.values.shape
        if self.values.numel() == 0:
            return atoms.new_zeros((*batch, atoms.shape[1]), dtype=dtype)
        decoded = torch.nn.functional.embedding_bag(
            self.indices.reshape(-1, k),
            atoms.to(dtype),
            per_sample_weights=self.values.reshape(-1, k).to(dtype),
            mode="sum",
        )
        return decoded.view(*batch, atoms.shape[1])


def decode_dense(codes: Float[Tensor, "*batch n"], atoms: Float[Tensor, "n d"]) -> Float[Tensor, "*batch d"]:
    """The product `codes @ atoms`, on CPUs from the few coefficients that are not zero.

    Example:
        >>> decode_dense(torch.tensor([[0.0, 2.0]]), torch.eye(2))
        tensor([[0., 2.]])
    """
    if is_transformed():
        return codes @ atoms  # which are not zero is not known yet
    return _DecodeDense.apply(codes, atoms)  # type: ignore[return-value]


class _DecodeDense(torch.autograd.Function):
    """Forward by the nonzero coefficients; backward dense, because zero ones have gradients too."""

    @staticmethod
    def forward(codes: Tensor, atoms: Tensor) -> Tensor:  # type: ignore[override]
        if codes.device.type != "cpu" or codes.dtype != atoms.dtype or codes.element_size() < 4:
            return codes @ atoms
        flat = codes.reshape(-1, codes.shape[-1])
        if torch.count_nonzero(flat) * _SPARSE > flat.numel():
            return codes @ atoms
        rows, indices = flat.nonzero(as_tuple=True)
        starts = torch.searchsorted(rows, torch.arange(len(flat)))
        weights = flat[rows, indices]
        recons = torch.nn.functional.embedding_bag(indices, atoms, starts, per_sample_weights=weights, mode="sum")
        return recons.view(*codes.shape[:-1], atoms.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        codes, atoms = ctx.saved_tensors
        to_codes = grad @ atoms.T if ctx.needs_input_grad[0] else None
        flat = codes.reshape(-1, codes.shape[-1])
        to_atoms = flat.T @ grad.reshape(len(flat), -1) if ctx.needs_input_grad[1] else None
        return to_codes, to_atoms
