"""What a user sets as torch's default dtype changes no dictionary."""

import pytest
import torch

from itda_lens import DictionaryBuilder, evals

SIZE = {"n_atoms": 48, "tokens": 600, "center_tokens": 100}


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def built(activations: torch.Tensor, orthogonal: bool):
    builder = DictionaryBuilder(32, 4, orthogonal=orthogonal, **SIZE)
    for part in activations.split(10):
        builder.update(part)
    builder.load_state_dict(builder.state_dict())
    return builder.to_itda()


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_build_gives_the_same_atoms_under_any_default_dtype(default_dtype, orthogonal):
    x = torch.randn(40, 20, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    itda = built(x, orthogonal)
    random = evals.random_directions(itda)
    torch.set_default_dtype(torch.float32)
    expected = built(x, orthogonal)
    assert itda.dtype == torch.float32
    assert torch.equal(itda.atoms, expected.atoms)
    assert torch.equal(itda.b_dec, expected.b_dec)
    assert torch.equal(random.atoms, evals.random_directions(expected).atoms)
    torch.set_default_dtype(default_dtype)
    assert torch.equal(itda(x), expected(x))
