"""Evaluation beside baselines, and what an explanation says."""

import pandas as pd
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch.nn.functional import cosine_similarity, normalize

from itda_lens import ITDA, BuildConfig, build, embedded, evals, interpret
from itda_lens.streams import token_batches
from tests.conftest import HOOK

SMALL = {"batch_size": 8, "n_batches": 1}


@pytest.fixture(scope="module")
def heldout():
    return embedded.dataset("heldout")


@pytest.fixture(scope="module")
def table(model, built, heldout):
    baselines = {
        "random activations": evals.random_activations(built, model, embedded.dataset("train"), seed=1),
        "random directions": evals.random_directions(built, seed=1),
    }
    return evals.evaluate({"ITDA": built, **baselines}, model, heldout, **SMALL)


def test_atoms_chosen_by_loss_beat_both_baselines(table):
    for metric in ("ce_loss_score", "explained_variance"):
        assert table.loc["ITDA", metric] > table.loc["random activations", metric]
        assert table.loc["random activations", metric] > table.loc["random directions", metric] + 0.05
    assert (table["l0"] <= 8).all()
    assert table["ce_loss_score"].between(0, 1).all()


def test_random_activations_are_of_the_same_stream(model, built):
    atoms = evals.random_activations(built, model, embedded.dataset("train"), seed=3).atoms.data
    again = evals.random_activations(built, model, embedded.dataset("train"), seed=3).atoms.data
    other = evals.random_activations(built, model, embedded.dataset("train"), seed=4).atoms.data
    assert torch.equal(atoms, again)
    assert not torch.equal(atoms, other)
    tokens = built.provenance.sequences[int(built.provenance.row[128])]
    x = model.run_with_cache(tokens[None], names_filter=[HOOK])[1][HOOK][0, tokens != 0].detach() - built.b_dec.data
    everything = evals.random_activations(
        _of_size(built, built.cfg.metadata.itda_build["tokens_judged"]), model, embedded.dataset("train")
    ).atoms.data
    nearest = cosine_similarity(x[:, None], everything[None], dim=-1).max(dim=-1).values
    torch.testing.assert_close(nearest, torch.ones_like(nearest), rtol=0, atol=1e-4)


def _of_size(itda: ITDA, n: int) -> ITDA:
    rows = torch.randn(n, itda.cfg.d_in, generator=torch.Generator().manual_seed(0))
    return ITDA.from_atoms(normalize(rows, dim=-1), 8, bias=itda.b_dec, metadata=itda.cfg.metadata)


def test_any_sae_is_measured_on_the_same_tokens(model, built, heldout):
    saes = {
        "itda": built,
        "topk": TopKSAE(TopKSAEConfig(d_in=96, d_sae=200, k=5)),
        "standard": StandardSAE(StandardSAEConfig(d_in=96, d_sae=100)),
    }
    for sae in saes.values():
        sae.cfg.metadata.hook_name, sae.cfg.metadata.context_size, sae.cfg.metadata.prepend_bos = HOOK, 128, True
    together = evals.evaluate(saes, model, heldout, **SMALL)
    assert together.loc["topk", "l0"] <= 5
    alone = evals.evaluate(built, model, heldout, **SMALL)
    drop = ["tokens_per_s"]
    assert together.drop(columns=drop).loc["itda"].equals(alone.drop(columns=drop).loc["itda"])


def test_text_in_a_column_of_another_name(model, heldout):
    stories = heldout.rename_column("text", "story")
    config = BuildConfig(k=4, n_atoms=32, tokens=500, column="story", progress=False)
    itda = build(model, stories, HOOK, config)[HOOK]
    assert evals.random_activations(itda, model, stories).atoms.shape == (32, 96)
    column = evals.evaluate(itda, model, stories, column="story", **SMALL)
    drop = ["tokens_per_s"]
    assert column.drop(columns=drop).equals(evals.evaluate(itda, model, heldout, **SMALL).drop(columns=drop))


def test_dead_latents_are_those_that_never_fire(model, built, heldout):
    opposite = torch.cat([built.atoms.data, built.atoms.data])  # ties go to the first, so the second half is dead
    doubled = ITDA.from_atoms(opposite, 8, bias=built.b_dec, metadata=built.cfg.metadata)
    dead = evals.evaluate(built, model, heldout, **SMALL).loc["itda", "dead"]
    assert evals.evaluate(doubled, model, heldout, **SMALL).loc["itda", "dead"] == pytest.approx(0.5 + dead / 2)


def test_what_sae_lens_leaves_unchecked_is_refused(model, built, heldout):
    wrong = built.with_k(8)
    wrong.cfg.metadata.hook_name = "blocks.3.hook_resid_pots"
    with pytest.raises(ValueError, match=r"Near it: blocks.3.hook_resid_post"):
        evals.evaluate(wrong, model, heldout)
    wrong.cfg.metadata.hook_name, wrong.cfg.metadata.context_size = HOOK, None
    with pytest.raises(ValueError, match="lacks context_size"):
        evals.evaluate(wrong, model, heldout)
    bare = ITDA.from_atoms(built.atoms.data, 8)
    with pytest.raises(ValueError, match="not made by build"):
        evals.random_activations(bare, model, heldout)


def test_a_bridge_that_sae_lens_has_left_unhooked_is_measured_as_before(built, heldout):
    itda = built.with_k(8)
    itda.cfg.metadata.hook_name = "blocks.3.hook_out"
    bridge = SAETransformerBridge.boot_transformers(str(embedded.path(0)), device="cpu")
    before = evals.evaluate(itda, bridge, heldout, **SMALL).drop(columns="tokens_per_s")
    assert before.loc["itda", "ce_loss_score"] > 0.5
    bridge.run_with_saes(bridge.to_tokens("Return"), saes=[itda])
    after = evals.evaluate(itda, bridge, heldout, **SMALL).drop(columns="tokens_per_s")
    pd.testing.assert_frame_equal(after, before)


def test_an_explanation_is_the_code_in_words(model, built):
    prompt = "Return the number of items in the list"
    x = model.run_with_cache(model.to_tokens(prompt), names_filter=[HOOK])[1][HOOK][0].detach()
    explanations = interpret.explain(built, model, prompt, [2, -1], n_terms=8)
    assert [e.position for e in explanations] == [2, len(x) - 1]
    assert [e.token for e in explanations] == [" the", " list"]
    for e in explanations:
        dense = torch.zeros(built.cfg.d_sae)
        for term in e.terms:
            dense[term.atom] = term.coefficient
            assert (term.before, term.token) == built.provenance.shown(term.atom, model.tokenizer)
            assert (term.before.replace("<|endoftext|>", ""), term.token) == built.provenance.prompt(term.atom)
        torch.testing.assert_close(dense, built.encode(x[e.position]).detach(), rtol=1e-4, atol=1e-4)
        left = (x[e.position] - built(x[e.position])).square().sum() / (x[e.position] - built.b_dec).square().sum()
        assert e.relative_error == pytest.approx(float(left.detach()), rel=1e-4)
        sizes = [abs(term.coefficient) for term in e.terms]
        assert sizes == sorted(sizes, reverse=True)


def test_an_atom_explains_itself(model, built):
    i = max(range(0, 200, 9), key=lambda j: len(built.provenance.text(j)))
    text = built.provenance.text(i)
    [explanation] = interpret.explain(built, model, text, n_terms=1)
    assert explanation.terms[0].token == built.provenance.prompt(i)[1]


@pytest.mark.parametrize(
    ("prompt", "positions", "message"),
    [("Return", [5], "position 5 is not among the 2 tokens"), ("word " * 300, [-1], "takes 1 to 128")],
)
def test_bad_prompts_are_named(model, built, prompt, positions, message):
    with pytest.raises(ValueError, match=message):
        interpret.explain(built, model, prompt, positions)
    with pytest.raises(ValueError, match="have no prompts"):
        interpret.explain(evals.random_directions(built), model, "Return")


@pytest.mark.parametrize("settings", [{"orthogonal": True}, {"orthogonal": False}, {"nonnegative": True}], ids=str)
def test_a_baseline_encodes_as_the_dictionary_it_stands_beside(built, settings):
    itda = built.with_pursuit(**settings)
    baseline = evals.random_directions(itda)
    assert baseline.cfg.orthogonal == itda.cfg.orthogonal
    assert baseline.cfg.nonnegative == itda.cfg.nonnegative


@pytest.mark.parametrize(
    "settings",
    [
        {"apply_b_dec_to_input": False},
        {"normalize_activations": "layer_norm"},
        {"normalize_activations": "constant_norm_rescale", "use_sparse_activations": True},
        {"dtype": "float64", "orthogonal": False},
    ],
    ids=str,
)
def test_random_atoms_are_what_the_dictionary_would_pursue_and_all_its_settings_stay(model, settings):
    hook = "blocks.1.hook_resid_post"
    config = BuildConfig(k=4, n_atoms=20, tokens=200, progress=False)
    itda = build(model, embedded.dataset("heldout"), hook, config)[hook]
    itda = itda.with_atoms(itda.atoms, **settings)
    baselines = [
        evals.random_activations(itda, model, embedded.dataset("heldout"), seed=2),
        evals.random_directions(itda, seed=2),
    ]
    for baseline in baselines:
        assert baseline.cfg.to_dict() == itda.cfg.to_dict()
        assert torch.equal(baseline.b_dec, itda.b_dec)
        assert baseline.atoms.dtype == itda.dtype
    tokens = next(iter(token_batches(model, embedded.dataset("heldout"), context_size=128, batch_size=2)))[0]
    x = model.run_with_cache(tokens, names_filter=[hook])[1][hook].detach()[tokens != 0][:200]
    cosines = normalize(itda.process_sae_in(x).detach().float(), dim=-1) @ baselines[0].atoms.detach().float().T
    assert cosines.amax(dim=0).min() > 1 - 1e-4
    assert not torch.equal(baselines[0].atoms, baselines[1].atoms)


def test_several_seeds_and_hooks_are_drawn_in_one_pass(model):
    hooks = ["blocks.1.hook_resid_post", "blocks.3.hook_mlp_out"]
    config = BuildConfig(k=4, n_atoms=20, tokens=300, progress=False)
    itdas, text = build(model, embedded.dataset("heldout"), hooks, config), embedded.dataset("heldout")
    passes = []
    counter = model.embed.register_forward_hook(lambda *_: passes.append(1))
    together = evals.random_activations(itdas, model, text, seed=range(3), batch_size=1)
    counter.remove()
    assert len(passes) == 3  # rows of 128 tokens
    for hook, itda in itdas.items():
        apart = [evals.random_activations(itda, model, text, seed=seed) for seed in range(3)]
        for one, other in zip(together[hook], apart, strict=True):
            torch.testing.assert_close(one.atoms, other.atoms)
        [alone] = evals.random_activations(itda, model, text, seed=[2])
        assert torch.equal(alone.atoms, apart[2].atoms)
    assert set(evals.random_activations(itdas, model, text)) == set(hooks)
    itdas[hooks[1]].cfg.metadata.context_size = 64
    with pytest.raises(ValueError, match=r"blocks\.3\.hook_mlp_out on rows of .*'context_size': 64"):
        evals.random_activations(itdas, model, text)
    with pytest.raises(ValueError, match="1 dictionaries and 0 seeds"):
        evals.random_activations(itdas[hooks[0]], model, text, seed=[])


def test_baselines_keep_the_atoms_of_sinks(model, built):
    itda = built.with_k(8)
    itda.cfg.metadata.itda_build["sinks"] = 3
    assert built.cfg.metadata.itda_build.get("sinks", 0) == 0
    for baseline in (
        evals.random_directions(itda),
        evals.random_activations(itda, model, embedded.dataset("train"), seed=1),
    ):
        torch.testing.assert_close(baseline.atoms[:3], itda.atoms[:3])
        assert baseline.atoms.shape == itda.atoms.shape
        assert cosine_similarity(baseline.atoms[3:], itda.atoms[3:]).abs().median() < 0.9


def test_what_can_have_no_baseline_is_refused(model, built):
    with pytest.raises(ValueError, match="non-negative view"):
        evals.random_directions(built.nonnegative_view())
    judged = built.cfg.metadata.itda_build["tokens_judged"]
    with pytest.raises(ValueError, match=rf"6,001 atoms, but only {judged:,} tokens were judged"):
        evals.random_activations(_of_size(built, 6001), model, embedded.dataset("train"))


def test_metadata_that_says_nothing_of_bos_means_yes(model, built, heldout):
    errors = {}
    for prepend_bos in (None, True, False):
        itda = built.with_k(8)
        itda.cfg.metadata.prepend_bos = prepend_bos
        errors[prepend_bos] = interpret.transfer_table(itda, model, [HOOK], dataset=heldout, tokens=200)["error"].item()
    assert errors[None] == errors[True] != errors[False]
