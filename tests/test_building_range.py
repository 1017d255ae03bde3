"""Builders take activations of any size: a stream's scale changes no choice, and what float32 can't hold is named."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from itda_lens import DictionaryBuilder


def stream(seed: int = 0, b: int = 6, s: int = 20, d: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, s, d, generator=generator) + torch.randn(d, generator=generator)


def built(x: Tensor, **arguments) -> tuple[Tensor, list, Tensor]:
    builder = DictionaryBuilder(x.shape[-1], k=3, center_tokens=30, **arguments)
    for part in x.split(2):
        builder.update(part)
    itda = builder.to_itda()
    assert itda.provenance is not None
    return itda.atoms.detach(), itda.provenance.identities("position"), itda.b_dec.detach()


SELECTIONS = [
    {"threshold": 0.2},
    {"threshold": 0.2, "center": False},
    {"threshold": 0.1, "loss": "cosine"},
    {"threshold": 0.02, "loss": "paper", "center": False},
    {"n_atoms": 20, "tokens": 120},
]


@pytest.mark.parametrize("arguments", SELECTIONS, ids=str)
@settings(deadline=None, max_examples=8, derandomize=True)
@given(exponent=st.integers(-115, 112), seed=st.integers(0, 100))
def test_a_stream_of_any_scale_gives_the_same_dictionary(arguments, exponent, seed):
    x = stream(seed)
    atoms, places, bias = built(x, **arguments)
    scaled_atoms, scaled_places, scaled_bias = built(x * 2.0**exponent, **arguments)
    assert scaled_places == places
    assert torch.equal(scaled_atoms, atoms)
    assert torch.equal(scaled_bias, bias * 2.0**exponent)


@pytest.mark.parametrize("arguments", SELECTIONS[1:4:2], ids=str)
@settings(deadline=None, max_examples=15, derandomize=True)
@given(exponents=st.lists(st.integers(-115, 112), min_size=120, max_size=120))
def test_without_a_mean_each_token_may_have_its_own_scale(arguments, exponents):
    x = stream()
    factors = torch.tensor([2.0**e for e in exponents]).view(6, 20, 1)
    _, places, _ = built(x, **arguments)
    assert built(x * factors, **arguments)[1] == places


@settings(deadline=None, max_examples=20, derandomize=True)
@given(exponent=st.floats(36.1, 300), at=st.integers(0, 39), judged=st.booleans())
def test_what_float32_cannot_hold_is_named_and_changes_nothing(exponent, at, judged):
    builder = DictionaryBuilder(12, k=3, threshold=0.2, center=False)
    x = stream(b=2).double()
    before = builder.update(x)
    x.view(40, 12)[at, 3] = 10.0**exponent
    mask = torch.ones(2, 20, dtype=torch.bool)
    if not judged:
        mask.view(40)[at] = False
        assert builder.update(x, mask=mask).tokens == before.tokens + 39
        return
    with pytest.raises(ValueError, match=rf"number {at // 20} of this call\) at position {at % 20} has norm .* divide"):
        builder.update(x, mask=mask)
    assert builder.update(stream(b=2)).tokens == before.tokens + 40


@pytest.mark.parametrize("center", [False, True])
def test_text_is_never_dropped_without_a_word(center):
    builder = DictionaryBuilder(12, k=3, threshold=0.1, center=center, center_tokens=50)
    tokens = torch.arange(120).view(6, 20)
    builder.update(stream(), tokens)
    with pytest.raises(ValueError, match="gives no tokens, but those before it did: the text of all"):
        builder.update(stream(1))
    builder.update(stream(1), tokens)
    assert "tokens" in builder.to_itda().provenance.kinds
    late = DictionaryBuilder(12, k=3, threshold=0.1, center=False)
    late.update(stream())
    late.update(stream(1) * torch.randn(12), tokens)
    with pytest.warns(UserWarning, match="were never given, so the dictionary has no text"):
        assert late.to_itda().provenance.kinds == ("position",)
