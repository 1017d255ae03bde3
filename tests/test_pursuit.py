"""Every path of the pursuit against the printed algorithm, and what any matching pursuit must obey."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

import itda_lens.pursuit.solver as solver
from itda_lens import SparseCodes, matching_pursuit
from itda_lens.pursuit import (
    GramRows,
    decode_dense,
    gram_matrix,
    matching_pursuit_reference,
    pursue,
    pursue_correlations,
    pursue_eager,
)

SHAPES = [(1, 4, 4, 1), (7, 16, 40, 5), (33, 24, 300, 12), (5, 8, 3, 10), (64, 32, 129, 32)]
OPTIONS = [{}, {"nonnegative": True}, {"tolerance": 0.4}, {"nonnegative": True, "tolerance": 0.6}]


def problem(b: int, d: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, d, generator=generator, dtype=torch.float64)
    atoms = normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=-1)
    return x.to(dtype), atoms.to(dtype)


def residual_norms(x: Tensor, codes: SparseCodes, atoms: Tensor) -> Tensor:
    return (x.double() - codes.decode(atoms.double())).norm(dim=-1)


def assert_same(codes: SparseCodes, expected: SparseCodes, tolerance: float = 1e-9) -> None:
    above_rounding = expected.values.abs() > tolerance
    assert torch.equal(codes.indices[above_rounding], expected.indices[above_rounding])
    torch.testing.assert_close(codes.values, expected.values, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("b", "d", "n", "k"), SHAPES)
def test_every_path_is_the_printed_algorithm(options, b, d, n, k):
    x, atoms = problem(b, d, n)
    gram, energy = gram_matrix(atoms), x.square().sum(-1)
    expected = matching_pursuit_reference(x, atoms, k, **options)
    assert_same(matching_pursuit(x, atoms, k, **options), expected)
    assert_same(matching_pursuit(x, atoms, k, gram=gram, **options), expected)
    assert_same(pursue(x, atoms, gram, k, **options), expected)
    assert_same(pursue_eager(x @ atoms.T, gram, k, energy=energy, **options), expected)
    assert_same(pursue_eager(x @ atoms.T, GramRows(atoms), k, energy=energy, **options), expected)


def test_a_gram_matrix_may_have_room_on_the_right():
    x, atoms = problem(9, 16, 40)
    roomy = torch.full((40, 64), torch.nan, dtype=torch.float64)
    roomy[:, :40] = gram_matrix(atoms)
    expected = matching_pursuit_reference(x, atoms, 6)
    assert_same(pursue_correlations(x @ atoms.T, atoms, roomy, 6), expected)
    assert_same(pursue_eager(x @ atoms.T, roomy, 6), expected)


def test_float32_reaches_the_residual_of_float64():
    x, atoms = problem(256, 64, 512, torch.float32)
    exact = matching_pursuit_reference(x.double(), atoms.double(), 24)
    codes = matching_pursuit(x, atoms, 24)
    norms, expected = residual_norms(x, codes, atoms), residual_norms(x, exact, atoms)
    torch.testing.assert_close(norms, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x, atoms = problem(64, 32, 128)
    low, low_atoms = (x * 300).to(dtype), atoms.to(dtype)
    codes = matching_pursuit(low, low_atoms, 8)
    exact = matching_pursuit_reference(low.double(), low_atoms.double(), 8)
    assert codes.values.dtype == torch.float32
    assert (codes.indices == exact.indices).float().mean() > 0.999


@settings(deadline=None, max_examples=40)
@given(
    b=st.integers(1, 12), d=st.integers(2, 12), n=st.integers(1, 40), k=st.integers(1, 12), seed=st.integers(0, 10**6)
)
def test_residuals_shrink_scale_and_ignore_the_order_of_atoms(b, d, n, k, seed):
    x, atoms = problem(b, d, n, seed=seed)
    codes = matching_pursuit(x, atoms, k)
    norms = torch.stack([residual_norms(x, SparseCodes(codes.values[:, :i], codes.indices[:, :i]), atoms)
                         for i in range(1, k + 1)])  # fmt: skip
    assert (norms.diff(dim=0) <= 1e-9).all()
    assert (norms[0] < x.norm(dim=-1)).all()
    torch.testing.assert_close(
        norms[-1].square(), x.square().sum(-1) - codes.values.square().sum(-1), rtol=1e-6, atol=1e-9
    )
    dense = codes.to_dense(n)
    torch.testing.assert_close(matching_pursuit(-3 * x, atoms, k).to_dense(n), -3 * dense)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(matching_pursuit(x, atoms[order], k).to_dense(n), dense[:, order])


def test_one_step_is_the_nearest_line():
    x, atoms = problem(50, 8, 30)
    best = torch.nn.functional.cosine_similarity(x[:, None], atoms[None], dim=-1).abs().argmax(dim=-1)
    assert torch.equal(matching_pursuit(x, atoms, 1).indices[:, 0], best)


def test_orthonormal_atoms_give_the_largest_coordinates():
    x, _ = problem(20, 6, 6)
    codes = matching_pursuit(x, torch.eye(6, dtype=torch.float64), 6)
    torch.testing.assert_close(codes.to_dense(6), x)
    assert (codes.values.abs().diff(dim=-1) <= 0).all()


def test_unused_slots_hold_zeros():
    atoms = torch.eye(3)
    codes = matching_pursuit(torch.tensor([[0.0, 0.0, 5.0], [0.0, 0.0, 0.0]]), atoms, 3)
    assert codes.indices.tolist() == [[2, 0, 0], [0, 0, 0]]
    assert codes.values.tolist() == [[5.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("shape", [(8,), (0, 8), (3, 0, 8), (2, 3, 4, 8)])
def test_any_leading_shape(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    _, atoms = problem(1, 8, 20, torch.float32)
    codes = matching_pursuit(x, atoms, 3)
    assert codes.values.shape == codes.indices.shape == (*shape[:-1], 3)
    assert codes.decode(atoms).shape == x.shape
    assert codes.merge().values.shape == codes.values.shape
    assert codes.to_coo(20).shape == codes.to_dense(20).shape == (*shape[:-1], 20)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_row_touches_no_other(bad):
    x, atoms = problem(6, 8, 300)
    expected = matching_pursuit_reference(x, atoms, 4)
    x[2, 3] = bad
    for codes in (matching_pursuit(x, atoms, 4), pursue_eager(x @ atoms.T, gram_matrix(atoms), 4)):
        others = torch.tensor([0, 1, 3, 4, 5])
        assert_same(
            SparseCodes(codes.values[others], codes.indices[others]), SparseCodes(*(t[others] for t in expected))
        )
        assert codes.decode(atoms)[2].isnan().all()


def test_merge_decode_and_both_dense_forms_agree():
    x, atoms = problem(40, 6, 9)
    codes = matching_pursuit(x, atoms, 20)
    merged = codes.merge()
    assert (codes.indices.sort(dim=-1).values.diff(dim=-1) == 0).any(), "no atom was chosen twice: a weak case"
    for row_values, row in zip(merged.values, merged.indices, strict=True):
        used = row[row_values != 0].tolist()
        assert len(used) == len(set(used))
        assert (row_values[len(used) :] == 0).all()
    torch.testing.assert_close(merged.to_dense(9), codes.to_dense(9))
    torch.testing.assert_close(codes.to_coo(9).to_dense(), codes.to_dense(9))
    torch.testing.assert_close(codes.decode(atoms), codes.to_dense(9) @ atoms)
    first = [row.tolist().index(i) for row, i in zip(codes.indices, merged.indices[:, 1], strict=True)]
    assert (torch.tensor(first) >= 1).all(), "merging keeps the order of choice"


@pytest.mark.parametrize("options", [{}, {"nonnegative": True}])
def test_gradients_are_those_of_the_coefficients(options):
    x, atoms = problem(4, 5, 12)
    x, atoms = x.requires_grad_(), atoms.requires_grad_()

    def coefficients(x: Tensor, atoms: Tensor) -> Tensor:
        return matching_pursuit(x, normalize(atoms, dim=-1), 4, **options).values

    assert torch.autograd.gradcheck(coefficients, (x, atoms), eps=1e-7)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5], ids=["empty", "sparse", "dense"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 0), (3, 2)], ids=str)
def test_dense_codes_decode_as_the_product_does_with_its_gradients(shape, share):
    _, atoms = problem(1, 6, 200)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(*shape, 200, generator=generator, dtype=torch.float64)
    codes = codes * (torch.rand(codes.shape, generator=generator) < share)
    torch.testing.assert_close(decode_dense(codes, atoms), codes @ atoms)
    if codes.numel():
        inputs = (codes[..., :200].requires_grad_(), atoms[:, :2].clone().requires_grad_())
        assert torch.autograd.gradcheck(decode_dense, inputs)


def test_no_graph_is_kept_where_no_gradient_is_wanted():
    x, atoms = problem(4, 5, 12)
    assert not matching_pursuit(x, atoms, 3).values.requires_grad
    with torch.no_grad():
        assert not matching_pursuit(x.requires_grad_(), atoms, 3).values.requires_grad


def test_threads_do_not_disturb_each_other():
    x, atoms = problem(400, 16, 200)
    expected, found = matching_pursuit_reference(x, atoms, 8), []
    threads = [threading.Thread(target=lambda: found.append(matching_pursuit(x, atoms, 8))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for codes in found:
        assert_same(codes, expected)


def test_each_thread_takes_its_share_and_torch_keeps_its_own():
    x, atoms = problem(100, 16, 200)
    expected, before = matching_pursuit_reference(x, atoms, 8), torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 64):
            torch.set_num_threads(threads)
            assert_same(matching_pursuit(x, atoms, 8), expected)
            assert torch.get_num_threads() == threads
            assert_same(matching_pursuit(x[:1], atoms, 8), SparseCodes(*(t[:1] for t in expected)))
    finally:
        torch.set_num_threads(before)


def test_blocks_do_not_show(monkeypatch):
    x, atoms = problem(50, 8, 30)
    expected = matching_pursuit(x, atoms, 5)
    monkeypatch.setattr(solver, "block_rows", lambda n, device: 7)
    assert_same(matching_pursuit(x, atoms, 5), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "at least 1, got 0"),
        ({"tolerance": 1.0}, r"in \[0, 1\), got 1.0"),
        ({"x": torch.zeros(2, 7)}, "width 7, but the atoms have width 8"),
        ({"atoms": torch.zeros(0, 8)}, "atoms is empty"),
        ({"atoms": 2 * torch.eye(8)}, "atom 0 has length 2"),
        ({"gram": torch.eye(7)}, r"shape \(7, 7\), but 8 atoms need \(8, 8\)"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"x": torch.zeros(2, 8), "atoms": torch.eye(8), "k": 2} | change
    with pytest.raises(ValueError, match=message):
        matching_pursuit(**arguments)
