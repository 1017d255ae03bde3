"""What differs between two models: found where it was put, and not found where it was not."""

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, concatenate_datasets

from itda_lens import ITDA, BuildConfig, build, cli, embedded
from itda_lens.interpret import diff, transfer
from itda_lens.interpret.chance import adjusted_p, empirical_z
from itda_lens.interpret.profiles import Profiled, profile_shift

HOOK = "blocks.4.hook_resid_post"
N_PROSE, N_CODE, STEPS = 120, 24, 40
CONFIG = BuildConfig(k=8, n_atoms=300, tokens=10_000, pack=False, progress=False)


@pytest.fixture(scope="module")
def stream() -> Dataset:
    """What dictionaries are built on: one document in five is code."""
    return concatenate_datasets([embedded.dataset().select(range(400)), embedded.code().select(range(100))])


@pytest.fixture(scope="module")
def heldout() -> Dataset:
    """Documents that nothing was built or trained on; those from N_PROSE on are code."""
    prose, code = embedded.dataset("heldout"), embedded.code("heldout")
    return concatenate_datasets([prose.select(range(N_PROSE)), code.select(range(N_CODE))])


@pytest.fixture(scope="module")
def itda(model, stream) -> ITDA:
    return build(model, stream.shuffle(seed=0), HOOK, CONFIG)[HOOK]


@pytest.fixture(scope="module")
def tuned():
    """The base after training on code, mixed with as much of the prose that it knows."""
    prose, code = embedded.dataset().select(range(2000, 3500)), embedded.code().select(range(500, 2000))
    return embedded.fine_tuned(concatenate_datasets([prose, code]), steps=STEPS)


@pytest.fixture(scope="module")
def control():
    """The base after as much training on more of the prose that it knows."""
    return embedded.fine_tuned(embedded.dataset().select(range(2000, 3500)), steps=STEPS)


@pytest.fixture(scope="module")
def found(model, tuned, itda, heldout, stream):
    native = build(tuned, stream.shuffle(seed=0), HOOK, CONFIG)[HOOK]
    second = build(model, stream.shuffle(seed=1), HOOK, CONFIG)[HOOK]
    return diff(model, tuned, itda, heldout, native=native, second=second, tokens=10**6)


def precision(table: pd.DataFrame, n: int = 20) -> float:
    return float((table.index[:n] >= N_PROSE).mean())


def test_the_kind_that_was_trained_on_is_at_the_top(found):
    assert precision(found.prompts) >= 0.8, "where one document in six is code"
    significant = found.prompts[found.prompts["q"] < 0.05]
    assert len(significant) > N_CODE / 3
    assert precision(significant, len(significant)) > 0.8
    assert precision(found.tokens.set_index("row")) >= 0.6


def test_more_of_the_same_kind_puts_nothing_at_the_top(model, control, itda, heldout):
    prompts = diff(model, control, itda, heldout, tokens=10**6).prompts
    assert precision(prompts) < 0.4
    significant = prompts[prompts["q"] < 0.05]
    assert len(significant) < len(prompts) / 10
    assert (significant.index < N_PROSE).sum() >= len(significant) / 2
    assert "gap" not in prompts


def test_the_ranking_hardly_depends_on_the_dictionary(model, tuned, stream, heldout, found):
    other = build(model, stream.shuffle(seed=7), HOOK, CONFIG)[HOOK]
    again = diff(model, tuned, other, heldout, tokens=10**6).prompts
    assert again["shift"].corr(found.prompts["shift"]) > 0.9


def test_a_model_does_not_differ_from_itself(model, itda, heldout):
    found = diff(model, embedded.model(0), itda, heldout, native=itda, second=itda, tokens=2000)
    assert (found.prompts[["shift", "z", "gap", "gap_z"]].abs() < 1e-5).all(axis=None)
    assert (found.latents["z"] == 0).all()
    assert (found.prompts["q"] >= 0.5).all()
    assert len(found.atoms) == 0
    assert not found.prompts.isna().any(axis=None)


def test_a_rotated_model_differs_only_where_it_was_changed(model, itda, heldout):
    """Two models with other coordinates but the same relations: a permuted width is no difference, other text is."""
    from itda_lens.interpret.prompts import probe, run_prompts

    x = torch.cat([b.activations[HOOK] for b in run_prompts(model, probe(model, heldout, tokens=600), {HOOK: HOOK})])
    carried = transfer(itda, model, HOOK)
    rotation = torch.linalg.qr(torch.randn(96, 96, generator=torch.Generator().manual_seed(0))).Q
    one = Profiled(x, carried.atoms.data, carried.b_dec.data)
    other = Profiled(3 * x @ rotation, carried.atoms.data @ rotation, 3 * carried.b_dec.data @ rotation)
    assert profile_shift(one, other).max() < 1e-4
    changed = other.x.clone()
    changed[[5, 17]] = changed[[100, 101]]
    shift = profile_shift(one, other._replace(x=changed))
    assert set(shift.topk(2).indices.tolist()) == {5, 17}
    # The definition, written out.
    p = one.directions() @ one.atoms.T
    q = Profiled(changed, other.atoms, other.bias).directions() @ other.atoms.T
    plain = 1 - torch.nn.functional.cosine_similarity(p - p.mean(0), q - q.mean(0), dim=-1)
    torch.testing.assert_close(shift, plain, atol=1e-4, rtol=1e-3)


def test_tokens_without_a_direction_give_no_nan():
    x = torch.eye(3)
    none = Profiled(torch.zeros(3, 3), torch.eye(3), torch.zeros(3))
    assert profile_shift(none, none).tolist() == [0, 0, 0]
    assert profile_shift(Profiled(x, torch.eye(3), torch.zeros(3)), none).tolist() == [1, 1, 1]


def test_tables_are_consistent(found, heldout):
    prompts, tokens = found.prompts, found.tokens
    assert set(prompts.index) <= set(range(len(heldout)))
    assert prompts["n_tokens"].sum() == len(tokens)
    means = tokens.groupby("row")[["shift", "base_error", "tuned_error", "gap"]].mean()
    pd.testing.assert_frame_equal(prompts.loc[means.index, means.columns], means, check_dtype=False, rtol=1e-4)
    assert prompts["shift"].is_monotonic_decreasing
    for row in prompts.index[:10]:
        before, _, token = prompts.loc[row, "text"].partition("«")
        assert before + token.removesuffix("»") in heldout[row]["text"].replace("\n", "↵")
        strongest = tokens[tokens["row"] == row].iloc[0]
        assert strongest["token"].replace("\n", "↵") == token.removesuffix("»")
    assert not prompts.isna().any(axis=None)


def test_latents_count_use_in_both_models(model, tuned, itda, heldout, found):
    """Recounted from the codes, for the latents that changed most."""
    from itda_lens.interpret.prompts import probe, run_prompts

    prompts = probe(model, heldout, tokens=10**6)
    for name, one in (("base_use", model), ("tuned_use", tuned)):
        carried = transfer(itda, one, HOOK)
        used = sum(
            (carried.encode(batch.activations[HOOK]) != 0).sum(0) for batch in run_prompts(one, prompts, {HOOK: HOOK})
        )
        for latent in found.latents.index[:5]:
            assert found.latents.loc[latent, name] == pytest.approx(int(used[latent]) / len(prompts), abs=2e-3)
    assert found.latents["z"].is_monotonic_decreasing
    more = found.latents["tuned_use"] > found.latents["base_use"]
    assert (more == (found.latents["z"] > 0)).all()


def test_atoms_that_one_model_holds(model, tuned, itda, stream, found):
    native = build(tuned, stream.shuffle(seed=0), HOOK, CONFIG)[HOOK]
    mine, theirs = (set(d.provenance.identities()) for d in (itda, native))
    for name, own, lacking in (("base", itda, theirs), ("tuned", native, mine)):
        rows = found.atoms[found.atoms["model"] == name]
        identities = own.provenance.identities()
        assert {identities[i] for i in rows["atom"]} == set(identities) - lacking
    top = found.atoms.iloc[0]
    own = itda if top["model"] == "base" else native
    assert top["text"].endswith(f"{own.provenance.prompt(int(top['atom']))[1]}»".replace("\n", "↵"))


def test_z_is_standard_where_groups_differ_by_chance_or_by_nature():
    generator = np.random.default_rng(0)
    counts = generator.integers(5, 200, 2000)
    for nature in (0.0, 0.5):
        means = generator.normal(3, nature, 2000) + generator.normal(0, 1, 2000) / np.sqrt(counts)
        z = empirical_z(means, counts, 1.0)
        assert z.std() == pytest.approx(1, abs=0.06)
        assert (adjusted_p(z) < 0.05).sum() <= 2
        means[:100] += 5
        assert (adjusted_p(empirical_z(means, counts, 1.0)) < 0.05)[:100].all()
    assert empirical_z(np.full(5, 2.0), np.full(5, 9), 1.0).tolist() == [0] * 5


def test_bad_input_is_named(model, tuned, itda, heldout):
    elsewhere = transfer(itda, model, "blocks.1.hook_resid_post")
    bare = ITDA.from_atoms(itda.atoms.data, 2, metadata={"hook_name": HOOK})
    for arguments, message in [
        ({"native": elsewhere}, "native belongs to"),
        ({"second": itda}, "needs native"),
        ({"native": transfer(itda, tuned, "blocks.1.hook_resid_post")}, "take one hook"),
        ({"native": bare}, "native has no provenance"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"context_size": 500}, "between 2 and the base's 128 positions"),
    ]:
        with pytest.raises(ValueError, match=message):
            diff(model, tuned, itda, heldout, **arguments)
    with pytest.raises(ValueError, match="itda belongs to the model 'itda-embedded-seed0', but was given"):
        diff(tuned, model, itda, heldout)
    with pytest.raises(ValueError, match="is empty"):
        diff(model, tuned, itda, Dataset.from_dict({"text": []}))


def test_the_command_writes_its_tables(itda, tmp_path, capsys):
    itda.save_model(tmp_path / "itda")
    cli.main(["diff", "--itda", str(tmp_path / "itda"), "--tuned", "embedded:1", "--dataset", "embedded:heldout",
              "--tokens", "1000", "--rows", "5", "--out", str(tmp_path / "tables")])  # fmt: skip
    prompts = pd.read_csv(tmp_path / "tables" / "prompts.csv", index_col="row")
    assert prompts["shift"].is_monotonic_decreasing
    assert {path.stem for path in (tmp_path / "tables").iterdir()} == {"prompts", "tokens", "latents"}
    printed = capsys.readouterr().out
    assert f"{prompts['shift'].iloc[0]:.3f}" in printed
    with pytest.raises(SystemExit):
        cli.main(["diff", "--itda", str(tmp_path), "--tuned", "embedded:1", "--dataset", "embedded:heldout"])
    assert "holds no SAE" in capsys.readouterr().err
