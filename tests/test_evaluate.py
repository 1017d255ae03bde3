"""`evaluate` measures what SAELens's `run_evals` measures, wherever that can, and with fewer forward passes."""

import importlib
import io
from contextlib import contextmanager, redirect_stderr

import pytest
import torch
from datasets import Dataset
from sae_lens import ActivationsStore, HookedSAETransformer, TopKSAE, TopKSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from torch.nn.functional import cross_entropy
from transformer_lens import HookedTransformerConfig

from itda_lens import ITDA, BuildConfig, build, embedded, evals
from itda_lens.streams.massive import MASSIVE
from tests.conftest import HOOK

Z = "blocks.2.attn.hook_z"
BRIDGE_NAMES = {HOOK: "blocks.3.hook_out", Z: "blocks.2.attn.o.hook_in"}
SMALL = {"batch_size": 4, "n_batches": 2, "progress": False}
ROWS = 8
SCORES = {
    "ce_loss_score": ("model_performance_preservation", "ce_loss_score"),
    "kl_div_score": ("model_behavior_preservation", "kl_div_score"),
    "explained_variance": ("reconstruction_quality", "explained_variance"),
    "cosine": ("reconstruction_quality", "cossim"),
    "l0": ("sparsity", "l0"),
    "l1": ("sparsity", "l1"),
}


@pytest.fixture(scope="module")
def bridge():
    return SAETransformerBridge.boot_transformers(str(embedded.path(0)), device="cpu")


@pytest.fixture(scope="module")
def itdas(model):
    config = BuildConfig(k=8, n_atoms=64, tokens=1000, context_size=64, progress=False)
    return build(model, embedded.dataset("train"), [HOOK, Z], config)


@pytest.fixture(scope="module")
def of_one_head(model):
    config = BuildConfig(k=8, n_atoms=64, tokens=1000, context_size=64, hook_head_index=2, progress=False)
    return build(model, embedded.dataset("train"), Z, config)[Z]


@pytest.fixture(scope="module")
def rows(model):
    """Rows of held-out text, already cut into tokens, some with EOS inside."""
    ids = model.to_tokens(" ".join(embedded.dataset("heldout")[:60]["text"]), prepend_bos=False, truncate=False)[0]
    tokens = ids[: ROWS * 63].view(ROWS, 63).clone()
    tokens[::2, 20] = model.tokenizer.eos_token_id
    return torch.cat([torch.full((ROWS, 1), model.tokenizer.bos_token_id), tokens], dim=1)


@pytest.fixture(scope="module")
def data(rows):
    return Dataset.from_dict({"tokens": rows.tolist()})


def topk(itda: ITDA, *, d_sae: int = 80, **settings) -> TopKSAE:
    """A SAELens SAE of random directions at the same hook."""
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=itda.cfg.d_in, d_sae=d_sae, k=5, metadata=itda.with_k(8).cfg.metadata, **settings))
    sae.W_dec.data = torch.randn(sae.W_dec.shape) / 10
    sae.W_enc.data = sae.W_dec.data.T.clone()
    return sae


def named(sae, **metadata):
    """The same SAE with other metadata."""
    copy = sae.with_k(8) if isinstance(sae, ITDA) else topk(sae)
    for key, value in metadata.items():
        copy.cfg.metadata[key] = value
    return copy


def by_sae_lens(sae, model, data, exclude_special_tokens: bool = True) -> dict[str, float]:
    store = ActivationsStore.from_sae(model, sae, data, store_batch_size_prompts=4, total_tokens=1)
    config = EvalConfig(4, 2, True, True, 2, False, True, True, True)
    found, by_latent = run_evals(
        sae, store, model, ActivationScaler(), config, exclude_special_tokens=exclude_special_tokens
    )
    dead = sum(density == 0 for density in by_latent["feature_density"]) / sae.cfg.d_sae
    return {column: found[group][name] for column, (group, name) in SCORES.items()} | {"dead": dead}


def as_sae_lens(row, tolerance: float = 2e-5) -> object:
    return {column: pytest.approx(row[column], rel=tolerance, abs=tolerance) for column in [*SCORES, "dead"]}


@contextmanager
def counted(model):
    """Forward passes that reach the last module."""
    passes: list[int] = []
    handle = model.unembed.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    try:
        yield passes
    finally:
        handle.remove()


@pytest.mark.parametrize("hook", [HOOK, Z])
@pytest.mark.parametrize("at_once", [1, 100], ids=["row by row", "batch by batch"])
def test_every_figure_is_that_of_run_evals(model, itdas, data, hook, at_once, monkeypatch):
    widest = importlib.import_module("itda_lens.evals.evaluate")._WIDEST
    monkeypatch.setitem(widest, "cpu", 2048 * 64 * at_once)
    settings = {"reshape_activations": "hook_z"} if hook == Z else {"normalize_activations": "layer_norm"}
    sparse = itdas[hook].with_k(3)
    sparse.cfg.use_sparse_activations = True
    saes = {"itda": itdas[hook], "sparse": sparse, "topk": topk(itdas[hook], **settings)}
    table = evals.evaluate(saes, model, data, **SMALL)
    assert list(table.columns[:8]) == [*SCORES, "dead", "tokens_per_s"]
    for name, sae in saes.items():
        assert by_sae_lens(sae, model, data) == as_sae_lens(table.loc[name])


def test_special_tokens_count_where_they_are_asked_for(model, itdas, data):
    table = evals.evaluate(itdas[HOOK], model, data, exclude_special_tokens=False, **SMALL)
    assert by_sae_lens(itdas[HOOK], model, data, exclude_special_tokens=False) == as_sae_lens(table.loc["itda"])
    assert table.loc["itda", "ce_loss_score"] < evals.evaluate(itdas[HOOK], model, data, **SMALL).loc["itda", "l0"]


def test_one_head_is_measured_as_run_evals_does(model, of_one_head, data):
    saes = {"itda": of_one_head, "topk": topk(of_one_head)}
    table = evals.evaluate(saes, model, data, **SMALL)
    for name, sae in saes.items():  # a head matters little, so that the scores are quotients of small differences
        assert by_sae_lens(sae, model, data) == as_sae_lens(table.loc[name], tolerance=2e-4)


def test_a_bridge_is_measured_as_run_evals_does_and_by_the_other_kind_s_names_too(bridge, itdas, data):
    itda = named(itdas[HOOK], hook_name=BRIDGE_NAMES[HOOK])
    saes = {"itda": itda, "alias": itdas[HOOK], "topk": topk(itda)}
    table = evals.evaluate(saes, bridge, data, **SMALL)
    for name in ("itda", "topk"):
        assert by_sae_lens(saes[name], bridge, data) == as_sae_lens(table.loc[name])
    same = table.drop(columns="tokens_per_s")
    assert same.loc["alias"].equals(same.loc["itda"])


@pytest.mark.parametrize("kind", ["all heads", "one head"])
def test_heads_on_a_bridge_are_measured_as_on_the_other_kind_of_model(model, bridge, itdas, of_one_head, data, kind):
    itda = itdas[Z] if kind == "all heads" else of_one_head
    saes = {"itda": itda.with_k(8), "topk": topk(itda)}
    ours = evals.evaluate(saes, model, data, **SMALL)
    for name in (Z, BRIDGE_NAMES[Z]):
        for sae in saes.values():
            sae.cfg.metadata.hook_name = name
        theirs = evals.evaluate(saes, bridge, data, **SMALL)
        for sae in saes:
            assert list(theirs.loc[sae, [*SCORES]]) == pytest.approx(list(ours.loc[sae, [*SCORES]]), rel=2e-4)


def test_three_saes_of_one_hook_share_the_clean_and_the_zero_pass(model, itdas, data):
    saes = {f"k = {k}": itdas[HOOK].with_k(k) for k in (2, 4, 8)}
    with counted(model) as ours:
        evals.evaluate(saes, model, data, **SMALL)
    with counted(model) as theirs:
        for sae in saes.values():
            by_sae_lens(sae, model, data)
    assert ours == [4] * 5 * SMALL["n_batches"]
    assert len(theirs) == 9 * SMALL["n_batches"]  # besides passes that stop at the hook: three more for each batch


def test_saes_of_two_hooks_share_the_clean_pass_alone(model, itdas, data):
    with counted(model) as passes:
        evals.evaluate(itdas, model, data, **SMALL)
    assert len(passes) == 5 * SMALL["n_batches"]


def test_no_pass_holds_more_than_one_modest_tensor_of_logits(monkeypatch):
    vocabulary = 49_152
    cfg = HookedTransformerConfig(
        n_layers=1, d_model=16, n_ctx=128, d_head=8, n_heads=2, d_vocab=vocabulary, act_fn="gelu", seed=0
    )
    wide = HookedSAETransformer(cfg, tokenizer=embedded.model().tokenizer, move_to_device=False)
    assert wide.cfg.d_vocab == vocabulary
    metadata = {"hook_name": "blocks.0.hook_resid_post", "context_size": 128, "prepend_bos": True}
    itda = ITDA.from_atoms(torch.eye(16), k=2, metadata=metadata)
    data = Dataset.from_dict({"tokens": [list(range(1, 129))] * 8})
    with counted(wide) as passes:
        evals.evaluate(itda, wide, data, batch_size=8, n_batches=1, progress=False)
    assert sum(passes) == 3 * 8
    assert max(passes) * 128 * vocabulary * 4 <= 128 * 2**20


def test_saes_of_other_rows_are_measured_on_rows_of_their_own(model, itdas):
    heldout = embedded.dataset("heldout")
    saes = {
        "as built": itdas[HOOK],
        "longer": named(itdas[HOOK], context_size=100),
        "no BOS": named(itdas[HOOK], prepend_bos=False),
        "too": named(itdas[HOOK], model_name=None),
        "documents": named(itdas[HOOK], pack=False),
    }
    together = evals.evaluate(saes, model, heldout, **SMALL).drop(columns="tokens_per_s")
    assert list(together.index) == list(saes)
    for name, sae in saes.items():
        alone = evals.evaluate({name: sae}, model, heldout, **SMALL).drop(columns="tokens_per_s")
        assert together.loc[name].equals(alone.loc[name])
    assert together.loc["too"].equals(together.loc["as built"])
    assert together.drop_duplicates().shape[0] == 4


@torch.no_grad()
def test_padding_is_no_token(model, itdas):
    documents = [text[:90] for text in embedded.dataset("heldout")[:4]["text"]]
    itda = named(itdas[HOOK], pack=False)
    found = evals.evaluate(itda, model, Dataset.from_dict({"text": documents}), batch_size=4, n_batches=1)
    losses = {"clean": [], "with": [], "zeros": []}
    for document in documents:
        tokens = model.to_tokens(document)[:, :64]
        judged = tokens[0] != model.tokenizer.bos_token_id
        changes = {
            "clean": lambda x, hook: x,
            "with": lambda x, hook, judged=judged: itda(x).where(judged[None, :, None], x),
            "zeros": lambda x, hook: torch.zeros_like(x),
        }
        for name, change in changes.items():
            logits = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, change)])[0, :-1]
            losses[name].append(cross_entropy(logits, tokens[0, 1:], reduction="none")[judged[:-1]])
    ce = {name: torch.cat(parts).mean().item() for name, parts in losses.items()}
    score = (ce["zeros"] - ce["with"]) / (ce["zeros"] - ce["clean"])
    assert found.loc["itda", "ce_loss_score"] == pytest.approx(score, abs=1e-5)


def test_positions_outside_of_an_sae_s_slice_are_left_alone(model, itdas, data, rows):
    first, whole = named(itdas[HOOK], seqpos_slice=[1, 6]), itdas[HOOK]
    table = evals.evaluate({"first": first, "whole": whole}, model, data, **SMALL)
    judged = rows[:, 1:6] != model.tokenizer.bos_token_id
    with torch.no_grad():
        x = model.run_with_cache(rows, names_filter=[HOOK])[1][HOOK][:, 1:6][judged]
        l1 = whole.encode(x).abs().sum(dim=-1).mean().item()
    assert table.loc["first", "l1"] == pytest.approx(l1, rel=1e-4)
    assert table.loc["first", "ce_loss_score"] != table.loc["whole", "ce_loss_score"]


def test_massive_tokens_are_counted_and_left_out_of_the_ordinary_variance(itdas, rows, data):
    model, hook = embedded.model(0), "blocks.0.hook_resid_pre"
    token = int(rows[1, 40])
    model.W_E.data[token] *= 500
    itda = named(itdas[HOOK], hook_name=hook)
    found = evals.evaluate(itda, model, data, **SMALL).loc["itda"]
    with torch.no_grad():
        x = model.run_with_cache(rows, names_filter=[hook])[1][hook][rows != model.tokenizer.bos_token_id]
        ordinary = x[x.norm(dim=-1) <= MASSIVE * x.norm(dim=-1).median()]
        left = (ordinary - itda(ordinary)).square().sum() / (ordinary - ordinary.mean(dim=0)).square().sum()
    assert found["massive"] == (rows == token).sum() == len(x) - len(ordinary) > 0
    assert found["explained_variance_ordinary"] == pytest.approx(1 - left.item(), abs=1e-4)
    assert abs(found["explained_variance_ordinary"] - found["explained_variance"]) > 0.01


def test_a_tokenizer_that_pads_on_the_left_changes_nothing(itdas, data):
    model = embedded.model(0)
    model.tokenizer.pad_token, model.cfg.default_prepend_bos = model.tokenizer.bos_token, False
    right, left = [], []
    for side, found in (("right", right), ("left", left)):
        model.tokenizer.padding_side = side
        found.append(evals.evaluate(itdas[HOOK], model, data, **SMALL).drop(columns="tokens_per_s"))
    assert right[0].equals(left[0])


def test_less_text_than_asked_for_is_used_and_said(model, itdas):
    words = Dataset.from_dict({"text": [" ".join(embedded.dataset("heldout")[:40]["text"])[:900]]})
    with pytest.warns(UserWarning, match=r"the text gives (\d) rows of 64 tokens, where 80 were asked for"):
        table = evals.evaluate(itdas[HOOK], model, words, batch_size=8, n_batches=10, progress=False)
    assert table.notna().all(axis=None)


@pytest.mark.filterwarnings("ignore:the text gives")
def test_text_without_a_row_is_an_error(model, itdas):
    with pytest.raises(ValueError, match=r"token|row"):
        evals.evaluate(itdas[HOOK], model, Dataset.from_dict({"text": [""]}), **SMALL)


def test_the_table_so_far_is_shown_after_each_batch(model, itdas, data):
    seen = []
    table = evals.evaluate(itdas, model, data, on_batch=seen.append, **SMALL)
    assert [list(so_far.index) for so_far in seen] == [list(itdas)] * SMALL["n_batches"]
    assert seen[-1].equals(table)
    first = evals.evaluate(itdas, model, data, **SMALL | {"n_batches": 1}).drop(columns="tokens_per_s")
    assert seen[0].drop(columns="tokens_per_s").equals(first)


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_unless_it_is_turned_off(model, itdas, data, progress):
    with redirect_stderr(io.StringIO()) as printed:
        evals.evaluate(itdas[HOOK], model, data, **SMALL | {"progress": progress})
    assert ("8/8" in printed.getvalue()) == progress


@torch.no_grad()
def test_the_saes_are_left_as_they_were(model, itdas, data, rows):
    for sae in (itdas[Z].with_k(8), topk(itdas[Z], reshape_activations="hook_z")):
        evals.evaluate(sae, model, data, **SMALL)
        x = model.run_with_cache(rows, names_filter=[Z])[1][Z]
        assert sae(x).shape == x.shape
        assert not sae.hook_sae_acts_post._forward_hooks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_size": 129}, "context_size=129, which must be between 2 and the 128 positions"),
        ({"hook_name_out": "blocks.4.hook_resid_post"}, "is a transcoder, from 'blocks.3.hook_resid_post' to"),
        ({"hook_name": "blocks.3.attn.hook_z", "hook_head_index": 1}, "have width 24"),
    ],
)
def test_what_can_not_be_measured_is_named_before_the_text_is_read(model, itdas, change, message):
    with pytest.raises(ValueError, match=message):
        evals.evaluate(named(itdas[HOOK], **change), model, "no-such-file.txt")


def test_an_error_term_is_refused(model, itdas, data):
    sae = topk(itdas[HOOK])
    sae._use_error_term = True
    with pytest.raises(ValueError, match=r"set sae.use_error_term = False"):
        evals.evaluate(sae, model, data, **SMALL)


@pytest.mark.parametrize("setting", ["batch_size", "n_batches"])
def test_nothing_asked_for_is_an_error(model, itdas, data, setting):
    with pytest.raises(ValueError, match=f"{setting} must be at least 1, got 0"):
        evals.evaluate(itdas[HOOK], model, data, **SMALL | {setting: 0})
