"""One ITDA, whichever way it is run: alone, in either kind of model, from disk and under SAELens's evals."""

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, ActivationsStore, TopKSAE, TopKSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor
from torch.testing import assert_close

from itda_lens import ITDA, BuildConfig, build, embedded

RESID, HEADS = "blocks.3.hook_resid_post", "blocks.2.attn.hook_z"
BRIDGE_NAMES = {RESID: "blocks.3.hook_out", HEADS: "blocks.2.attn.o.hook_in"}
CONFIG = BuildConfig(k=8, n_atoms=64, tokens=1000, context_size=64, progress=False)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def bridge():
    """A new one for each test: where an SAE was attached once, `run_with_hooks` of a bridge does nothing any more."""
    return boot()


@pytest.fixture(scope="module")
def built(model):
    return build(model, embedded.dataset("train"), [RESID, HEADS], CONFIG)


@pytest.fixture(scope="module")
def built_on_bridge():
    return build(boot(), embedded.dataset("train"), [RESID, HEADS], CONFIG)


@pytest.fixture
def itda(built):
    return built[RESID]


@pytest.fixture(scope="module")
def tokens(model):
    """Rows of held-out text, each with BOS in front."""
    ids = model.to_tokens(" ".join(embedded.dataset("heldout")[:20]["text"]), prepend_bos=False, truncate=False)
    rows = ids[0, : 4 * 63].view(4, 63)
    return torch.cat([torch.full((4, 1), model.tokenizer.bos_token_id), rows], dim=1)


@pytest.fixture(scope="module")
def activations(model, tokens):
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=[RESID, HEADS])[1]


@pytest.fixture(params=["model", "bridge"])
def hooked(request, itda):
    """Each kind of model, with the ITDA under the name that this kind has for its hook."""
    if request.param == "model":
        return request.getfixturevalue("model"), itda
    return request.getfixturevalue("bridge"), renamed(itda, BRIDGE_NAMES[RESID])


def boot() -> SAETransformerBridge:
    return SAETransformerBridge.boot_transformers(str(embedded.path(0)), device="cpu")


def renamed(itda: ITDA, hook_name: str) -> ITDA:
    copy = itda.with_k(itda.cfg.k)
    copy.cfg.metadata.hook_name = hook_name
    return copy


def topk_of(itda: ITDA) -> TopKSAE:
    """A SAELens SAE of the same directions, at the same hook."""
    sae = TopKSAE(TopKSAEConfig(d_in=itda.cfg.d_in, d_sae=itda.cfg.d_sae, k=8, metadata=itda.cfg.metadata))
    sae.load_state_dict({"W_dec": itda.W_dec, "W_enc": itda.W_enc, "b_dec": itda.b_dec}, strict=False)
    return sae


@torch.no_grad()
def test_both_kinds_of_model_run_the_itda_as_it_runs_alone(hooked, activations, tokens):
    model, itda = hooked
    name = itda.cfg.metadata.hook_name
    alone = itda(activations[RESID])
    assert (alone - activations[RESID]).norm() > 0.1 * activations[RESID].norm()
    expected = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: alone)])
    logits, cache = model.run_with_cache_with_saes(tokens, saes=itda)
    assert_close(cache[f"{name}.hook_sae_input"], activations[RESID], **CLOSE)
    assert_close(cache[f"{name}.hook_sae_acts_post"], itda.encode(activations[RESID]), **CLOSE)
    assert_close(cache[f"{name}.hook_sae_recons"], alone, **CLOSE)
    assert_close(cache[f"{name}.hook_sae_output"], alone, **CLOSE)
    assert_close(logits, expected, **CLOSE)
    assert_close(model.run_with_saes(tokens, saes=itda), expected, **CLOSE)


@torch.no_grad()
def test_a_bridge_takes_the_other_model_s_name_of_the_hook_too(bridge, itda, tokens):
    by_alias = bridge.run_with_saes(tokens, saes=itda)
    assert_close(by_alias, bridge.run_with_saes(tokens, saes=renamed(itda, BRIDGE_NAMES[RESID])))
    assert not torch.allclose(by_alias, bridge(tokens), **CLOSE)


@torch.no_grad()
def test_a_reload_from_disk_gives_the_same_logits_bit_for_bit(model, itda, tokens, tmp_path):
    itda.save_model(tmp_path)
    logits = model.run_with_saes(tokens, saes=SAE.load_from_disk(tmp_path))
    assert torch.equal(logits, model.run_with_saes(tokens, saes=itda))


@torch.no_grad()
def test_itdas_of_heads_and_of_the_residual_stream_run_together(model, built, activations, tokens):
    """At `hook_z` the model has heads, and the ITDA one vector of all of them."""
    heads = activations[HEADS]
    alone = built[HEADS](heads)
    assert built[HEADS].cfg.d_in == heads.shape[-2] * heads.shape[-1]
    assert alone.shape == heads.shape
    logits, cache = model.run_with_cache_with_saes(tokens, saes=list(built.values()))
    assert_close(cache[f"{HEADS}.hook_sae_output"], alone, **CLOSE)
    hooks = [(HEADS, lambda x, hook: built[HEADS](x)), (RESID, lambda x, hook: built[RESID](x))]
    assert_close(logits, model.run_with_hooks(tokens, fwd_hooks=hooks), **CLOSE)


@torch.no_grad()
def test_evals_measure_what_is_measured_by_hand(hooked, tokens):
    model, itda = hooked
    name = itda.cfg.metadata.hook_name
    store = ActivationsStore.from_sae(model, itda, Dataset.from_dict({"tokens": tokens.tolist()}), total_tokens=1)
    everything = EvalConfig(
        batch_size_prompts=len(tokens),
        n_eval_reconstruction_batches=1,
        compute_kl=True,
        compute_ce_loss=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )
    metrics, by_latent = run_evals(itda, store, model, ActivationScaler(), everything)

    judged = tokens != model.tokenizer.bos_token_id
    x = model.run_with_cache(tokens, names_filter=[name])[1][name]
    recons, acts = itda(x), itda.encode(x)
    error = (x - recons)[judged].square().sum(dim=-1)
    variance = (x[judged] - x[judged].mean(dim=0)).square().sum(dim=-1)
    replace = [(name, lambda _, hook: recons.where(judged[..., None], x))]
    losses = model.run_with_hooks(tokens, fwd_hooks=replace, return_type="loss", loss_per_token=True)

    quality, sparsity = metrics["reconstruction_quality"], metrics["sparsity"]
    assert quality["mse"] == pytest.approx(error.mean().item(), rel=1e-4)
    assert quality["explained_variance"] == pytest.approx(1 - (error.mean() / variance.mean()).item(), abs=1e-4)
    assert sparsity["l0"] == pytest.approx((acts[judged] != 0).sum(dim=-1).float().mean().item())
    assert sparsity["l1"] == pytest.approx(acts[judged].abs().sum(dim=-1).mean().item(), rel=1e-4)
    assert by_latent["feature_density"] == pytest.approx((acts[judged] != 0).float().mean(dim=0).tolist())
    loss = metrics["model_performance_preservation"]["ce_loss_with_sae"]
    assert loss == pytest.approx(losses[judged[:, :-1]].mean().item(), rel=1e-4)
    assert 0 < metrics["model_behavior_preservation"]["kl_div_score"] < 1


@torch.no_grad()
def test_with_its_error_term_an_itda_leaves_the_logits_unchanged(hooked, tokens):
    model, itda = hooked
    logits, cache = model.run_with_cache_with_saes(tokens, saes=itda, use_error_term=True)
    assert cache[f"{itda.cfg.metadata.hook_name}.hook_sae_error"].norm() > 1
    assert_close(logits, model(tokens), **CLOSE)


def steer(acts: Tensor) -> Tensor:
    acts[:, 5, 17] += 3.0
    return acts


def ablate(acts: Tensor) -> Tensor:
    """Without the strongest atom of each activation from position 5 on."""
    later = acts[:, 5:]
    later.scatter_(-1, later.abs().argmax(dim=-1, keepdim=True), 0.0)
    return acts


@torch.no_grad()
@pytest.mark.parametrize("edit", [steer, ablate])
@pytest.mark.parametrize("use_error_term", [False, True])
@pytest.mark.parametrize("as_sae", [lambda itda: itda, topk_of], ids=["itda", "topk"])
def test_an_edit_of_the_codes_moves_the_model_as_it_would_for_any_sae(hooked, tokens, as_sae, use_error_term, edit):
    """By the edit times the atoms, from the reconstruction or, with the error term, from the activation itself."""
    model, itda = hooked
    sae, name, edits = as_sae(itda), itda.cfg.metadata.hook_name, []
    x = model.run_with_cache(tokens, names_filter=[name])[1][name]
    acts = sae.encode(x)
    output = (x if use_error_term else sae.decode(acts)) + (edit(acts.clone()) - acts) @ sae.W_dec
    expected = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda _, hook: output)])

    def edited(acts: Tensor, hook: object) -> Tensor:
        edits.append(hook)
        return edit(acts.clone())

    with model.saes(saes=sae, use_error_term=use_error_term):
        unedited = model(tokens)
        with model.hooks(fwd_hooks=[(f"{name}.hook_sae_acts_post", edited)]):
            logits, cache = model.run_with_cache(tokens)
    assert_close(cache[f"{name}.hook_sae_output"], output, **CLOSE)
    assert_close(logits, expected, **CLOSE)
    assert (logits - unedited)[:, 5:].abs().max() > 0.1
    assert len(edits) == 1


def test_gradients_flow_to_the_coefficients_and_through_them(hooked, tokens):
    model, itda = hooked
    name, held = itda.cfg.metadata.hook_name, {}

    def hold(value: Tensor, hook) -> None:
        value.retain_grad()
        held[hook.name] = value

    start, acts, output = (f"{name}.hook_sae_{point}" for point in ("input", "acts_post", "output"))
    with model.saes(saes=itda), model.hooks(fwd_hooks=[(point, hold) for point in (start, acts, output)]):
        model(tokens, return_type="loss").backward()
    assert held[output].grad.any()
    assert_close(held[acts].grad, held[output].grad @ itda.atoms.T)
    assert held[start].grad.any()


@pytest.mark.parametrize("use_error_term", [False, True])
def test_attribution_foretells_what_small_edits_and_ablations_do_to_a_logit(hooked, tokens, use_error_term):
    """By the gradient at the coefficients: for an edit in any direction, and for each weak atom taken away alone."""
    model, itda = hooked
    point, token, seen = f"{itda.cfg.metadata.hook_name}.hook_sae_acts_post", int(tokens[0, -1]), {}

    def keep(kind: str):
        return lambda value, hook: seen.update({kind: value.detach().clone()})

    def logit(codes: Tensor) -> Tensor:
        with torch.no_grad(), model.hooks(fwd_hooks=[(point, lambda acts, hook: codes)]):
            return model(tokens[:1].expand(len(codes), -1))[:, -1, token]

    with model.saes(saes=itda, use_error_term=use_error_term):
        with model.hooks(fwd_hooks=[(point, keep("acts"))], bwd_hooks=[(point, keep("grad"))]):
            plain = model(tokens[:1])[0, -1, token]
            plain.backward()
        acts, grad = seen["acts"], seen["grad"]
        edit = torch.randn(acts.shape, generator=torch.Generator().manual_seed(0))
        rise = (logit(acts + 1e-2 * edit) - logit(acts - 1e-2 * edit)) / 2e-2
        flat = acts.flatten()
        weakest = flat.abs().where(flat != 0, torch.inf).topk(8, largest=False).indices
        falls = plain.detach() - logit(flat.expand(8, -1).scatter(1, weakest[:, None], 0.0).view(8, *acts.shape[1:]))
    foretold = (grad * acts).flatten()[weakest]
    assert rise.item() == pytest.approx((grad * edit).sum().item(), rel=1e-2)
    assert (falls - foretold).norm() < 0.3 * falls.norm()


@pytest.mark.parametrize("hook", [RESID, HEADS])
def test_both_kinds_of_model_build_the_same_dictionary(built, built_on_bridge, hook):
    ours, theirs = built[hook], built_on_bridge[hook]
    assert theirs.cfg.metadata.hook_name == BRIDGE_NAMES[hook]
    assert ours.provenance.identities("position") == theirs.provenance.identities("position")
    assert ours.provenance.identities("text") == theirs.provenance.identities("text")
    assert_close(theirs.atoms, ours.atoms, **CLOSE)
    assert_close(theirs.b_dec, ours.b_dec, **CLOSE)


@torch.no_grad()
def test_a_dictionary_of_heads_built_on_a_bridge_runs_there_as_ours_does_here(
    model, bridge, built, built_on_bridge, tokens
):
    logits = bridge.run_with_saes(tokens, saes=built_on_bridge[HEADS])
    assert_close(logits, model.run_with_saes(tokens, saes=built[HEADS]), **CLOSE)
    assert not torch.allclose(logits, bridge(tokens), **CLOSE)
