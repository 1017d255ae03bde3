"""Gradients through a pursuit: the choice of atoms is taken as given, the coefficients are differentiated."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.precision import without_autocast

_CHUNK_ELEMENTS = 2**24


def coefficients_on_path(
    correlations: Float[Tensor, "b k"], chosen: Float[Tensor, "b k d"], used: Tensor, orthogonal: bool = False
) -> Float[Tensor, "b k"]:
    """The coefficients that pursuit gives when its choices are fixed, as a differentiable function.

    `|d_t|^2 v_t = <x, d_t> - sum over s < t of v_s <d_s, d_t>` is a lower triangular system; the least-squares fit of
    orthogonal pursuit solves the whole of it.

    Args:
        correlations: `<x, d_t>` for the atoms in order of choice.
        chosen: these atoms.
        used: slots in use `[b, k]`; the others get coefficient 0.
        orthogonal: the coefficients were fitted together.
    """
    dtype = correlations.dtype
    if orthogonal:  # atoms that lean together leave float32 few digits
        correlations, chosen = correlations.double(), chosen.double()
    chosen = chosen * used[..., None]
    system, right = chosen @ chosen.mT + torch.diag_embed((~used).to(chosen)), (correlations * used)[..., None]
    if orthogonal:
        return torch.linalg.solve(system, right)[..., 0].to(dtype)
    return torch.linalg.solve_triangular(system.tril(), right, upper=False)[..., 0]


def differentiable(
    x: Float[Tensor, "b d"], atoms: Float[Tensor, "n d"], solve: Callable[[], SparseCodes], orthogonal: bool
) -> SparseCodes:
    """The codes that `solve` returns, with gradients to `x` and `atoms`; costs nothing before the backward pass."""
    if not (torch.is_grad_enabled() and (x.requires_grad or atoms.requires_grad)):
        return solve()
    return SparseCodes(*_Pursuit.apply(x, atoms, solve, orthogonal))  # type: ignore[misc]


class _Pursuit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, atoms: Tensor, solve: Callable[[], SparseCodes], orthogonal: bool
    ) -> tuple[Tensor, Int64[Tensor, "b k"]]:
        values, indices = solve()
        ctx.save_for_backward(x, atoms, values, indices)
        ctx.mark_non_differentiable(indices)
        ctx.orthogonal = orthogonal
        return values, indices

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        x, atoms, values, indices = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_atoms = torch.zeros_like(atoms) if ctx.needs_input_grad[1] else None
        rows = max(1, _CHUNK_ELEMENTS // (indices.shape[1] * x.shape[1]))
        for part in torch.arange(len(x), device=x.device).split(rows):
            x_part = x[part].detach().requires_grad_()
            chosen = atoms[indices[part]].detach().requires_grad_()
            with torch.enable_grad():
                correlations = torch.einsum("bkd,bd->bk", chosen, x_part)
                replayed = coefficients_on_path(correlations, chosen, values[part] != 0, ctx.orthogonal)
            grad_x[part], grad_chosen = torch.autograd.grad(replayed, (x_part, chosen), grad_values[part])
            if grad_atoms is not None:
                grad_atoms.index_add_(0, indices[part].flatten(), grad_chosen.flatten(0, 1))
        return grad_x, grad_atoms, None, None
