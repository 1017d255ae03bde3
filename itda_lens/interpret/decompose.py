"""Activations as sums of atoms, and what is left of them."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.building.losses import relative
from itda_lens.pursuit import SparseCodes
from itda_lens.sae import ITDA


class Decomposition(NamedTuple):
    """Codes of activations under a dictionary, and what they leave."""

    codes: SparseCodes
    """Repeated choices of an atom summed."""
    relative_error: Float[Tensor, " b"]
    """`|x - x_hat|^2 / |x - b|^2`: 1 for a code that says nothing; 0 where `x = b`."""


@torch.no_grad()
def decompose(itda: ITDA, x: Float[Tensor, "b d"]) -> Decomposition:
    """Encode and decode activations; the heads of a hook that has some are flattened.

    Example:
        >>> decompose(ITDA.from_atoms(torch.eye(2), k=1), torch.tensor([[3.0, -4.0]])).relative_error.tolist()
        [0.36000001430511475]
    """
    x = x.to(itda.device, itda.dtype)
    codes = itda.encode_sparse(x).merge()
    x_hat = itda.decode(codes.to_dense(itda.cfg.d_sae).to(itda.dtype))
    return Decomposition(codes, relative(x, x_hat, itda.b_dec * itda.cfg.apply_b_dec_to_input))
