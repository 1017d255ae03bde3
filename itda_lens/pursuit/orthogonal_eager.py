"""Orthogonal pursuit for any device, in plain torch; it needs no Gram matrix, and loses no precision to one."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from itda_lens.pursuit.broken import marks_broken_rows
from itda_lens.pursuit.codes import SparseCodes
from itda_lens.pursuit.least_squares import solve_nonnegative
from itda_lens.pursuit.product import inner_products

_RIVALS = 8
"""So many atoms, those of the largest correlations, are compared in float64."""
_DEPENDENT = 256
"""An atom with less than so many units of rounding outside the span of the chosen ones would get a code that cannot be
written down: of float32's seven digits, fewer than four would be of what it explains."""


@torch.no_grad()
@marks_broken_rows
def pursue_orthogonal_eager(
    correlations: Float[Tensor, "b n"],
    atoms: Float[Tensor, "n d"],
    k: int,
    *,
    x: Float[Tensor, "b d"] | None = None,
    nonnegative: bool = False,
    energy: Float[Tensor, " b"] | None = None,
    tolerance: float = 0.0,
) -> SparseCodes:
    """What `pursue` computes with `orthogonal`, one atom of all rows at a time: a product with the atoms for each.

    The chosen atoms are made orthonormal in float64, each one twice (Giraud, Langou & Rozloznik 2005), and the fit
    comes from their triangular factor. With `x` each step starts from the residual itself, which then never grows.
    """
    (b, n), eps = correlations.shape, torch.finfo(correlations.dtype).eps
    path = _Path(correlations, atoms, k, x, nonnegative)
    passed_over = torch.zeros_like(correlations, dtype=torch.bool)
    rows, left = torch.arange(b, device=correlations.device), correlations
    begin = path.residual_norm(left)
    going = begin > 0
    for _ in range(2 * k + _RIVALS):
        rest = path.residual_norm(left)
        magnitude = (left if nonnegative else left.abs()).masked_fill(passed_over, 0)
        rivals = magnitude.topk(min(_RIVALS, n), dim=-1).indices.sort(dim=-1).values  # the first of equal ones
        scores = path.scores(rivals, left).masked_fill(passed_over.gather(-1, rivals), 0)
        top, place = (scores if nonnegative else scores.abs()).max(dim=-1)
        noise = 8 * eps * rest if x is not None else 16 * eps * begin
        going &= (top > noise) & (rest > 4 * eps * begin) & (path.size < k)
        if not going.any():
            break
        chosen = rivals.gather(-1, place[:, None])[:, 0]
        passed_over[rows, chosen] |= going
        going = path.extend(chosen, going, _DEPENDENT * eps, eps)
        if energy is not None and tolerance > 0:
            going &= energy - path.explained > tolerance**2 * energy
        left = path.correlations()
    return SparseCodes(path.fit.to(correlations.dtype), path.indices.masked_fill(path.fit == 0, 0))


class _Path:
    """The atoms chosen so far of each row as `basis` and triangular `factor`, and the fit to them, all in float64."""

    def __init__(self, correlations: Tensor, atoms: Tensor, k: int, x: Tensor | None, nonnegative: bool):
        b, d, device = len(correlations), atoms.shape[1], correlations.device
        self._start, self._atoms, self._nonnegative = correlations, atoms, nonnegative
        self._x = None if x is None else x.double()
        self._rows = torch.arange(b, device=device)
        self.indices = torch.zeros(b, k, dtype=torch.int64, device=device)
        self.size = torch.zeros(b, dtype=torch.int64, device=device)
        self._basis = torch.zeros(b, k, d, dtype=torch.float64, device=device)
        self._factor = torch.eye(k, dtype=torch.float64, device=device).repeat(b, 1, 1)
        self._along = self._basis.new_zeros(b, k)
        self.fit = self._basis.new_zeros(b, k)
        self.explained = self._basis.new_zeros(b)
        """Squared norm."""
        self._decoded = self._basis.new_zeros(b, d)

    def residual_norm(self, left: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
        """The norm that is left; without activations the largest correlation stands for it."""
        return left.abs().amax(dim=-1).double() if self._x is None else (self._x - self._decoded).norm(dim=-1)

    def scores(self, which: Int64[Tensor, "b r"], left: Float[Tensor, "b n"]) -> Float[Tensor, "b r"]:
        """The correlations of some atoms, as exactly as they can be known."""
        if self._x is None:
            return left.gather(-1, which).double()
        return (self._atoms[which].double() @ (self._x - self._decoded)[..., None])[..., 0]

    def correlations(self) -> Float[Tensor, "b n"]:
        """The correlations of all atoms with what is left."""
        if self._x is None:
            return self._start - inner_products(self._decoded.to(self._start.dtype), self._atoms)
        return inner_products((self._x - self._decoded).to(self._start.dtype), self._atoms)

    def extend(self, chosen: Int64[Tensor, " b"], which: Bool[Tensor, " b"], dependent: float, eps: float) -> Tensor:
        """Fit to one more atom in some rows, and say which may go on. One that depends on the others is passed over.

        A row ends where rounding the codes would cost more than the atom explains.
        """
        atom, slot = self._atoms[chosen].double(), self.size.clamp(max=self.fit.shape[1] - 1)
        column, rest = torch.zeros_like(self.fit), atom
        for _ in range(2):
            more = (self._basis @ rest[..., None])[..., 0]
            rest, column = rest - (more[:, None] @ self._basis)[:, 0], column + more
        length = rest.norm(dim=-1)
        new = which & (length > dependent * atom.norm(dim=-1))
        passed_over = which & ~new
        length = length.where(new, 1)
        if self._x is None:
            share = (self._start[self._rows, chosen].double() - (column * self._along).sum(dim=-1)) / length
        else:
            share = (rest * self._x).sum(dim=-1) / length
        here = torch.arange(self.fit.shape[1], device=slot.device) == slot[:, None]
        along = torch.where(here, share[:, None], self._along)
        before = self._factor[self._rows, :, slot]
        column = torch.where(here, length[:, None], column)
        self._factor[self._rows, :, slot] = torch.where(new[:, None], column, before)
        fit, reached = self._fitted(torch.where(new[:, None], along, self._along))
        explained = (reached * along).sum(dim=-1)
        rounding = eps**2 / 12 * (fit.square() - self.fit.square()).sum(dim=-1)
        new &= explained - self.explained > rounding
        self._factor[self._rows, :, slot] = torch.where(new[:, None], column, before)
        self._basis[self._rows[new], slot[new]] = rest[new] / length[new, None]
        self.indices[self._rows[new], slot[new]] = chosen[new]
        self._along = torch.where(new[:, None], along, self._along)
        self.fit = torch.where(new[:, None], fit, self.fit)
        self.explained = torch.where(new, explained, self.explained)
        self._decoded = torch.where(new[:, None], (reached[:, None] @ self._basis)[:, 0], self._decoded)
        self.size += new
        return new | passed_over

    def _fitted(self, along: Float[Tensor, "b k"]) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b k"]]:
        """The codes, and where they lead along the basis."""
        fit = torch.linalg.solve_triangular(self._factor, along[..., None], upper=True)[..., 0]
        bent = (fit < 0).any(dim=-1) if self._nonnegative else fit.new_zeros(0, dtype=torch.bool)
        if not bent.any():
            return fit, along
        factor = self._factor[bent]
        system, right = factor.mT @ factor, (along[bent, None] @ factor)[:, 0]
        fit[bent] = _fit_nonnegative(system, right, self.fit[bent])
        return fit, (self._factor @ fit[..., None])[..., 0]


def _fit_nonnegative(
    system: Float[Tensor, "b k k"], right: Float[Tensor, "b k"], start: Float[Tensor, "b k"]
) -> Float[Tensor, "b k"]:
    fits = start.cpu()
    for fit, system_of, right_of in zip(fits.numpy(), system.cpu().numpy(), right.cpu().numpy(), strict=True):
        solve_nonnegative(system_of, right_of, fit, np.empty(len(fit), np.bool_), len(fit))
    return fits.to(start.device)
