"""The inner products that pursuit starts from."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.pursuit.contexts import without_autocast

_ATOMS_AT_ONCE = 2048
"""oneDNN works on a copy of these."""


@torch.no_grad()
@without_autocast
def inner_products(x: Float[Tensor, "b d"], atoms: Float[Tensor, "n d"]) -> Float[Tensor, "b n"]:
    """`x @ atoms.T` in full precision, whatever torch may do to products.

    On a CPU it is made by oneDNN, which torch carries but keeps for convolutions: more than twice as fast as MKL on an
    AMD EPYC (`benchmarks/pursuit.py`).
    """
    if x.device.type == "cpu" and x.dtype == atoms.dtype == torch.float32 and min(x.numel(), atoms.numel()) > 0:
        if _has_onednn():
            return _by_onednn(x.contiguous(), atoms.contiguous())
    elif x.device.type == "cuda" and products_in_tf32():
        with _full_precision():
            return x @ atoms.T
    return x @ atoms.T


def _by_onednn(x: Tensor, atoms: Tensor) -> Tensor:
    product = torch.ops.mkldnn._linear_pointwise
    if len(atoms) <= _ATOMS_AT_ONCE:
        return product(x, atoms, None, "none", [], "")
    products = x.new_empty(len(x), len(atoms))
    for part, into in zip(atoms.split(_ATOMS_AT_ONCE), products.split(_ATOMS_AT_ONCE, dim=-1), strict=True):
        into.copy_(product(x, part, None, "none", [], ""))
    return products


def products_in_tf32() -> bool:
    """Whether torch makes float32 products on a GPU in TF32, as `torch.set_float32_matmul_precision("high")` has it."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch before 2.9
        return bool(torch.backends.cuda.matmul.allow_tf32)
    own = getattr(torch.backends.cuda.matmul, "fp32_precision")  # noqa: B009
    return (getattr(torch.backends, "fp32_precision") if own == "none" else own) not in ("none", "ieee")  # noqa: B009


@contextmanager
def _full_precision() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, exact)
    try:
        yield
    finally:
        setattr(matmul, name, before)


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
