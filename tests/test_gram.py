"""The Gram matrix: held while it is that of the atoms and fits, made by rows where it does not."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import itda_lens.pursuit.gram as gram_module
from itda_lens import ITDA, matching_pursuit
from itda_lens.pursuit import GramCache, GramRows, gram_limit, gram_matrix, set_gram_limit

ROW = 20 * 4  # bytes


@pytest.fixture
def limit():
    """Sets the limit, and has it told again."""
    gram_module._say_once.cache_clear()
    yield set_gram_limit
    set_gram_limit(None)
    gram_module._say_once.cache_clear()


@pytest.fixture
def atoms() -> Tensor:
    return normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_a_gram_cache_notices_every_edit(atoms):
    cache = GramCache()
    first = cache.get(atoms)
    assert cache.get(atoms) is first
    atoms.data[3] *= -1  # bumps no version
    second = cache.get(atoms)
    torch.testing.assert_close(second, gram_matrix(atoms))
    atoms.data[[0, 1]] = atoms.data[[1, 0]]
    assert cache.get(atoms) is not second
    held = cache.get(atoms.double())
    assert isinstance(held, Tensor)
    assert held.dtype == torch.float64


@pytest.mark.parametrize("kept", [0, 1, 3, 19])
def test_rows_on_demand_are_those_of_the_matrix_however_few_are_kept(atoms, limit, kept):
    limit(kept * ROW)
    rows, generator = GramRows(atoms), torch.Generator().manual_seed(1)
    for size in (1, 5, 2, 0, 7, 40, 3):
        chosen = torch.randint(20, (size,), generator=generator)
        torch.testing.assert_close(rows[chosen], gram_matrix(atoms)[chosen])
        assert len(rows._held) <= kept


def test_rows_that_are_kept_are_not_made_again(atoms, monkeypatch):
    rows, made = GramRows(atoms), []
    products = gram_module.inner_products
    monkeypatch.setattr(gram_module, "inner_products", lambda x, y: made.append(len(x)) or products(x, y))
    for _ in range(3):
        rows[torch.tensor([4, 4, 7])]
    rows[torch.tensor([7, 9])]
    assert made == [2, 1]


@pytest.mark.parametrize("settings", [{}, {"orthogonal": True}, {"nonnegative": True}])
def test_a_matrix_above_the_limit_is_not_made_and_changes_nothing(atoms, limit, settings):
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(2))
    expected = matching_pursuit(x, atoms, 5, **settings)
    limit(20 * ROW - 1)
    with pytest.warns(UserWarning, match="Gram matrix of 20 atoms .*set_gram_limit"):
        codes = matching_pursuit(x, atoms, 5, **settings)
    assert torch.equal(codes.indices, expected.indices)
    torch.testing.assert_close(codes.values, expected.values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matching_pursuit(x, atoms, 5, **settings)  # said once
        assert isinstance(GramCache().get(atoms), GramRows)


def test_an_itda_follows_the_limit_as_it_changes(atoms, limit):
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(2))
    itda = ITDA.from_atoms(atoms, 4)
    dense = itda.encode(x)
    assert isinstance(itda._gram.get(itda.W_dec), Tensor)
    limit(2 * ROW)
    with pytest.warns(UserWarning, match="more slowly"):
        torch.testing.assert_close(itda.encode(x), dense)
    assert isinstance(itda._gram.get(itda.W_dec), GramRows)
    limit(None)
    itda.encode(x)
    assert isinstance(itda._gram.get(itda.W_dec), Tensor)


def test_the_limit_is_checked(limit):
    assert gram_limit() == 4 * 2**30
    limit(12345)
    assert gram_limit() == 12345
    with pytest.raises(ValueError, match="can't be negative, got -1"):
        limit(-1)
