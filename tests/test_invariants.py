"""A pursuit never leaves more than the step before, nor than float64 does: in every path, over hard dictionaries.

Scaled down from `python -m benchmarks.attack pursuit`, whose dictionaries and reference these are.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.attack.dictionaries import KINDS, activations
from benchmarks.attack.pursuit import LIMIT, PATHS, RISE, _left, reference
from itda_lens import ITDA, SparseCodes, matching_pursuit
from itda_lens.pursuit import GramRows, gram_matrix, pursue_further, pursue_on_gpu

N, D, K = 64, 16, 20
KIND = st.sampled_from(sorted(KINDS))
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SETTINGS = [{}, {"nonnegative": True}, {"orthogonal": True}, {"orthogonal": True, "nonnegative": True}]


def problem(kind: str, seed: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    atoms = KINDS[kind](N, D, generator)
    return activations(atoms, rows, generator), atoms


@pytest.mark.parametrize("path", ["Gram matrix", "Gram rows on demand", "ITDA", "ITDA with a hook"])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
@settings(deadline=None, max_examples=6, derandomize=True)
@given(kind=KIND, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 10**6))
def test_no_step_leaves_more_than_the_one_before_or_than_the_reference(path, options, kind, dtype, seed):
    if path.startswith("ITDA") and ("norms" in kind or dtype in LIMIT):
        dtype = torch.float32  # an ITDA brings other atoms to unit length, and has codes in the dtype of its atoms
        kind = "cone, cosine 0.98" if "norms" in kind else kind
    x, atoms = (t.to(dtype) for t in problem(kind, seed))
    expected = reference(x.double().numpy(), atoms.double().numpy(), K, dtype=dtype, **options)
    left = _left(x, atoms, K, options, PATHS[path])
    for steps, norms in left.items():
        assert (norms - expected[steps] < LIMIT.get(dtype, 1e-3)).all(), steps
    assert (torch.stack(list(left.values())).diff(dim=0) <= RISE).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cone_is_spanned_as_well_as_float64_spans_it(dtype):
    """Once 89 times the norm in float32, and 42 times in bfloat16, whose atoms are not exactly of unit length."""
    generator = torch.Generator().manual_seed(0)
    atoms = KINDS["cone, cosine 0.98"](512, 64, generator).to(dtype)
    x = torch.randn(40, 64, generator=generator).to(dtype)
    codes = matching_pursuit(x, atoms, 64, orthogonal=True)
    left = (x.double() - codes.decode(atoms.double())).norm(dim=-1) / x.double().norm(dim=-1)
    assert (left < 1e-3).all()


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_atoms_that_are_not_exactly_unit_are_pursued_as_they_are(options, dtype):
    x, atoms = (t.to(dtype) for t in problem("norms within 1.7 %", 11))
    expected = reference(x.double().numpy(), atoms.double().numpy(), 6, dtype=dtype, **options)
    for path in ("Gram matrix", "Gram rows on demand"):
        for steps, norms in _left(x, atoms, 6, options, PATHS[path]).items():
            torch.testing.assert_close(norms, expected[steps], atol=1e-6, rtol=0)


def test_a_step_that_float32_cannot_decide_is_decided_as_in_float64():
    generator = torch.Generator().manual_seed(1)
    for cosine in (0.9, 0.98, 0.9999):
        atoms = KINDS[f"cone, cosine {cosine}"](300, 48, generator).float()
        x = torch.randn(150, 48, generator=generator)
        exact = matching_pursuit(x.double(), atoms.double(), 24, orthogonal=True)
        for gram in (gram_matrix(atoms), GramRows(atoms)):
            assert torch.equal(matching_pursuit(x, atoms, 24, gram=gram, orthogonal=True).indices, exact.indices)


@pytest.mark.parametrize("kind", ["random", "cone, cosine 0.98", "clusters, 0.001 apart", "norms within 1.7 %"])
def test_pursuit_that_goes_on_leaves_less(kind):
    x, atoms = (t.float() for t in problem(kind, 5, rows=12))
    codes = matching_pursuit(x, atoms, 3)
    further = pursue_further(x, codes, atoms, torch.ones(12, dtype=torch.bool), 0.05)
    before, after = ((x - c.decode(atoms)).norm(dim=-1) for c in (codes, further))
    assert (after <= before + 1e-5).all()
    assert (after < 0.06).all()


@pytest.mark.parametrize("options", [{}, {"nonnegative": True}], ids=str)
@pytest.mark.parametrize("kind", ["norms within 1.7 %", "cone, norms within 1.7 %", "antipodal pairs"])
@pytest.mark.parametrize("on_chip", [True, False])
def test_the_triton_kernels_keep_to_it(kind, options, on_chip, monkeypatch):
    pytest.importorskip("triton")
    from itda_lens.pursuit import on_gpu

    if not on_chip:
        monkeypatch.setattr(on_gpu, "ON_CHIP", 0)
        monkeypatch.setattr(on_gpu, "TILE", 32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, atoms = (t.float().to(device) for t in problem(kind, 7, rows=3))
    codes = pursue_on_gpu(x @ atoms.T, gram_matrix(atoms), 8, energy=x.square().sum(-1), **options)
    expected = reference(x.cpu().double().numpy(), atoms.cpu().double().numpy(), 8, dtype=torch.float32, **options)
    for steps in range(1, 9):
        part = SparseCodes(codes.values[:, :steps], codes.indices[:, :steps])
        left = (x - part.decode(atoms)).norm(dim=-1) / x.norm(dim=-1)
        torch.testing.assert_close(left.cpu().double(), expected[steps], atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@settings(deadline=None, max_examples=8, derandomize=True)
@given(exponent=st.integers(-100, 120), seed=st.integers(0, 10**6), rows_on_demand=st.booleans())
def test_activations_of_any_size_have_the_same_codes_to_scale(options, exponent, seed, rows_on_demand):
    x, atoms = (t.float() for t in problem("random", seed))
    gram = GramRows(atoms) if rows_on_demand else gram_matrix(atoms)
    scales = torch.tensor([1.0, 2.0**exponent, 2.0**-20, 1.0, 2.0**exponent, 2.0**50])
    expected = matching_pursuit(x, atoms, 6, gram=gram, **options)
    codes = matching_pursuit(x * scales[:, None], atoms, 6, gram=gram, **options)
    assert torch.equal(codes.indices, expected.indices)
    assert torch.equal(codes.values, expected.values * scales[:, None])


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_broken_rows_are_marked_alike_in_every_path(options, bad):
    x, atoms = (t.float() for t in problem("random", 3))
    x[[1, 4], [3, 0]] = bad
    x[4, 5] = -bad
    hooked = ITDA.from_atoms(atoms, 5, **options)
    hooked.hook_sae_acts_pre.add_hook(lambda correlations, hook: None)
    for tolerance in (0.0, 0.3):
        for gram in (None, gram_matrix(atoms), GramRows(atoms)):
            codes = matching_pursuit(x, atoms, 5, gram=gram, tolerance=tolerance, **options)
            assert codes.values.isnan().nonzero().tolist() == [[1, 0], [4, 0]]
            assert (codes.indices[[1, 4]] == 0).all()
    for dense in (ITDA.from_atoms(atoms, 5, **options).encode(x), hooked.encode(x)):
        assert dense.isnan().nonzero().tolist() == [[1, 0], [4, 0]]


def test_gradients_of_dependent_atoms_are_those_of_float64():
    x, atoms = problem("cone, cosine 0.999", 2)
    found = []
    for dtype in (torch.float32, torch.float64):
        points = x.float().to(dtype).requires_grad_()
        codes = matching_pursuit(points, normalize(atoms, dim=-1).float().to(dtype), 6, orthogonal=True)
        codes.values.square().sum().backward()
        found.append(points.grad)
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-3, atol=1e-3 * float(found[1].norm()))
