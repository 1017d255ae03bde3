"""SAEBench on real dictionaries, offline; `make test-tools` runs this in an environment that has it."""

import importlib
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from sae_lens import TopKSAE, TopKSAEConfig

from itda_lens import embedded, evals
from tests.conftest import HOOK

pytest.importorskip("sae_bench", reason="SAEBench is not installed: `make test-tools` has an environment with it")

PROBES = {"dataset_names": ["77_second-derivative"], "ks": [1, 5]}
SMALL_CORE = {"n_eval_reconstruction_batches": 2, "n_eval_sparsity_variance_batches": 2}
PROFESSIONS = {
    0: "accountant",
    1: "architect",
    2: "attorney",
    6: "dentist",
    9: "filmmaker",
    13: "nurse",
    21: "professor",
}
SMALL_PROBES = {
    "train_set_size": 80,
    "test_set_size": 40,
    "context_length": 32,
    "n_values": [2, 10],
    "dataset_names": ["LabHC/bias_in_bios_class_set1"],
    "column1_vals_lookup": {"LabHC/bias_in_bios_class_set1": [("professor", "nurse")]},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    embedded.dataset("heldout").to_json(folder / "heldout.jsonl")
    return folder


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("eval_results")


@pytest.fixture
def biographies(monkeypatch):
    """What SAEBench would fetch from the hub, in the same columns."""
    stories = embedded.dataset("heldout")["text"]

    def rows(first: int) -> Dataset:
        return Dataset.from_list(
            [
                {
                    "hard_text": f"{('He', 'She')[gender]} is a {word} and a {word}. {stories[first + i][:80]}",
                    "profession": profession,
                    "gender": gender,
                }
                for profession, word in PROFESSIONS.items()
                for gender in (0, 1)
                for i in range(45)
            ]
        )

    splits = DatasetDict({"train": rows(0), "test": rows(45)})
    for module in ("sae_bench_utils.dataset_utils", "evals.scr_and_tpp.dataset_creation"):
        monkeypatch.setattr(importlib.import_module(f"sae_bench.{module}"), "load_dataset", lambda *_, **__: splits)


def run(saes, names, output, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return evals.saebench(saes, names, model=embedded.path(0), output=output, **options)


def values(table, **where):
    for column, value in where.items():
        table = table[table[column] == value]
    return table.set_index("metric")["value"]


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*_eval_results.json")}


def test_core_agrees_with_our_own_evaluation_and_puts_chance_below(model, built, text, output):
    saes = {"itda": built, "chance": evals.random_directions(built)}
    table = run(saes, ["core"], output, settings={"core": {"dataset": str(text), **SMALL_CORE}})
    ours = evals.evaluate(built, model, embedded.dataset("heldout")).loc["itda"]
    itda, chance = values(table, sae="itda"), values(table, sae="chance")
    assert itda["ce_loss_score"] == pytest.approx(ours["ce_loss_score"], abs=0.02)
    assert itda["l0"] == pytest.approx(ours["l0"], abs=0.1)
    assert itda["cossim"] == pytest.approx(ours["cosine"], abs=0.02)
    for metric in ("ce_loss_score", "explained_variance", "cossim"):
        assert itda[metric] > chance[metric] + 0.02
    assert table["seed"].isna().all()


@pytest.mark.parametrize("sparse", [False, True])
def test_results_are_in_sae_bench_s_own_schema(built, text, tmp_path, sparse):
    from sae_bench.evals.core.eval_output import CoreEvalOutput

    itda = built.with_k(8)
    itda.cfg.use_sparse_activations = sparse
    run({"mine": itda}, ["core"], tmp_path, settings={"core": {"dataset": str(text), **SMALL_CORE}})
    [path] = files(tmp_path)
    content = json.loads(path.read_text())
    output = CoreEvalOutput(**content)
    assert output.eval_type_id == "core"
    assert output.sae_lens_release_id.startswith("mine_")
    assert output.sae_cfg_dict["architecture"] == "itda"
    assert len(content["eval_result_details"]) == built.cfg.d_sae


def test_sae_probes_run_with_several_seeds_and_only_once(built, output):
    settings = {"sae_probes": PROBES}
    topk = TopKSAE(TopKSAEConfig(d_in=96, d_sae=64, k=4))
    topk.cfg.metadata.hook_name = HOOK
    table = run({"itda": built, "topk": topk}, ["sae_probes"], output, seeds=[1, 2], settings=settings)
    counts = table[table["metric"].str.startswith("sae_top_")].groupby(["sae", "seed"]).size()
    assert counts.to_dict() == {(sae, seed): 6 for sae in ("itda", "topk") for seed in (1, 2)}
    first, second = (values(table, sae="itda", seed=seed) for seed in (1, 2))
    assert not first.equals(second), "another seed is another split"
    assert first["llm_test_auc"] > 0.9
    assert first["sae_top_5_test_auc"] > 0.7

    before = files(output)
    again = run({"itda": built, "topk": topk}, ["sae_probes"], output, seeds=[1, 2], settings=settings)
    assert again.equals(table)
    assert files(output) == before
    run({"itda": built.with_k(4)}, ["sae_probes"], output, seeds=[1], settings=settings)
    assert len(files(output)) == len(before) + 1, "another dictionary of the same name is measured anew"


def test_sparse_probing_finds_what_is_there(built, output, biographies):
    small = {
        "dataset_names": ["LabHC/bias_in_bios_class_set1"],
        "probe_train_set_size": 80,
        "probe_test_set_size": 40,
        "context_length": 32,
    }
    table = run(built, ["sparse_probing"], output, seeds=[1], settings={"sparse_probing": small})
    found = values(table)
    assert found["llm_test_accuracy"] > 0.9
    assert found["sae_test_accuracy"] > 0.9
    assert found["sae_top_5_test_accuracy"] >= found["sae_top_1_test_accuracy"] > 0.8


@pytest.mark.parametrize(("name", "latents"), [("scr", 256), ("tpp", 512)])
def test_scr_and_tpp_warn_and_tpp_gets_the_non_negative_view(built, tmp_path, biographies, name, latents):
    with pytest.warns(UserWarning, match=rf"{name} does not rank SAEs reliably.*2605\.18229"):
        table = evals.saebench(
            built, [name], model=embedded.path(0), output=tmp_path, seeds=[1], settings={name: SMALL_PROBES}
        )
    assert values(table).filter(regex="threshold_10$").notna().all()
    [path] = files(tmp_path)
    assert json.loads(path.read_text())["sae_cfg_dict"]["d_sae"] == latents


def test_meta_structure_reads_the_atoms(built, output):
    table = run(built, ["meta_structure"], output, seeds=[1], settings={"meta_structure": {"train_steps": 30}})
    assert 0 < values(table)["decoder_fraction_variance_explained"] < 1


def test_the_dictionary_and_the_process_are_left_as_they_were(built, output, text):
    cfg, here, atoms = built.cfg.to_dict(), Path.cwd(), built.atoms.data.clone()
    settings = {"core": {"dataset": str(text), **SMALL_CORE}}
    run(built, ["core"], output, dtype="bfloat16", settings=settings)
    assert built.cfg.to_dict() == cfg
    assert torch.equal(built.atoms.data, atoms)
    assert Path.cwd() == here
    assert torch.is_grad_enabled()


def test_an_eval_that_ends_without_a_result_says_why(built, output):
    with pytest.raises(RuntimeError, match=r"core has ended without a result for 'itda'.*nowhere"):
        run(built, ["core"], output, settings={"core": {"dataset": str(output / "nowhere")}})


def test_bad_arguments_are_named_before_any_work(built, output, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    nameless = built.with_k(8)
    nameless.cfg.metadata.hook_name = None
    for message, call in {
        "'cores' is no eval that is known here: core,": lambda: run(built, ["cores"], output),
        "name at least one of each": lambda: run(built, ["sae_probes"], output, seeds=[]),
        "sae_probes has no setting 'k'. It has .*ks": lambda: run(
            built, ["core"], output, settings={"sae_probes": {"k": 3}}
        ),
        "OPENAI_API_KEY": lambda: run(built, ["autointerp"], output),
        "lacks hook_name": lambda: run(nameless, ["core"], output),
        "'itda' belongs to the model 'itda-embedded-seed0', but was given .*seed1": lambda: evals.saebench(
            built, model=embedded.path(1)
        ),
        "'itda-embedded-seed0' is neither a model that TransformerLens knows": lambda: evals.saebench(built),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert not (Path(os.curdir) / "eval_results").exists()
