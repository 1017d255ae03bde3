"""The non-negative view: signed codes as twice as many latents that are never below zero."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from itda_lens import ITDA, embedded
from tests.conftest import HOOK

N, D, K = 8, 4, 8


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def itda():
    """As many steps as atoms, so that some are chosen again with the other sign."""
    return ITDA.from_atoms(normalize(gaussian(N, D, seed=1), dim=-1), K, bias=gaussian(D, seed=2))


def same(x: Tensor, hook: object) -> Tensor:
    return x


@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("shape", [(D,), (30, D), (4, 5, D), (0, D)], ids=str)
def test_each_signed_code_is_split_over_an_atom_and_its_opposite(itda, shape, sparse, watch):
    x, signed, view = gaussian(*shape, seed=3), itda.encode(gaussian(*shape, seed=3)), itda.nonnegative_view()
    view.cfg.use_sparse_activations = sparse
    with view.hooks([("hook_sae_acts_pre", same)] if watch else []):
        acts = view.encode(x)
        assert_close(view(x), itda(x))
    assert acts.is_sparse == sparse
    assert_close(acts.to_dense(), torch.cat([signed.relu(), (-signed).relu()], dim=-1))
    assert torch.equal(view.W_dec, torch.cat([itda.W_dec, -itda.W_dec]))


def test_an_atom_chosen_with_both_signs_has_one_coefficient(itda):
    x = gaussian(200, D, seed=3)
    opposed = ITDA.from_atoms(itda.nonnegative_view().atoms.data, K, bias=itda.b_dec, nonnegative=True).encode(x)
    assert (opposed[:, :N] * opposed[:, N:]).any(), "pursuit over [D, -D] alone would use both"
    acts = itda.nonnegative_view().encode(x)
    assert not (acts[:, :N] * acts[:, N:]).any()


def test_a_dictionary_that_has_no_negative_codes_keeps_them(itda):
    x = gaussian(30, D, seed=3)
    nonnegative = ITDA.from_atoms(itda.atoms.data, K, bias=itda.b_dec, nonnegative=True)
    acts = nonnegative.nonnegative_view().encode(x)
    assert_close(acts[:, :N], nonnegative.encode(x))
    assert not acts[:, N:].any()


def test_a_model_runs_with_the_view_as_with_the_dictionary(model, built):
    tokens = model.to_tokens(embedded.dataset("heldout")["text"][0])
    view = built.nonnegative_view()
    with torch.no_grad():
        logits, cache = model.run_with_cache_with_saes(tokens, saes=view)
        assert_close(logits, model.run_with_saes(tokens, saes=built), rtol=1e-4, atol=1e-4)
    acts = cache[f"{HOOK}.hook_sae_acts_post"]
    assert acts.shape[-1] == 2 * built.cfg.d_sae
    assert (acts >= 0).all()
    assert view.provenance.prompt(built.cfg.d_sae + 3) == built.provenance.prompt(3)


def test_a_view_has_weights_of_its_own_and_is_not_saved(itda, tmp_path):
    view = itda.nonnegative_view()
    view.to(torch.bfloat16).W_dec.data.zero_()
    assert itda.W_dec.dtype == torch.float32
    assert_close(itda.W_dec.norm(dim=-1), torch.ones(N))
    with pytest.raises(NotImplementedError, match="save the ITDA itself"):
        view.save_model(tmp_path)
