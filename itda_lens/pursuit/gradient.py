"""Gradients through a pursuit: the choice of atoms is taken as given, the coefficients are differentiated."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.contexts import without_autocast

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
    right = (correlations * used).to(_work_dtype(correlations, orthogonal))[..., None]
    return _solve(_system(chosen.to(right), used, orthogonal), right, orthogonal)[..., 0].to(correlations)


def _work_dtype(x: Tensor, orthogonal: bool) -> torch.dtype:
    return torch.float64 if orthogonal else x.dtype  # atoms that lean together leave float32 few digits


def _system(chosen: Float[Tensor, "b k d"], used: Tensor, orthogonal: bool) -> Float[Tensor, "b k k"]:
    chosen = chosen * used[..., None]
    products = chosen @ chosen.mT + torch.diag_embed((~used).to(chosen))
    return products if orthogonal else products.tril()


def _solve(system: Tensor, right: Tensor, orthogonal: bool, transposed: bool = False) -> Tensor:
    if orthogonal:
        return torch.linalg.solve(system, right)
    return torch.linalg.solve_triangular(system.mT if transposed else system, right, upper=transposed)


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
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        x, atoms, *codes = ctx.saved_tensors
        to_x, to_atoms = gradients(x, atoms, SparseCodes(*codes), grad_values, ctx.orthogonal, ctx.needs_input_grad[1])
        return to_x, to_atoms, None, None


@without_autocast
def gradients(
    x: Float[Tensor, "b d"],
    atoms: Float[Tensor, "n d"],
    codes: SparseCodes,
    grad_values: Float[Tensor, "b k"],
    orthogonal: bool,
    to_atoms: bool,
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "n d"] | None]:
    """The gradients to `x` and `atoms` of something whose gradient to the coefficients is known."""
    values, indices = codes
    rows = max(1, _CHUNK_ELEMENTS // (indices.shape[1] * x.shape[1]))
    grad_x, grad_atoms = [], torch.zeros_like(atoms) if to_atoms else None
    for part in torch.arange(len(x), device=x.device).split(rows):
        chosen = atoms[indices[part]]
        to_x, to_chosen = gradients_on_path(x[part], chosen, values[part], grad_values[part], orthogonal)
        grad_x.append(to_x)
        if grad_atoms is not None:
            grad_atoms.index_add_(0, indices[part].flatten(), to_chosen.flatten(0, 1))
    return torch.cat(grad_x), grad_atoms


def gradients_on_path(
    x: Float[Tensor, "b d"],
    chosen: Float[Tensor, "b k d"],
    values: Float[Tensor, "b k"],
    grad: Float[Tensor, "b k"],
    orthogonal: bool,
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b k d"]]:
    """The gradients to activations and chosen atoms, given that to the coefficients.

    With `A v = b` as in `coefficients_on_path` and `A^T u = grad`, they are `u` to `b` and `-u v^T` to `A`.
    """
    used, dtype = values != 0, _work_dtype(x, orthogonal)
    atoms = chosen.to(dtype) * used[..., None]
    system = _system(atoms, used, orthogonal)
    u = _solve(system, grad.to(dtype)[..., None], orthogonal, transposed=True)[..., 0] * used
    to_x = (u[..., None, :] @ atoms)[..., 0, :]
    to_system = -u[..., :, None] * values.to(dtype)[..., None, :]
    if not orthogonal:
        to_system = to_system.tril()
    to_chosen = u[..., None] * x.to(dtype)[..., None, :] + (to_system + to_system.mT) @ atoms
    return to_x.to(x), to_chosen.to(x)
