"""What a builder does not take, said before any work."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from itda_lens.pursuit import lengths

LARGEST = 1e36
"""The largest norm of an activation: atoms are held in float32, and some room is needed to remove the mean."""


def check_range(
    x: Float[Tensor, "b s d"], mask: Bool[Tensor, "b s"], others: Bool[Tensor, "b s"], first_row: int
) -> None:
    """Raise a ValueError that names the first activation, of those that count, that float32 can't hold."""

    def first(bad: Tensor) -> str:
        sequence, position = bad[0].tolist()
        return (
            f"the activation of sequence {first_row + sequence} (number {sequence} of this call) at position {position}"
        )

    bad = (~x.isfinite().all(dim=-1).cpu() & mask).nonzero()
    if len(bad):
        raise ValueError(
            f"{first(bad)} holds NaN or infinite values, as do {len(bad) - 1} others: mask them, or run the model in "
            "a wider dtype"
        )
    norms = lengths(x if x.element_size() > 2 else x.float()).cpu()
    large = ((norms > LARGEST) & (mask | others)).nonzero()
    if len(large):
        raise ValueError(
            f"{first(large)} has norm {norms[tuple(large[0])]:.3g}, above the {LARGEST:.0e} up to which atoms, which "
            "are held in float32, can be made of it: divide all activations by a constant"
        )


def check_counts(**counts: int | None) -> None:
    """Raise a ValueError for a count that is given and no whole number of at least 1."""
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def as_bool(name: str, mask: Tensor) -> Tensor:
    """A mask as it comes, of any dtype: an attention mask holds the numbers 0 and 1."""
    mask = mask.detach().cpu()
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{name} must hold 0 and 1, or False and True, but goes from {mask.min()} to {mask.max()}")
    return mask.bool()
