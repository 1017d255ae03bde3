"""Orthogonal pursuit: against least squares step by step, scikit-learn, and what a fit must obey."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp_gram
from torch import Tensor
from torch.nn.functional import normalize

from itda_lens import ITDA, SparseCodes, matching_pursuit
from itda_lens.pursuit import gram_matrix, matching_pursuit_reference, pursue_orthogonal_eager

SHAPES = [(1, 4, 4, 1), (20, 16, 40, 8), (7, 64, 500, 20), (5, 24, 300, 24), (9, 8, 100, 6)]
OPTIONS = [{}, {"nonnegative": True}, {"tolerance": 0.4}, {"nonnegative": True, "tolerance": 0.6}]


def problem(b: int, d: int, n: int, seed: int = 0, leaning: float = 0.3) -> tuple[Tensor, Tensor]:
    """Activations, and atoms that lean to one side, so that fits of one depend on the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, d, generator=generator, dtype=torch.float64)
    atoms = torch.randn(n, d, generator=generator, dtype=torch.float64) + leaning
    return x, normalize(atoms, dim=-1)


def assert_same(codes: SparseCodes, expected: SparseCodes, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(codes.values, expected.values, rtol=tolerance, atol=tolerance, check_dtype=False)
    used = expected.values.abs() > tolerance
    assert torch.equal(codes.indices[used], expected.indices[used])


def eager(x: Tensor, atoms: Tensor, k: int, **options) -> SparseCodes:
    return pursue_orthogonal_eager(x @ atoms.T, atoms, k, energy=x.square().sum(-1), **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_path_fits_by_least_squares_at_each_step(shape, options):
    b, d, n, k = shape
    x, atoms = problem(b, d, n)
    expected = matching_pursuit_reference(x, atoms, k, orthogonal=True, **options)
    assert_same(matching_pursuit(x, atoms, k, orthogonal=True, **options), expected)
    assert_same(matching_pursuit(x, atoms, k, orthogonal=True, gram=gram_matrix(atoms), **options), expected)
    assert_same(eager(x, atoms, k, **options), expected)
    low = matching_pursuit(x.float(), atoms.float(), k, orthogonal=True, **options)
    assert_same(low, expected, 1e-4)


def test_atoms_that_16_bits_cannot_tell_apart_are_told_apart():
    x, atoms = problem(40, 32, 200)
    apart = torch.randn(200, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # Some twins lie as far apart as rounding a Gram row moves them; enough for neither to depend on the other.
    atoms = torch.cat([atoms, normalize(atoms + 8e-4 * apart, dim=-1)])
    assert_same(matching_pursuit(x, atoms, 12, orthogonal=True), eager(x, atoms, 12), 1e-6)


def test_coefficients_reach_zero_where_they_may_not_be_negative():
    x, atoms = problem(200, 8, 100)
    signed = matching_pursuit(x, atoms, 6, orthogonal=True)
    codes = matching_pursuit(x, atoms, 6, orthogonal=True, nonnegative=True)
    assert (signed.values < 0).any()
    assert (codes.values >= 0).all()
    first_zero = (codes.values == 0).int().argmax(-1)
    after = codes.values.gather(-1, (first_zero + 1).clamp(max=5)[:, None])
    assert (after > 0).any(), "no constraint was met on the way: a weak case"
    assert_same(codes, matching_pursuit_reference(x, atoms, 6, orthogonal=True, nonnegative=True))


def test_it_is_scikit_learns():
    x, atoms = problem(50, 32, 120, leaning=0)
    expected = orthogonal_mp_gram((atoms @ atoms.T).numpy(), (atoms @ x.T).numpy(), n_nonzero_coefs=12).T
    codes = matching_pursuit(x, atoms, 12, orthogonal=True)
    torch.testing.assert_close(codes.to_dense(120), torch.from_numpy(expected))


@settings(deadline=None, max_examples=40)
@example(b=8, d=2, n=90, k=14, seed=0, nonnegative=False)
@given(
    b=st.integers(1, 8),
    d=st.integers(2, 12),
    n=st.integers(1, 90),
    k=st.integers(1, 14),
    seed=st.integers(0, 10**6),
    nonnegative=st.booleans(),
)
def test_no_atom_twice_a_residual_at_right_angles_and_never_worse_with_more_steps(b, d, n, k, seed, nonnegative):
    x, atoms = problem(b, d, n, seed)
    before = x.norm(dim=-1)
    for steps in range(1, k + 1):
        codes = matching_pursuit(x, atoms, steps, orthogonal=True, nonnegative=nonnegative)
        residual = x - codes.decode(atoms)
        assert (residual.norm(dim=-1) <= before + 1e-9).all()
        before = residual.norm(dim=-1)
    for row, values, indices in zip(residual, codes.values, codes.indices, strict=True):
        chosen = indices[values != 0]
        assert len(chosen.unique()) == len(chosen)
        if len(chosen):
            assert (atoms[chosen] @ row).abs().max() < 1e-6


def test_dependent_atoms_are_passed_over():
    x, atoms = problem(30, 12, 60)
    atoms[10:20] = atoms[:10]
    atoms[20:30] = normalize(atoms[:10] + 1e-6 * atoms[30:40], dim=-1)
    atoms[50] = normalize(atoms[0] + atoms[1], dim=0)
    for dtype, path in ((torch.float64, matching_pursuit), (torch.float32, matching_pursuit)):
        codes = path(x.to(dtype), atoms.to(dtype), 20, orthogonal=True)
        assert codes.values.isfinite().all()
        assert codes.values.abs().max() < 1e3
        used = (codes.values != 0).sum(-1)
        assert (used <= 12).all()
        assert ((x - codes.decode(atoms)).norm(dim=-1) < 1e-2 * x.norm(dim=-1)).all()
    assert_same(eager(x, atoms, 20), matching_pursuit(x, atoms, 20, orthogonal=True), 1e-6)


def test_gradients_are_those_of_the_fit():
    x, atoms = problem(4, 5, 12, leaning=0)
    x, atoms = x.requires_grad_(), atoms.requires_grad_()
    for nonnegative in (False, True):

        def coefficients(x: Tensor, atoms: Tensor, nonnegative: bool = nonnegative) -> Tensor:
            codes = matching_pursuit(x, normalize(atoms, dim=-1), 3, orthogonal=True, nonnegative=nonnegative)
            return codes.values

        assert torch.autograd.gradcheck(coefficients, (x, atoms), eps=1e-7)


@pytest.mark.parametrize("nonnegative", [False, True])
def test_an_itda_and_its_view_encode_orthogonally(nonnegative, tmp_path):
    x, atoms = problem(40, 8, 30)
    itda = ITDA.from_atoms(atoms, 4, nonnegative=nonnegative).with_pursuit(orthogonal=True)
    expected = matching_pursuit(x, atoms, 4, orthogonal=True, nonnegative=nonnegative).to_dense(30)
    torch.testing.assert_close(itda.encode(x), expected)
    view = itda.nonnegative_view()
    halves = torch.cat([expected.clamp(min=0), (-expected).clamp(min=0)], dim=-1)
    torch.testing.assert_close(view.encode(x), halves)
    for sae, codes in ((itda, expected), (view, halves)):
        sae.hook_sae_acts_pre.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(sae.encode(x), codes)
    itda.save_model(tmp_path)
    assert ITDA.load_from_disk(tmp_path).cfg.orthogonal


def test_an_edited_setting_is_noticed(tmp_path):
    _, atoms = problem(1, 8, 30)
    ITDA.from_atoms(atoms, 4, orthogonal=True).save_model(tmp_path)
    config = tmp_path / "cfg.json"
    config.write_text(config.read_text().replace('"orthogonal": true', '"orthogonal": false'))
    with pytest.raises(ValueError, match="orthogonal is False, but this ITDA was saved with True"):
        ITDA.load_from_disk(tmp_path)
    with pytest.raises(ValueError, match="orthogonal must be true or false, got 1"):
        ITDA.from_atoms(atoms, 4, orthogonal=1)
    with pytest.raises(TypeError, match="sparsity: pursuit has the settings"):
        ITDA.from_atoms(atoms, 4).with_pursuit(sparsity=1)
