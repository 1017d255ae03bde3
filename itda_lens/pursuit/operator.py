"""Pursuit as one operator of torch: what `torch.compile`, `torch.export`, `torch.vmap` and `torch.func.grad` see of it.

Called where tensors hold no numbers that could be looked at; everywhere else pursuit runs as it is.
"""

from typing import Any

import torch
from torch import Tensor

from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.contexts import without_autocast
from itda_lens.pursuit.gradient import gradients_on_path
from itda_lens.pursuit.gram import GramCache


def pursue_transformed(
    x: Tensor, atoms: Tensor, k: int, cache: GramCache | None, nonnegative: bool, orthogonal: bool, tolerance: float
) -> SparseCodes:
    """`matching_pursuit` of rows, as one operator."""
    number = 0 if cache is None else cache.number
    return SparseCodes(*_Pursuit.apply(x, atoms, k, number, nonnegative, orthogonal, float(tolerance)))  # type: ignore[misc]


class _Pursuit(torch.autograd.Function):
    """The operator with its gradients: those that an operator itself can have are not for `torch.func.grad`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor, atoms: Tensor, k: int, cache: int, nonnegative: bool, orthogonal: bool, tolerance: float
    ) -> tuple[Tensor, Tensor]:
        return _pursue(x, atoms, k, cache, nonnegative, orthogonal, tolerance)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, atoms, _, _, _, ctx.orthogonal, _ = inputs
        ctx.save_for_backward(x, atoms, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, atoms, values, indices = ctx.saved_tensors
        to_x, to_chosen = gradients_on_path(x, atoms.to(x.dtype)[indices], values, grad, ctx.orthogonal)
        to_atoms = torch.zeros_like(atoms).index_add(0, indices.flatten(), to_chosen.flatten(0, 1).to(atoms.dtype))
        return to_x, to_atoms, None, None, None, None, None


@torch.library.custom_op("itda_lens::matching_pursuit", mutates_args=())
def _pursue(
    x: Tensor, atoms: Tensor, k: int, cache: int, nonnegative: bool, orthogonal: bool, tolerance: float
) -> tuple[Tensor, Tensor]:
    from itda_lens.pursuit.api import solve

    values, indices = solve(x, atoms, k, GramCache.numbered(cache), nonnegative, orthogonal, tolerance)
    return values, indices


@_pursue.register_fake
def _(x: Tensor, atoms: Tensor, k: int, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)  # not `len`, which would fix it
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


@_pursue.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], x: Tensor, atoms: Tensor, *settings: Any) -> tuple[Any, Any]:
    if in_dims[1] is not None:
        return _one_by_one(_pursue, info, in_dims, x, atoms, *settings)
    rows = x.movedim(in_dims[0], 0)
    values, indices = _pursue(rows.flatten(0, 1), atoms, *settings)
    return (values.unflatten(0, rows.shape[:2]), indices.unflatten(0, rows.shape[:2])), (0, 0)


def _one_by_one(operator: Any, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    parts = [
        operator(*(a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return tuple(map(torch.stack, zip(*parts, strict=True))), (0, 0)
