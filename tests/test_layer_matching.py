"""Layer matching, graded membership, models and checkpoints, on real models."""

import itertools
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from datasets import Dataset
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from itda_lens import BuildConfig, Provenance, build, cli, embedded
from itda_lens.similarity import (
    MEASURES,
    Declaration,
    LayerMatching,
    MatchingConfig,
    MembershipProfiles,
    convergence,
    jaccard,
    layer_matching_accuracy,
    match_dictionaries,
    match_layers,
    model_jaccard,
    model_similarity,
    mutual_knn,
    plot_convergence,
    relative,
)
from itda_lens.similarity.declaration import Steps
from itda_lens.similarity.gathered import Gathered
from itda_lens.streams import (
    HookedModel,
    activation_batches,
    canonical_hooks,
    hooked_model_from_folder,
    load_model,
    load_text,
)

matplotlib.use("Agg")
HOOKS = ["blocks.0.hook_resid_post", "blocks.3.hook_resid_post", "blocks.5.hook_resid_post"]
ZOO = Path(__file__).parents[2] / "shared" / "zoo"
SMALL = MatchingConfig(
    tokens=3000, sample=600, n_atoms=200, threshold=0.3, dictionaries=3, small_atoms=60, beginning=500, permutations=19
)


@pytest.fixture(scope="module")
def models():
    return {f"seed {seed}": embedded.model(seed) for seed in (0, 1)}


@pytest.fixture(scope="module")
def found(models) -> LayerMatching:
    return match_layers(models, embedded.dataset("heldout"), HOOKS, SMALL)


@pytest.fixture(scope="module")
def activations(models) -> dict[str, list[torch.Tensor]]:
    """What the study streams, all at once: the first 3,000 unmasked tokens at each hook."""
    kept = {}
    for name, model in models.items():
        data, hooks = load_text(embedded.dataset("heldout")), canonical_hooks(model, HOOKS)
        batches = activation_batches(model, data, hooks, context_size=128, batch_size=30)
        batches = list(itertools.islice(batches, 2))
        kept[name] = [torch.cat([b.activations[h][b.mask] for b in batches])[:3000] for h in HOOKS]
    return kept


def test_one_pass_gives_what_the_measures_give_of_the_whole(found, activations):
    a, b = activations.values()
    for name, measure in MEASURES.items():
        if measure.of_moments is not None:
            expected = [[measure.compare(x, y) for y in b] for x in a]
            assert found.matrices[name]["seed 0", "seed 1"] == pytest.approx(np.array(expected), abs=1e-4)
    sampled = torch.randperm(3000, generator=torch.Generator().manual_seed(0))[:600].sort().values
    expected = [[mutual_knn(x[sampled], y[sampled]) for y in b] for x in a]
    assert found.matrices["mutual_knn"]["seed 0", "seed 1"] == pytest.approx(np.array(expected), abs=2e-3)


def test_dictionaries_of_the_pass_are_those_of_build(found, models):
    config = BuildConfig(k=8, threshold=0.3, tokens=3000, progress=False)
    built = [build(model, embedded.dataset("heldout"), HOOKS, config) for model in models.values()]
    assert found.sizes == {
        name: [itda.cfg.d_sae for itda in itdas.values()] for name, itdas in zip(models, built, strict=True)
    }
    expected = [[jaccard(built[0][x], built[1][y], kind="position") for y in HOOKS] for x in HOOKS]
    assert found.matrices["jaccard, equal threshold"]["seed 0", "seed 1"].tolist() == expected
    matched = match_dictionaries(dict(zip(models, built, strict=True))).matrices["size alone"]
    assert matched["seed 0", "seed 1"].equal(found.matrices["size alone, equal threshold"]["seed 0", "seed 1"])


def test_three_models_have_an_interval():
    right, wrong = torch.eye(2), torch.eye(2).flip(0)
    pairs = itertools.product("abc", repeat=2)
    table = LayerMatching(
        "abc", ["x", "y"], 9, {"m": {p: wrong if set(p) == {"a", "b"} else right for p in pairs}}
    ).table()
    low, accuracy, high = table.loc["m", ["low", "accuracy", "high"]]
    assert accuracy == pytest.approx(2 / 3)
    assert low < accuracy < high


def test_every_measure_finds_distant_layers_and_the_controls_know_their_place(found):
    table = found.table()
    assert table.loc["size alone, equal size", "accuracy"] == pytest.approx(1 / 3)
    assert (table.loc[["linear_cka", "procrustes"], "accuracy"] == 1).all()
    assert (table.loc[["mutual_knn", "relative", "graded membership", "jaccard, equal size"], "accuracy"] > 0.4).all()
    assert "low" not in table  # one pair of models has no interval
    assert set(table["cells"]) == {6}
    for matrices in found.matrices.values():
        assert set(matrices) == {(a, b) for a in found.models for b in found.models}
    for name in {*MEASURES} - {"linear_regression_r2"}:
        assert torch.allclose(found.matrices[name]["seed 0", "seed 1"], found.matrices[name]["seed 1", "seed 0"].T)
        assert found.matrices[name]["seed 0", "seed 0"].diagonal() == pytest.approx(np.ones(3))


def test_real_layers_are_above_chance(found):
    cells = found.cells()
    one = cells[(cells.measure == "linear_cka") & (cells.model_a == "seed 0") & (cells.model_b == "seed 1")]
    assert len(one) == 9
    assert (one.p_adjusted == 0.05).all()  # the least that 19 permutations can give
    assert one.effect.between(0.3, 1).all()
    assert set(found.table().query("significant == 1").index) >= {"linear_cka", "mutual_knn", "jaccard, equal size"}


def test_heatmaps_ring_the_most_similar_layer(found):
    figure = found.plot(["linear_cka", "jaccard, equal size"])
    axis = figure.axes[0]
    both = [found.matrices["linear_cka"][pair] for pair in (("seed 0", "seed 1"), ("seed 1", "seed 0"))]
    assert axis.lines[0].get_xdata().tolist() == sum(both).argmax(dim=1).tolist()
    assert "linear_cka: 1.00" in axis.get_title()
    with pytest.raises(ValueError, match="'cka' was not measured"):
        found.plot(["cka"])


def test_a_short_stream_is_noted(models):
    few = MatchingConfig(**{**vars(SMALL), "tokens": 10**6, "sample": 10**6, "permutations": 2, "n_atoms": 400})
    texts = Dataset.from_dict({"text": embedded.dataset("heldout")["text"][:6]})
    with pytest.warns(UserWarning, match="the stream ended"):
        notes = match_layers(models, texts, HOOKS[:2], few).notes
    assert "tokens of the 1,000,000 asked for" in notes[0]


QUICK = MatchingConfig(
    tokens=1000, sample=400, n_atoms=60, dictionaries=2, small_atoms=30, beginning=200, permutations=3, seed=5
)
PAIR = ("seed 0", "seed 1")


@pytest.fixture(scope="module")
def quick(models, activations) -> tuple[LayerMatching, list[list[torch.Tensor]]]:
    """With measures of all three kinds that were declared a moment ago; and the sampled activations by model."""
    new = {
        "by tokens": declared(lambda x, y: float(torch.corrcoef(torch.stack([x.norm(dim=1), y.norm(dim=1)]))[0, 1])),
        "by moments": declared(
            lambda x, y: nearness(x.double().var(0).sum(), y.double().var(0).sum()),
            of_moments=lambda m: nearness(m.x.covariance.trace(), m.y.covariance.trace()),
        ),
        "in steps": declared(
            lambda x, y: float((x.norm(dim=1) * y.norm(dim=1)).mean()),
            in_steps=Steps(lambda x: x.norm(dim=1), lambda y, order: y[order], lambda a, b: float((a * b).mean())),
        ),
        "too much": declared(lambda x, y: 0.0, needs=lambda d, e: 10**6),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, measure in new.items():
            patch.setitem(MEASURES, name, measure)
        found = match_layers(models, embedded.dataset("heldout"), HOOKS, QUICK)
    sampled = torch.randperm(1000, generator=torch.Generator().manual_seed(5))[:400].sort().values
    return found, [[x[sampled] for x in layers] for layers in activations.values()]


def declared(compare, of_moments=None, in_steps=None, **more) -> Declaration:
    return Declaration(compare, (0.0, 1.0), True, {}, of_moments, in_steps, **more)


def nearness(a, b) -> float:
    return float(-(a / b).log().abs())


def test_every_measure_that_is_declared_is_in_the_table_and_calibrated(quick):
    found, (a, b) = quick
    assert {"by tokens", "by moments", "in steps", *MEASURES} <= set(found.table()["effect"].dropna().index)
    products = [[float((x.norm(dim=1) * y.norm(dim=1)).mean()) for y in b] for x in a]
    assert found.matrices["in steps"][PAIR].numpy() == pytest.approx(np.array(products))
    for name in ("by tokens", "in steps"):
        assert found.calibrations[name][PAIR].similarity.numpy() == pytest.approx(found.matrices[name][PAIR].numpy())
    assert found.table().loc["by moments", "with_self"] > found.table().loc["by moments", "accuracy"] - 1e-9
    assert "too much" not in found.matrices
    assert "too much is left out: it needs 1,000,000 tokens at these widths, and has 400" in " ".join(found.notes)


def test_the_table_and_the_calibration_have_the_same_anchors_from_the_seed(quick):
    found, (a, b) = quick
    expected = [[relative(x, y, seed=5) for y in b] for x in a]
    assert found.matrices["relative"][PAIR].numpy() == pytest.approx(np.array(expected), abs=1e-6)
    assert found.calibrations["relative"][PAIR].similarity.numpy() == pytest.approx(np.array(expected), abs=1e-6)


def wide(folder: Path, seed: int, width: int) -> HookedModel:
    """A model from random weights, with the embedded tokenizer."""
    torch.manual_seed(seed)
    config = GPT2Config(n_layer=2, n_embd=width, n_head=2, n_positions=64, n_ctx=64, vocab_size=2048, bos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded.path(0)).save_pretrained(folder)
    return hooked_model_from_folder(folder)


def test_models_that_are_wider_than_the_sample_get_a_table(tmp_path, capsys):
    models = {f"seed {seed}": wide(tmp_path / f"run{seed}", seed, 160) for seed in (0, 1)}
    sizes = {"n_atoms": 50, "dictionaries": 2, "small_atoms": 20, "beginning": 60, "permutations": 2}
    found = match_layers(models, embedded.dataset("heldout"), None, MatchingConfig(tokens=400, sample=150, **sizes))
    effects = found.table()["effect"]
    assert effects[["svcca", "linear_regression_r2"]].isna().all()
    assert effects[["linear_cka", "procrustes", "mutual_knn", "relative"]].notna().all()
    assert list(found.notes) == [
        f"{name} is not calibrated: it needs 162 tokens at these widths, and has 150 (tokens=400, sample=150)"
        for name in ("linear_regression_r2", "svcca")
    ]
    bars = capsys.readouterr().err
    assert "400/400" in bars
    assert all(f"{what}: 100%" in bars for what in ("comparing", "calibrating"))

    few = MatchingConfig(tokens=150, sample=150, progress=False, **sizes)
    found = match_layers(models, embedded.dataset("heldout"), None, few)
    assert {"svcca", "svcca, 20 directions", "linear_regression_r2"}.isdisjoint(found.matrices)
    assert {"linear_cka", "linear_cka, debiased", "graded membership"} <= set(found.matrices)
    assert [note for note in found.notes if note.startswith("svcca, 20 directions is left out: it needs 162 tokens")]
    assert capsys.readouterr().err == ""


def test_where_moments_would_not_fit_linear_measures_are_of_the_sample(models, activations, monkeypatch):
    assert Gathered([4096] * 8, HOOKS, QUICK).moments is None
    monkeypatch.setattr("itda_lens.similarity.gathered.LIMIT_GIB", 1e-3)
    config = MatchingConfig(**{**vars(QUICK), "permutations": 0, "seed": 0})
    found = match_layers(models, embedded.dataset("heldout"), HOOKS, config)
    sampled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:400].sort().values
    a, b = ([x[sampled] for x in layers] for layers in activations.values())
    for name in ("linear_cka", "procrustes", "svcca", "linear_regression_r2"):
        expected = [[MEASURES[name].compare(x, y) for y in b] for x in a]
        assert found.matrices[name][PAIR].numpy() == pytest.approx(np.array(expected), abs=1e-4)
    assert "linear measures are of the 400 sampled tokens" in found.notes[0]


@pytest.mark.parametrize(
    ("changes", "hooks", "message"),
    [
        ({"tokens": 400}, HOOKS, "tokens=400 must be above beginning=500"),
        ({"sample": 4000}, HOOKS, "sample=4000"),
        ({"sample": 1}, HOOKS, "sample=1 must be between 2 and"),
        ({"permutations": -1}, HOOKS, "permutations must be at least 0, got -1"),
        ({"context_size": 1}, HOOKS, "context_size must be at least 2, got 1"),
        ({"batch_size": 0}, HOOKS, "batch_size must be at least 1, got 0"),
        ({"k": 300}, HOOKS, "k is 300, but a dictionary has 60 atoms"),
        ({"beginning": 100}, HOOKS, "3 dictionaries of 60 prompts can't be drawn from 100 tokens"),
        ({}, HOOKS[:1], "a single layer can only match itself"),
        ({}, ["blocks.9.hook_resid_post", *HOOKS], "no hook point"),
        ({}, ["blocks.0.attn.hook_pattern", *HOOKS], "no vector for each token"),
    ],
)
def test_bad_input_is_refused(models, changes, hooks, message):
    with pytest.raises(ValueError, match=message):
        match_layers(models, embedded.dataset("heldout"), hooks, MatchingConfig(**{**vars(SMALL), **changes}))


def test_one_model_and_models_of_different_tokenizers_are_refused(models):
    one = dict(list(models.items())[:1])
    with pytest.raises(ValueError, match="there is 1: give at least two"):
        match_layers(one, embedded.dataset("heldout"), HOOKS, SMALL)
    if not ZOO.exists():
        pytest.skip("needs the models beside the repository")
    other = load_model(str(ZOO / "seed21"))
    with pytest.raises(ValueError, match="different tokenizers"):
        match_layers({**one, "zoo": other}, embedded.dataset("heldout"), HOOKS, SMALL)
    with pytest.raises(ValueError, match="'zoo': 8} layers"):
        match_layers({**one, "zoo": other}, embedded.dataset("heldout"), None, SMALL)


def test_grades_are_the_loss_of_pursuit_however_the_stream_is_cut(activations):
    layers = activations["seed 0"]
    settings = {"dictionaries": 2, "atoms": 40, "k": 4, "beginning": 300, "seed": 1}
    whole, parts = (MembershipProfiles(3, **settings) for _ in range(2))
    whole.update(layers)
    for start in range(0, 3000, 700):
        parts.update([x[start : start + 700] for x in layers])
    assert torch.allclose(whole.profiles(range(3)), parts.profiles(range(3)), atol=1e-5)
    assert whole.profiles([0]).shape == (1, 2700)
    assert whole.profiles(range(3)).min() >= 0
    finer = MembershipProfiles(3, **{**settings, "k": 8})
    finer.update(layers)
    assert (finer.profiles([1]) <= whole.profiles([1]) + 1e-6).all()


def test_grades_survive_rotation_scaling_and_a_shift(activations):
    x = activations["seed 0"][1].double()
    g = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(96, 96, generator=g, dtype=torch.float64)).Q
    moved = 5 * x @ rotation + torch.randn(96, generator=g, dtype=torch.float64)
    profiles = MembershipProfiles(2, dictionaries=2, atoms=40, k=4, beginning=300)
    profiles.update([x, moved])
    one, other = profiles.profiles([0, 1])
    assert one == pytest.approx(other.numpy(), abs=1e-4)
    assert profiles.similarity([0], [1]).item() == pytest.approx(1)


def test_similarity_of_grades_is_their_correlation_less_the_mean_over_layers(activations):
    profiles = MembershipProfiles(6, dictionaries=2, atoms=40, k=4, beginning=300)
    profiles.update([x for layers in activations.values() for x in layers])
    sides = [scipy.stats.zscore(profiles.profiles(rows).numpy(), axis=1) for rows in (range(3), range(3, 6))]
    sides = [side - side.mean(axis=0) for side in sides]
    expected = np.corrcoef(*sides)[:3, 3:]
    assert profiles.similarity(range(3), range(3, 6)).numpy() == pytest.approx(expected)
    calibration = profiles.calibrate(range(3), range(3, 6), permutations=19, block=1)
    assert calibration.similarity.numpy() == pytest.approx(expected)
    assert calibration.chance.abs().max() < 0.05
    assert calibration.p_adjusted.diagonal().max() == pytest.approx(0.05)
    plain = np.corrcoef(profiles.profiles(range(3)), profiles.profiles(range(3, 6)))[:3, 3:]
    assert profiles.similarity(range(3), range(3, 6), less_mean=False).numpy() == pytest.approx(plain)
    plain = np.corrcoef(profiles.profiles([1]), profiles.profiles([4]))[0, 1]
    assert profiles.similarity([1], [4]).item() == pytest.approx(plain)


def test_grades_need_a_stream_and_sensible_numbers():
    with pytest.raises(ValueError, match="k is 9, but a dictionary has 8 atoms"):
        MembershipProfiles(2, atoms=8, k=9)
    with pytest.raises(ValueError, match="dictionaries must be at least 1"):
        MembershipProfiles(2, dictionaries=0)
    profiles = MembershipProfiles(2, dictionaries=1, atoms=10, k=2, beginning=20)
    profiles.update([torch.randn(15, 4), torch.randn(15, 4)])
    with pytest.raises(ValueError, match="there were 15"):
        profiles.profiles([0])
    profiles.update([torch.randn(15, 4)] * 2)
    constant = MembershipProfiles(2, dictionaries=1, atoms=10, k=2, beginning=20)
    with pytest.raises(ValueError, match="layer 0 is the same for every token"):
        constant.update([torch.ones(40, 4), torch.randn(40, 4)])
    twice = MembershipProfiles(3, dictionaries=1, atoms=10, k=2, beginning=20)
    x = torch.randn(40, 4)
    twice.update([x, x, torch.randn(40, 4)])
    with pytest.raises(ValueError, match="given twice"):
        twice.similarity([0, 1], [2])


def atoms(*rows: int) -> Provenance:
    return Provenance(torch.tensor(rows), torch.zeros(len(rows), dtype=torch.int64))


def test_models_are_joined_over_layers():
    a, b = {"x": atoms(1, 2), "y": atoms(2, 3)}, [atoms(3, 4, 1)]
    assert model_jaccard(a, b) == 2 / 4
    table = model_similarity({"a": a, "b": b})
    assert table.loc["a", "b"] == 0.5
    assert table.loc["a", "a"] == 1
    with pytest.raises(ValueError, match="no dictionaries"):
        model_jaccard([], b)


def test_checkpoints_converge():
    steps = {0: {"x": atoms(1, 2)}, 10: {"x": atoms(2, 3)}, 20: {"x": atoms(3, 4)}}
    table = convergence(steps)
    assert table["x"].tolist() == [0, 1 / 3, 1]
    assert plot_convergence(table).axes[0].lines[0].get_xdata().tolist() == [0, 10, 20]
    with pytest.raises(ValueError, match="there are 1 checkpoints"):
        convergence({0: steps[0]})
    with pytest.raises(ValueError, match="checkpoint 0 has the hooks"):
        convergence({0: {"y": atoms(1)}, 10: steps[10]})


@pytest.mark.skipif(not ZOO.exists(), reason="needs the checkpoints beside the repository")
def test_real_checkpoints_come_closer_to_the_last():
    config = BuildConfig(k=8, n_atoms=100, tokens=4000, progress=False)
    hook = "blocks.1.hook_resid_post"
    text = ZOO.parent / "text" / "wikitext2_heldout.txt"
    folders = {125: "seed21-step125", 1500: "seed21-step1500", 2000: "seed21"}
    table = convergence({s: build(load_model(str(ZOO / f)), text, hook, config) for s, f in folders.items()})
    assert table[hook].is_monotonic_increasing
    assert table[hook].iloc[1] > table[hook].iloc[0] + 0.1


def test_compare_on_the_command_line(tmp_path, capsys):
    options = ["tokens", 1500, "sample", 300, "n-atoms", 200, "dictionaries", 2, "beginning", 400, "permutations", 0]
    options = [f"--{o}" if isinstance(o, str) else str(o) for o in options]
    cli.main(
        ["compare", "--models", "embedded:0", "embedded:1", "--dataset", "embedded:heldout", "--hooks", *HOOKS,
         *options, "--csv", str(tmp_path / "cells.csv"), "--plot", str(tmp_path / "plot.png")]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "graded membership" in printed
    cells = pd.read_csv(tmp_path / "cells.csv")
    matrices = cells[cells.measure == "procrustes"].groupby(["model_a", "model_b"]).similarity
    assert layer_matching_accuracy([torch.tensor(m.to_numpy()).view(3, 3) for _, m in matrices]) == 1
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_saved_builds_are_compared_on_the_command_line(tmp_path, capsys):
    config = BuildConfig(k=4, n_atoms=50, tokens=2000, progress=False)
    for seed in (0, 1):
        for hook, itda in build(embedded.model(seed), embedded.dataset("heldout"), HOOKS[:2], config).items():
            itda.save_model(tmp_path / f"seed{seed}" / hook)
    folders = [str(tmp_path / "seed0"), str(tmp_path / "seed1")]
    cli.main(["compare", "--builds", *folders, "--csv", str(tmp_path / "cells.csv")])
    assert "jaccard" in capsys.readouterr().out
    cells = pd.read_csv(tmp_path / "cells.csv").query(
        "measure == 'jaccard' and model_a == model_b and hook_a == hook_b"
    )
    assert (cells.similarity == 1).all()
    for arguments, message in [
        (["--builds", str(tmp_path)], "holds no folders of ITDAs"),
        (["--builds", folders[0]], "give at least two"),
        (["--models", "embedded"], "needs --dataset"),
        ([], "pass --models with --dataset, or --builds"),
    ]:
        with pytest.raises(SystemExit):
            cli.main(["compare", *arguments])
        assert message in capsys.readouterr().err.replace("\n", " ")
