"""The quality benchmark's scores against the same computed directly, and its opponents, on an embedded model."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from sae_lens.synthetic import SyntheticModel
from torch.nn.functional import normalize
from torch.testing import assert_close

from benchmarks.quality.opponents import CELLS
from benchmarks.quality.opponents import scores as scores_of
from benchmarks.quality.saes import Settings, train
from benchmarks.quality.scores import score
from benchmarks.quality.stability import Made, agreement, rows_of
from benchmarks.quality.stability import build as build_rows
from benchmarks.quality.subjects import Subject
from benchmarks.quality.summary import METRICS, on_the_grid, paired
from benchmarks.quality.synthetic import INDEPENDENT, found
from itda_lens import ITDA, embedded, evals
from itda_lens.streams import token_batches
from tests.conftest import HOOK

OTHER = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def subject(model):
    train, heldout = (
        next(token_batches(model, embedded.dataset(split), context_size=32, batch_size=rows))[0]
        for split, rows in (("train", 80), ("heldout", 40))
    )
    return Subject("embedded", model, (HOOK, OTHER), train[:70], train[70:], heldout)


@pytest.fixture
def sae(built):
    """A TopK SAE with a BOS-like bias and some latents that can't fire."""
    sae = TopKSAE(TopKSAEConfig(d_in=built.cfg.d_in, d_sae=built.cfg.d_sae, k=4))
    sae.load_state_dict(
        {"W_dec": built.W_dec, "W_enc": built.W_enc, "b_dec": built.b_dec, "b_enc": torch.zeros(built.cfg.d_sae)}
    )
    sae.b_enc.data[:64] = -1e6
    return sae


def directly(subject, hook, reconstruct):
    """Loss of each token after a judged one and KL at each judged one, with whole forward passes through hooks."""
    model, tokens = subject.model, subject.heldout
    judged = ~torch.isin(tokens, torch.tensor([model.tokenizer.bos_token_id, model.tokenizer.eos_token_id]))
    replace_at = [(hook, lambda x, hook: torch.where(judged[..., None], reconstruct(x), x))]
    logits = model.run_with_hooks(tokens, fwd_hooks=replace_at)
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    clean, new = (each.log_softmax(-1)[judged] for each in (model(tokens), logits))
    return float(losses[judged[:, :-1]].mean()), float((clean.exp() * (clean - new)).sum(-1).mean())


@torch.no_grad()
@pytest.mark.parametrize("hook", [HOOK, OTHER])
def test_scores_are_those_of_whole_forward_passes(subject, sae, hook):
    found = score(subject, hook, sae)
    ce, kl = directly(subject, hook, sae)
    (ce_clean, _), (ce_zero, _) = directly(subject, hook, lambda x: x), directly(subject, hook, torch.zeros_like)
    assert found.ce == pytest.approx(ce, abs=1e-4)
    assert found.kl == pytest.approx(kl, rel=1e-3)
    assert found.ce_score == pytest.approx((ce - ce_zero) / (ce_clean - ce_zero), abs=1e-4)
    assert 0 < found.ce_score < 1


@torch.no_grad()
def test_identity_loses_nothing_and_zeros_everything(subject):
    whole, nothing = (score(subject, HOOK, each) for each in (lambda x: x, torch.zeros_like))
    assert whole.ce_score == pytest.approx(1, abs=1e-5)
    assert whole.kl == pytest.approx(0, abs=1e-6)
    assert whole.explained_variance == 1
    assert nothing.ce_score == pytest.approx(0, abs=1e-6)
    assert nothing.kl > 0.5
    mean = score(subject, HOOK, lambda x: subject.activations(HOOK, subject.heldout).mean(0).expand_as(x))
    assert mean.explained_variance == pytest.approx(0, abs=1e-5)
    assert whole.l0 is None


@torch.no_grad()
def test_sparsity_is_counted_on_the_judged_tokens(subject, sae, built):
    x = subject.activations(HOOK, subject.heldout)
    acts = sae.encode(x)
    found = score(subject, HOOK, sae)
    assert found.tokens == len(x) == int((subject.heldout != subject.model.tokenizer.bos_token_id).sum())
    assert found.l0 == pytest.approx(float((acts > 0).sum() / len(x)))
    assert found.dead == pytest.approx(float((acts.sum(0) == 0).float().mean()))
    assert found.dead >= 64 / built.cfg.d_sae
    assert found.negative == 0
    signed = score(subject, HOOK, built)
    codes = built.encode(x)
    assert signed.negative == pytest.approx(float((codes < 0).sum() / (codes != 0).sum()))
    assert signed.negative > 0


@torch.no_grad()
def test_splits_are_kept_apart(subject, sae):
    heldout, validation = (score(subject, HOOK, sae, split) for split in ("heldout", "validation"))
    assert validation.tokens == int(subject.mask(subject.validation).sum())
    assert heldout.ce_clean != validation.ce_clean


SMALL = Settings(n=64, k=4, draws=20_000, batch=128, lr=3e-3, dead_window=50)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "standard", "matching_pursuit"])
def test_sae_lens_trains_opponents_that_reload_as_they_were_judged(subject, tmp_path, architecture):
    settings = replace(SMALL, architecture=architecture, l1=1.0 if architecture == "standard" else 0.0)
    x, validation = (subject.activations(HOOK, rows) for rows in (subject.train, subject.validation))
    record = train(subject.name, HOOK, x, validation, settings, tmp_path / settings.name)
    curve = [point["explained_variance"] for point in record["curve"]]
    assert curve[-1] > max(curve[0], 0.3)
    assert record["validation_explained_variance"] == pytest.approx(curve[-1], abs=0.05)
    sae = SAE.load_from_disk(tmp_path / settings.name)
    found = score(subject, HOOK, sae, "validation")
    assert found.explained_variance == pytest.approx(record["validation_explained_variance"], abs=1e-5)
    assert record["draws"] == pytest.approx(SMALL.draws, abs=SMALL.batch)


def test_the_decoder_under_pursuit_keeps_directions_and_bias(subject, sae):
    found = scores_of(subject, HOOK, sae, k=4)
    plain, orthogonal = found["plain"], found["orthogonal"]
    assert orthogonal["explained_variance"] > plain["explained_variance"]
    assert plain["l0"] <= 4
    # An encoder tied to the decoder chooses all its atoms at once; pursuit looks again after each.
    assert plain["explained_variance"] > found["sae"]["explained_variance"]


@torch.no_grad()
def test_agreement_looks_through_order_and_sign(subject, built):
    x = subject.activations(HOOK, subject.heldout)[:500]
    order = torch.randperm(built.cfg.d_sae, generator=torch.Generator().manual_seed(0))
    same = ITDA.from_atoms(-built.atoms[order], built.cfg.k, bias=built.b_dec, orthogonal=built.cfg.orthogonal)
    other = evals.random_directions(built, seed=1)
    places = torch.arange(2 * built.cfg.d_sae).view(-1, 2)
    one = Made(built, places)
    assert agreement(one, Made(same, places[order]), x) == pytest.approx((1, 1, 1, 1), abs=1e-5)
    unlike = agreement(one, Made(other, places + 1), x)
    assert unlike.common == unlike.near == 0
    assert unlike.mcc < 0.6
    assert unlike.codes < 0.2


def test_a_dictionary_is_the_same_however_its_rows_are_cut(subject):
    rows = torch.arange(60)
    whole, cut = (build_rows(subject, HOOK, rows, n_atoms=128, batch=batch) for batch in (60, 7))
    assert torch.equal(whole.places, cut.places)
    x, mask = rows_of(subject, HOOK, rows)
    row, position = whole.places.T
    assert mask[row, position].all()
    assert_close(whole.sae.atoms, normalize(x[row, position] - whole.sae.b_dec, dim=-1))


def test_synthetic_features_are_found_by_themselves_alone():
    world = SyntheticModel(replace(INDEPENDENT, num_features=64, hidden_dim=64, seed=0, bias=False))
    features = world.feature_dict.feature_vectors.detach()
    k = 12
    truth, other = (
        found(ITDA.from_atoms(atoms, k, orthogonal=True, nonnegative=True), world)
        for atoms in (features, normalize(torch.randn(64, 64, generator=torch.Generator().manual_seed(7)), dim=-1))
    )
    assert truth["mcc"] == pytest.approx(1, abs=1e-5)
    assert truth["uniqueness"] == 1
    assert truth["f1"] > other["f1"] + 0.2
    assert truth["explained_variance"] > other["explained_variance"]
    assert other["mcc"] < 0.5
    assert truth["true_l0"] == other["true_l0"]


def test_the_grid_takes_the_rate_that_validation_chose_and_the_mean_of_seeds():
    (model, hook), metrics = CELLS[0], dict.fromkeys(METRICS, 0.5)
    common = {"model": model, "hook": hook, "n": 1024, "k": 8, "seconds": 1.0, "tokens": 4_100_000} | metrics
    trained = [
        {"lr": 1e-3, "validation": 0.8, "seed": 0, "ce_score": 0.99},
        {"lr": 2e-3, "validation": 0.9, "seed": 0, "ce_score": 0.97},
        {"lr": 2e-3, "validation": 0.85, "seed": 1, "ce_score": 0.95},
        {"lr": 2e-3, "validation": 0.9, "seed": 0, "ce_score": 0.1, "k": 16},
        {"lr": 1e-2, "validation": 1.0, "seed": 0, "ce_score": 0.1, "tokens": 410_000},
    ]
    built = [{"seed": 0, "ce_score": 0.98}, {"seed": 1, "ce_score": 0.96}, {"seed": 0, "ce_score": 0.2, "hook": "x"}]
    rows = [common | {"method": "topk", "pursuit": "sae"} | each for each in trained]
    rows += [common | {"method": "ours", "pursuit": "orthogonal"} | each for each in built]
    grid = on_the_grid(pd.DataFrame(rows))
    assert grid.loc["topk", "sae"].ce_score.tolist() == pytest.approx([0.96])
    assert grid.loc["ours", "orthogonal"].ce_score.tolist() == pytest.approx([0.97])
    assert paired(grid, ("ours", "orthogonal"), ("topk", "sae"))["mean"] == pytest.approx(0.01)
