"""At every kind of hook point an ITDA is built, evaluated and hooked in, in both kinds of model."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch.nn.functional import kl_div, normalize
from torch.testing import assert_close

from itda_lens import ITDA, BuildConfig, build, embedded, evals, matching_pursuit

Z = "blocks.2.attn.hook_z"
BRIDGE_NAMES = {
    "blocks.3.hook_resid_pre": "blocks.3.hook_in",
    "blocks.3.hook_resid_mid": "blocks.3.ln2.hook_in",
    "blocks.3.hook_resid_post": "blocks.3.hook_out",
    "blocks.2.hook_mlp_out": "blocks.2.mlp.hook_out",
    "blocks.2.hook_attn_out": "blocks.2.attn.hook_out",
    Z: "blocks.2.attn.o.hook_in",
    "ln_final.hook_normalized": "ln_final.hook_normalized",
}
HEAD = 2
ONE_HEAD = f"{Z}, head {HEAD}"
PLACES = [*BRIDGE_NAMES, ONE_HEAD]
CONFIG = BuildConfig(k=8, n_atoms=64, tokens=1000, context_size=64, progress=False)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SMALL = {"batch_size": 4, "n_batches": 1}


def boot() -> SAETransformerBridge:
    return SAETransformerBridge.boot_transformers(str(embedded.path(0)), device="cpu")


def built_on(model) -> dict[str, ITDA]:
    itdas = build(model, embedded.dataset("train"), list(BRIDGE_NAMES), CONFIG)
    return itdas | {ONE_HEAD: build(model, embedded.dataset("train"), Z, replace(CONFIG, hook_head_index=HEAD))[Z]}


@pytest.fixture(scope="module")
def hosts(model):
    """Each kind of model with an ITDA for every place; no SAE is attached to this bridge, which would unhook it."""
    bridge = boot()
    return {"model": (model, built_on(model)), "bridge": (bridge, built_on(bridge))}


@pytest.fixture(scope="module")
def tokens(model):
    """Rows of held-out text, each with BOS in front."""
    ids = model.to_tokens(" ".join(embedded.dataset("heldout")[:20]["text"]), prepend_bos=False, truncate=False)
    rows = ids[0, : 4 * 63].view(4, 63)
    return torch.cat([torch.full((4, 1), model.tokenizer.bos_token_id), rows], dim=1)


def recons(itda: ITDA, x: torch.Tensor) -> torch.Tensor:
    """By the definition, of activations as a model has them; where the ITDA has a head, of that head alone."""
    if itda.cfg.metadata.hook_head_index is None:
        x = x.flatten(2)
        return (
            matching_pursuit(x - itda.b_dec, itda.atoms, itda.cfg.k, orthogonal=itda.cfg.orthogonal).decode(itda.atoms)
            + itda.b_dec
        )
    x = x.clone()
    head = x[:, :, HEAD] - itda.b_dec
    x[:, :, HEAD] = (
        matching_pursuit(head, itda.atoms, itda.cfg.k, orthogonal=itda.cfg.orthogonal).decode(itda.atoms) + itda.b_dec
    )
    return x


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["model", "bridge"])
def test_atoms_are_the_activations_of_their_prompts(hosts, kind, place):
    model, itda = hosts[kind][0], hosts[kind][1][place]
    hook = Z if place == ONE_HEAD else place
    name = BRIDGE_NAMES[hook] if kind == "bridge" else hook
    assert itda.cfg.metadata.hook_name == name
    assert itda.cfg.d_in == (24 if place == ONE_HEAD else 96)
    for i in range(0, 64, 9):
        x = model.run_with_cache(torch.tensor([itda.provenance.tokens(i)]), names_filter=[name])[1][name][0, -1]
        x = x[HEAD] if place == ONE_HEAD else x.flatten()
        assert_close(itda.atoms[i], normalize(x - itda.b_dec, dim=0), **CLOSE)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["model", "bridge"])
def test_evals_find_it_better_than_random_directions(hosts, kind, place):
    model, itda = hosts[kind][0], hosts[kind][1][place]
    saes = {"ITDA": itda, "random": evals.random_directions(itda)}
    table = evals.evaluate(saes, model, embedded.dataset("heldout"), **SMALL)
    assert table.notna().all(axis=None)
    for metric in ("kl_div_score", "explained_variance"):
        assert 1 - table.loc["random", metric] > 1.3 * (1 - table.loc["ITDA", metric]) > 0
    assert 6 < table.loc["ITDA", "l0"] <= 8


@torch.no_grad()
def test_evals_replace_one_head_alone(hosts, tokens):
    model, itda = hosts["model"][0], hosts["model"][1][ONE_HEAD]
    judged = tokens != model.tokenizer.bos_token_id
    plain = model(tokens).log_softmax(dim=-1)

    def divergence(hook) -> float:
        replaced = model.run_with_hooks(tokens, fwd_hooks=[(Z, hook)]).log_softmax(dim=-1)
        return kl_div(replaced[judged], plain[judged], log_target=True, reduction="batchmean").item()

    with_recons = divergence(lambda x, hook: recons(itda, x).where(judged[..., None, None], x))
    score = 1 - with_recons / divergence(lambda x, hook: x.index_fill(2, torch.tensor(HEAD), 0.0))
    table = evals.evaluate(itda, model, Dataset.from_dict({"tokens": tokens.tolist()}), **SMALL)
    assert table.loc["itda", "kl_div_score"] == pytest.approx(score, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("place", BRIDGE_NAMES)
@pytest.mark.parametrize("kind", ["model", "bridge"])
def test_hooked_in_it_replaces_the_activation(hosts, kind, place, tokens):
    model, itda = boot() if kind == "bridge" else hosts[kind][0], hosts[kind][1][place]
    by_hand = [(itda.cfg.metadata.hook_name, lambda x, hook: recons(itda, x).view_as(x))]
    expected = model.run_with_hooks(tokens, fwd_hooks=by_hand)
    logits = model.run_with_saes(tokens, saes=itda)
    assert_close(logits, expected, **CLOSE)
    assert (logits - model(tokens)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("blocks.3.hook_mlp_in", r"nothing passes through it: .* until model.set_use_hook_mlp_in\(True\)"),
        ("blocks.2.attn.hook_pattern", r"no vector for each token: its shape is \[1, 4, 3, 3\]"),
    ],
)
@pytest.mark.parametrize("kind", ["model", "bridge"])
def test_a_hook_point_without_a_vector_for_each_token_is_named(hosts, kind, hook, message):
    with pytest.raises(ValueError, match=message):
        build(hosts[kind][0], "no-such-dataset.txt", [Z, hook], CONFIG)


def test_a_hook_that_is_switched_on_is_built(hosts):
    model, hook = hosts["model"][0], "blocks.3.hook_mlp_in"
    model.set_use_hook_mlp_in(True)
    try:
        assert build(model, embedded.dataset("train"), hook, CONFIG)[hook].cfg.d_in == 96
    finally:
        model.set_use_hook_mlp_in(False)


@torch.no_grad()
def test_one_head_is_not_attached_to_all_heads(hosts, tokens):
    """SAELens attaches the SAE of one head to every head, without a word."""
    model, itda = hosts["model"][0], hosts["model"][1][ONE_HEAD]
    with pytest.raises(ValueError, match=r"of head 2 of blocks.2.attn.hook_z alone.* run_with_hooks"):
        model.run_with_saes(tokens, saes=itda)
    assert not model.acts_to_saes

    def one_head(x, hook):
        x[:, :, HEAD] = itda(x[:, :, HEAD])
        return x

    logits = model.run_with_hooks(tokens, fwd_hooks=[(Z, one_head)])
    assert_close(logits, model.run_with_hooks(tokens, fwd_hooks=[(Z, lambda x, hook: recons(itda, x))]), **CLOSE)
