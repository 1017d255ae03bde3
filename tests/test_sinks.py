"""Tokens of a norm far beyond the others': they bend nothing, get atoms of their own, and the model does not suffer."""

import warnings

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from itda_lens import ITDA, BuildConfig, DictionaryBuilder, build, embedded, evals, interpret
from itda_lens.building import sequential
from itda_lens.streams import token_batches
from tests.test_building import D, K, fed, places, stream

HOOK = "blocks.3.hook_resid_post"
QUICK = {"k": 8, "n_atoms": 200, "tokens": 6000, "progress": False}


def with_sinks(x: Tensor, size: float = 100.0) -> tuple[Tensor, Tensor]:
    """The stream with a massive token at the beginning of each row, near one of two directions; and where they are."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(2, x.shape[-1], generator=generator), dim=-1)
    sinks, where = x.clone(), torch.zeros(x.shape[:2], dtype=torch.bool)
    sinks[:, 0] = size * x.norm(dim=-1).median() * directions[torch.arange(len(x)) % 2]
    sinks[:, 0] += 0.1 * x[:, 0]
    where[:, 0] = True
    return sinks, where


def sized() -> DictionaryBuilder:
    return DictionaryBuilder(D, K, n_atoms=150, tokens=700, center_tokens=100)


@pytest.mark.parametrize("masked", [False, True])
def test_massive_tokens_bend_neither_mean_nor_choice_and_get_the_first_atoms(masked):
    """Left in the stream or masked as special tokens are, they change nothing for the others."""
    x = stream()
    sinks, where = with_sinks(x)
    kept = {"mask": ~where, "unjudged": where} if masked else {}
    itda = fed(sized(), sinks, 7, **kept).to_itda()
    alone = fed(DictionaryBuilder(D, K, n_atoms=148, tokens=700, center_tokens=100), x, 7, mask=~where).to_itda()
    record = itda.cfg.metadata.itda_build
    assert record["sinks"] == 2
    assert record["tokens_judged"] == 700
    assert itda.cfg.d_sae == 150
    assert places(itda)[:2] == [(0, 0), (1, 0)]
    assert not any(position == 0 for _, position in places(itda)[2:])
    first = (~where).flatten().nonzero()[:100, 0] if masked else (~where).flatten()[:100].nonzero()[:, 0]
    torch.testing.assert_close(itda.b_dec.data, x.flatten(0, 1)[first].mean(dim=0))
    # A sink's atom may serve ordinary tokens too, so the choice is nearly the same, and not quite.
    assert len(set(places(itda)).intersection(places(alone))) > 0.7 * 148
    left = (itda(sinks) - sinks).norm(dim=-1)
    assert left[where].max() < 2 * x.norm(dim=-1).median()
    assert left[where].max() < 0.02 * sinks[where].norm(dim=-1).min()


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_sinks_are_chosen_however_the_stream_is_cut_and_by_the_plain_loop_too(cut, monkeypatch):
    sinks, where = with_sinks(stream())
    expected = fed(sized(), sinks, 40, mask=~where, unjudged=where).to_itda()
    assert places(fed(sized(), sinks, cut, mask=~where, unjudged=where).to_itda()) == places(expected)
    monkeypatch.setattr(sequential, "_is_compiled", lambda state: False)
    plain = fed(sized(), sinks, cut, mask=~where, unjudged=where).to_itda()
    assert places(plain) == places(expected)
    torch.testing.assert_close(plain.atoms.data, expected.atoms.data)


def test_a_builder_that_is_saved_or_goes_on_knows_its_sinks():
    sinks, where = with_sinks(stream())
    expected = fed(sized(), sinks, mask=~where, unjudged=where).to_itda()
    for cut in (3, 10):
        first = fed(sized(), sinks[:cut], mask=~where[:cut], unjudged=where[:cut])
        second = sized()
        second.load_state_dict(first.state_dict())
        itda = fed(second, sinks[cut:], mask=~where[cut:], unjudged=where[cut:]).to_itda()
        assert places(itda) == places(expected)
        assert itda.cfg.metadata.itda_build["sinks"] == 2
    more = DictionaryBuilder.from_itda(expected, n_atoms=200, tokens=700)
    fed(more, sinks, mask=~where, unjudged=where)
    again = more.to_itda()
    assert again.cfg.metadata.itda_build["sinks"] == 2, "they are held already"
    assert places(again)[:150] == places(expected)


@pytest.mark.parametrize("cut", [3, 10])
def test_a_builder_saved_by_an_earlier_version_goes_on(cut):
    """Its state knows of no sinks, and of what is held back not what was masked."""
    x = stream()
    state = fed(sized(), x[:cut]).state_dict()
    del state["sink"], state["scale"]
    state["held_back"] = state["held_back"][:3]
    builder = sized()
    builder.load_state_dict(state)
    assert places(fed(builder, x[cut:]).to_itda()) == places(fed(sized(), x).to_itda())


def test_a_dictionary_without_centering_takes_tokens_as_they_come():
    sinks, _ = with_sinks(stream())
    itda = fed(DictionaryBuilder(D, K, threshold=0.3, center=False), sinks).to_itda()
    assert itda.cfg.metadata.itda_build["sinks"] == 0
    assert itda.cfg.metadata.itda_build["typical_norm"] is None


def test_masks_of_any_dtype_are_masks():
    x = stream()
    mask = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.7
    expected = places(fed(DictionaryBuilder(D, K, threshold=0.2), x, mask=mask).to_itda())
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.float32, torch.float16):
        assert places(fed(DictionaryBuilder(D, K, threshold=0.2), x, mask=mask.to(dtype)).to_itda()) == expected
    with pytest.raises(ValueError, match=r"mask must hold 0 and 1, or False and True, but goes from 0.0 to 2.0"):
        DictionaryBuilder(D, K, threshold=0.2).update(x, mask=2.0 * mask)


@pytest.fixture(scope="module")
def sinking():
    """The embedded model with a sink: its BOS is much longer than it was, which layer norms undo."""
    model = embedded.model(0)
    model.W_E.data[0] *= 5000
    return model


@pytest.fixture(scope="module")
def built(sinking) -> ITDA:
    return build(sinking, embedded.dataset(), HOOK, BuildConfig(**QUICK))[HOOK]


@pytest.fixture(scope="module")
def tokens(sinking):
    ids = sinking.to_tokens(" ".join(embedded.dataset("heldout")[:20]["text"]), prepend_bos=False, truncate=False)
    return torch.cat([torch.zeros(6, 1, dtype=torch.int64), ids[0, : 6 * 63].view(6, 63)], dim=1)


def as_before_sinks_had_atoms(itda: ITDA) -> ITDA:
    """What an earlier version would have built: no atom for BOS, and no word of what norm is usual."""
    sinks = itda.cfg.metadata.itda_build["sinks"]
    older = itda.with_atoms(itda.atoms.data[sinks:], itda.provenance.select(range(sinks, itda.cfg.d_sae)))
    del older.cfg.metadata.itda_build["sinks"], older.cfg.metadata.itda_build["typical_norm"]
    return older


@torch.no_grad()
def harm(model, itda: ITDA, tokens: Tensor) -> tuple[float, float]:
    """CE loss scores where all tokens are replaced, and where BOS is not."""
    bos = tokens == 0

    def loss(replace) -> float:
        hooks = [(HOOK, replace)]
        losses = model.run_with_hooks(tokens, return_type="loss", loss_per_token=True, fwd_hooks=hooks)
        return losses[:, 1:].mean().item()

    clean, zero = loss(lambda x, hook: x), loss(lambda x, hook: x * bos[..., None])
    spared = loss(lambda x, hook: torch.where(bos[..., None], x, itda(x)))
    with model.saes(itda):
        losses = model(tokens, return_type="loss", loss_per_token=True)
    everything = losses[:, 1:].mean().item()
    assert everything == pytest.approx(loss(lambda x, hook: itda(x)), abs=1e-4)
    return (zero - everything) / (zero - clean), (zero - spared) / (zero - clean)


def test_the_main_call_leaves_a_sink_as_it_is(sinking, built, tokens):
    sinks = built.cfg.metadata.itda_build["sinks"]
    assert 1 <= sinks < 5, "BOS, at the beginning of a row and between documents"
    assert [built.provenance.tokens(i)[-1] for i in range(sinks)] == [0] * sinks
    assert built.provenance.tokens(0) == [0]
    x = sinking.run_with_cache(tokens, names_filter=HOOK)[1][HOOK].detach()
    assert x[:, 0].norm(dim=-1).min() > 50 * x[:, 1:].norm(dim=-1).median()
    everything, spared = harm(sinking, built, tokens)
    assert spared > 0.8
    assert everything == pytest.approx(spared, abs=0.005)
    assert (built.encode(x) != 0).sum(dim=-1).max() <= 8


def test_dictionaries_of_earlier_files_leave_a_sink_as_it_is(sinking, built, tokens, tmp_path):
    older = as_before_sinks_had_atoms(built)
    older.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    everything, spared = harm(sinking, loaded, tokens)
    assert everything == pytest.approx(spared, abs=0.005)
    x = sinking.run_with_cache(tokens, names_filter=HOOK)[1][HOOK].detach()
    codes = loaded.encode(x)
    assert (codes[:, 1:] != 0).sum(dim=-1).max() <= 8, "ordinary tokens are encoded as always"
    torch.testing.assert_close(codes[:, 1:], loaded.encode(x[:, 1:]))
    left = (loaded.decode(codes) - x).norm(dim=-1)
    assert left[:, 0].max() < x[:, 1:].norm(dim=-1).median()
    seen = []
    with sinking.saes(loaded), sinking.hooks(fwd_hooks=[(f"{HOOK}.hook_sae_acts_pre", lambda c, hook: seen.append(1))]):
        hooked = sinking.run_with_cache(tokens, names_filter=f"{HOOK}.hook_sae_output")[1][f"{HOOK}.hook_sae_output"]
    assert seen
    torch.testing.assert_close(hooked, loaded(x), rtol=1e-3, atol=1e-2)


def test_gradients_go_through_the_longer_code_of_a_sink(sinking, built, tokens):
    older = as_before_sinks_had_atoms(built)
    x = sinking.run_with_cache(tokens, names_filter=HOOK)[1][HOOK].detach().requires_grad_()
    older(x)[:, 0].sum().backward()
    assert x.grad[:, 0].abs().amax(dim=-1).min() > 0
    assert x.grad[:, 1:].abs().max() == 0


def test_the_baselines_keep_the_sinks(sinking, built, tokens):
    directions = evals.random_directions(built)
    activations = evals.random_activations(built, sinking, embedded.dataset())
    for baseline in (directions, activations):
        assert torch.equal(baseline.atoms[0], built.atoms[0])
        everything, spared = harm(sinking, baseline, tokens)
        assert everything == pytest.approx(spared, abs=0.01)


def test_random_activations_are_drawn_among_ordinary_tokens(sinking):
    [itda] = build(sinking, embedded.dataset(), [HOOK], BuildConfig(exclude_special_tokens=False, **QUICK)).values()
    record = itda.cfg.metadata.itda_build
    assert record["sinks"] >= 1
    rows = torch.eye(itda.cfg.d_in).repeat(1 + record["tokens_judged"] // itda.cfg.d_in, 1)
    of_all_tokens = itda.with_atoms(rows[: record["tokens_judged"]])  # as many atoms as tokens: all are drawn
    drawn = evals.random_activations(of_all_tokens, sinking, embedded.dataset()).atoms[record["sinks"] :]
    assert (drawn @ itda.atoms[0]).max() < 0.99, "BOS was not judged"


def test_evaluate_counts_massive_tokens_and_shows_the_variance_without_them(sinking, built):
    table = evals.evaluate(
        built,
        sinking,
        embedded.dataset("heldout"),
        batch_size=4,
        n_batches=1,
        exclude_special_tokens=False,
        progress=False,
    )
    row = table.loc["itda"]
    rows, _ = next(token_batches(sinking, embedded.dataset("heldout"), context_size=128, batch_size=4))
    assert row["massive"] == (rows == 0).sum() > 4
    assert row["explained_variance"] > 0.99 > row["explained_variance_ordinary"] > 0.5


def test_a_dictionary_that_is_carried_into_a_model_with_a_sink_leaves_it_as_it_is(sinking, tokens):
    plain = build(embedded.model(1), embedded.dataset(), HOOK, BuildConfig(**QUICK))[HOOK]
    assert plain.cfg.metadata.itda_build["sinks"] == 0
    carried = interpret.transfer(plain, sinking, HOOK)
    everything, spared = harm(sinking, carried, tokens)
    assert everything == pytest.approx(spared, abs=0.005)
    x = sinking.run_with_cache(tokens, names_filter=HOOK)[1][HOOK].detach()
    assert carried.b_dec.norm() < x[:, 1:].norm(dim=-1).median()


def test_ordinary_dictionaries_say_that_none_was_massive(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        itda = build(model, embedded.dataset(), HOOK, BuildConfig(**QUICK))[HOOK]
    record = SAEMetadata(**itda.cfg.metadata.to_dict()).itda_build
    assert record["sinks"] == 0
    x = model.run_with_cache(model.to_tokens("Return the number of items"), names_filter=HOOK)[1][HOOK]
    assert record["typical_norm"] == pytest.approx((x[0, 1:] - itda.b_dec).norm(dim=-1).median().item(), rel=0.3)
