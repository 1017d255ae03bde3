"""A dictionary made again elsewhere: the same prompts, in another model, layer, checkpoint or tokenizer."""

import dataclasses
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import normalize

from itda_lens import ITDA, BuildConfig, Provenance, build, embedded
from itda_lens.evals import random_directions
from itda_lens.interpret import best_layer, decompose, diff, source_atoms, transfer, transfer_all, transfer_table
from itda_lens.streams import load_model
from tests.conftest import HOOK

SHARED = Path(__file__).parents[2] / "shared"
STORIES, CHARACTERS, WORDS = "stories260k-a", "tinystories-char-a", "tinystories-instruct-3m-chat-q4"
LATER = "blocks.5.hook_resid_post"


@pytest.fixture(scope="module")
def other():
    return embedded.model(1)


@pytest.fixture(scope="module")
def foreign():
    """Models with tokenizers of their own, and a text that they know."""
    if not (SHARED / "models" / STORIES).is_dir():
        pytest.skip("the models with other tokenizers are not there")
    text = (SHARED / "text" / "tinystories_1000.txt").read_text(encoding="utf8").split("\n\n")
    models = {name: load_model(str(SHARED / "models" / name)) for name in (STORIES, CHARACTERS, WORDS)}
    return models, Dataset.from_dict({"text": [story.strip() for story in text[:400] if story.strip()]})


def at_the_end_of(model, tokens: list[int], hook: str) -> torch.Tensor:
    with torch.no_grad():
        return model.run_with_cache(torch.tensor([tokens]), names_filter=[hook])[1][hook][0, -1].flatten()


def mean_of_rows(model, provenance: Provenance, hook: str) -> torch.Tensor:
    rows = [at for sequence in provenance.sequences.values() for at in all_but_bos(model, sequence, hook)]
    return torch.stack(rows).double().mean(0).float()


def all_but_bos(model, sequence: torch.Tensor, hook: str) -> torch.Tensor:
    with torch.no_grad():
        x = model.run_with_cache(sequence[None], names_filter=[hook])[1][hook][0].flatten(1)
    return x[sequence != model.tokenizer.bos_token_id]


@pytest.mark.parametrize("hook", [LATER, "blocks.1.hook_mlp_out", "blocks.2.attn.hook_z"])
def test_latent_i_is_the_same_prompt_in_the_other_model(built, other, hook):
    carried = transfer(built, other, hook)
    assert carried.cfg.d_sae == built.cfg.d_sae
    assert carried.provenance.identities() == built.provenance.identities()
    assert carried.provenance.identities("tokens") == built.provenance.identities("tokens")
    mean = mean_of_rows(other, built.provenance.select(range(built.cfg.d_sae)), hook)
    torch.testing.assert_close(carried.b_dec.data, mean, rtol=1e-4, atol=1e-4)
    for i in range(0, built.cfg.d_sae, 31):
        x = at_the_end_of(other, built.provenance.tokens(i), hook) - mean
        torch.testing.assert_close(carried.atoms.data[i], normalize(x, dim=0), rtol=1e-3, atol=1e-4)
    assert torch.equal(source_atoms(carried), torch.arange(built.cfg.d_sae))


def test_batches_and_company_change_nothing(built, other):
    together = transfer_all(built, other, [HOOK, LATER], batch_size=7)
    for hook, carried in together.items():
        alone = transfer(built, other, hook)
        torch.testing.assert_close(carried.atoms.data, alone.atoms.data, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(carried.b_dec.data, alone.b_dec.data, rtol=1e-3, atol=1e-5)


def test_each_row_runs_once(built, other):
    rows = []
    handle = other.embed.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    transfer(built, other, HOOK)
    handle.remove()
    assert sum(rows) == built.provenance.n_prompts + 1  # and the row that tells the width


def test_there_and_back_is_where_it_began(model, built, other):
    there = transfer(built, other, LATER)
    back = transfer(there, model, HOOK)
    again = transfer(built, model, HOOK)
    torch.testing.assert_close(back.atoms.data, again.atoms.data, rtol=1e-4, atol=1e-5)
    assert back.cfg.metadata.hook_name == HOOK
    assert back.cfg.metadata.itda_transfer["hook_name"] == LATER


def test_what_is_carried_goes_on_as_any_dictionary(built, other, tmp_path):
    carried = transfer(built.with_pursuit(orthogonal=True, k=5), other, LATER)
    assert (carried.cfg.k, carried.cfg.orthogonal) == (5, True)
    assert carried.cfg.metadata.model_name == "itda-embedded-seed1"
    carried.save_model(tmp_path)
    loaded = ITDA.load_from_disk(tmp_path)
    assert torch.equal(loaded.atoms, carried.atoms)
    assert torch.equal(source_atoms(loaded), source_atoms(carried))
    assert torch.equal(source_atoms(loaded.crop(20)), torch.arange(20))


def test_without_a_mean_there_is_none_after_transfer(other):
    config = BuildConfig(k=4, n_atoms=32, tokens=1000, center=False, progress=False)
    itda = build(embedded.model(0), embedded.dataset(), HOOK, config)[HOOK]
    assert not transfer(itda, other, HOOK).b_dec.any()


def test_reconstruction_after_transfer_is_near_a_native_dictionary_and_far_from_chance(built, model, other):
    config = BuildConfig(k=8, n_atoms=256, tokens=6000, progress=False)
    native = build(other, embedded.dataset(), [HOOK], config)
    heldout = embedded.dataset("heldout")
    table = transfer_table(built, other, [HOOK], dataset=heldout, native=native, tokens=1000).loc[HOOK]
    assert table["error"] == pytest.approx(table["native_error"], rel=0.15)
    chance = {HOOK: random_directions(native[HOOK])}
    assert (
        table["error"] < 0.7 * transfer_table(built, other, [HOOK], dataset=heldout, native=chance).native_error[HOOK]
    )
    itself = transfer_table(built, model, [HOOK], native={HOOK: built}, dataset=heldout).loc[HOOK]
    assert itself["error"] == pytest.approx(itself["native_error"], rel=0.05)


@pytest.mark.parametrize("layer", range(6))
def test_in_its_own_model_a_dictionary_finds_its_layer(model, layer):
    hook = f"blocks.{layer}.hook_resid_post"
    itda = build(model, embedded.dataset(), hook, BuildConfig(k=4, n_atoms=100, tokens=2000, progress=False))[hook]
    assert best_layer(itda, model) == hook
    assert transfer_table(itda, model).loc[hook, "agreement"] > 0.93


@pytest.mark.parametrize(
    ("source", "target"), [(STORIES, CHARACTERS), (CHARACTERS, STORIES), (WORDS, STORIES), (STORIES, WORDS)]
)
def test_across_tokenizers_where_borders_meet(foreign, source, target):
    models, text = foreign
    hook, there = "blocks.2.hook_resid_post", "blocks.3.hook_resid_post"
    config = BuildConfig(k=4, n_atoms=100, tokens=4000, pack=False, progress=False)
    itda = build(models[source], text, hook, config)[hook]
    carried = transfer(itda, models[target], there)
    kept = source_atoms(carried)
    dropped = carried.cfg.metadata.itda_transfer["dropped"]
    assert len(kept) == carried.cfg.d_sae > 30
    assert len(kept) + sum(map(len, dropped.values())) == itda.cfg.d_sae
    tokenizer, bos = models[target].tokenizer, models[target].tokenizer.bos_token_id
    for i, atom in enumerate(kept.tolist()):
        assert carried.provenance.text(i) == itda.provenance.text(atom)
        tokens = carried.provenance.tokens(i)
        assert tokens[0] == bos
        assert tokenizer.decode(tokens, skip_special_tokens=True) == itda.provenance.text(atom)
    x = at_the_end_of(models[target], carried.provenance.tokens(7), there) - carried.b_dec.data
    torch.testing.assert_close(carried.atoms.data[7], normalize(x, dim=0), rtol=1e-3, atol=1e-4)
    for atom in dropped["border"]:  # the text by itself may end a token; within its row no token ends there
        row = int(itda.provenance.row[atom])
        fellows = [i for i in range(itda.cfg.d_sae) if int(itda.provenance.row[i]) == row]
        longest = max((itda.provenance.text(i) for i in fellows), key=len)
        ids = models[target].to_tokens(longest, prepend_bos=False, truncate=False)[0].tolist()
        ends = {tokenizer.decode(ids[: j + 1], skip_special_tokens=True) for j in range(len(ids))}
        assert itda.provenance.text(atom) not in ends


def test_models_of_different_tokenizers_differ_where_borders_meet(foreign):
    models, text = foreign
    hook, base, tuned = "blocks.2.hook_resid_post", models[WORDS], models[STORIES]
    config = BuildConfig(k=4, n_atoms=100, tokens=4000, pack=False, progress=False)
    itda, native = (build(model, text.select(range(300)), hook, config)[hook] for model in (base, tuned))
    probe = text.select(range(300, 320))
    found = diff(base, tuned, itda, probe, native=native, tokens=10**6, context_size=64)
    assert found.prompts["shift"].between(0, 2).all()
    assert found.tokens.notna().all(axis=None)
    assert set(found.atoms["model"]) == {"base", "tuned"}
    for row in range(5):
        ends = []
        for model in (base, tuned):
            ids = model.to_tokens(probe[row]["text"], prepend_bos=False, truncate=False)[0].tolist()
            ends.append({len(model.tokenizer.decode(ids[: i + 1], skip_special_tokens=True)) for i in range(len(ids))})
        first = model_text(base, probe[row]["text"], 63)
        shared = {end for end in ends[0] & ends[1] if 0 < end <= len(first)}
        assert abs(found.prompts.loc[row, "n_tokens"] - len(shared)) <= 1


def model_text(model, text: str, tokens: int) -> str:
    """The text of the first tokens."""
    ids = model.to_tokens(text, prepend_bos=False, truncate=False)[0][:tokens].tolist()
    return model.tokenizer.decode(ids, skip_special_tokens=True)


def test_atoms_beyond_the_context_are_counted(built, other):
    short = embedded.model(1)
    short.cfg.n_ctx = 64
    carried = transfer(built, short, HOOK)
    beyond = (built.provenance.position >= 64).nonzero().flatten().tolist()
    assert beyond
    assert carried.cfg.metadata.itda_transfer["dropped"]["context"] == beyond
    assert carried.cfg.metadata.context_size == 64
    assert not set(source_atoms(carried).tolist()) & set(beyond)
    whole = transfer(built, other, HOOK)
    cosine = (carried.atoms.data * whole.atoms.data[source_atoms(carried)]).sum(-1)
    assert cosine.min() > 0.9  # the mean is over other rows


def test_activations_that_equal_the_mean_are_left_out(built, other):
    """Where all activations are one, none of them less the mean is a direction; and where most are zero, most."""
    constant = embedded.model(1)
    constant.W_E.data.zero_()
    constant.W_pos.data.zero_()
    with pytest.raises(ValueError, match=r"all 256 activations at hook_embed .* equal their mean"):
        transfer(built, constant, "hook_embed")
    some = embedded.model(1)
    rare = built.provenance.tokens(40)[-1]
    some.W_E.data[torch.arange(len(some.W_E)) != rare] = 0
    uncentred = ITDA.from_atoms(built.atoms.data, 1, provenance=built.provenance, metadata={"hook_name": HOOK})
    carried = transfer(uncentred, some, "hook_embed")
    assert carried.atoms.isfinite().all()
    assert {carried.provenance.tokens(i)[-1] for i in range(carried.cfg.d_sae)} == {rare}
    gone = carried.cfg.metadata.itda_transfer["dropped"]["degenerate"]
    assert len(gone) + carried.cfg.d_sae == 256
    assert decompose(carried, torch.zeros(3, 96)).relative_error.tolist() == [0, 0, 0]


def test_fewer_atoms_than_k_is_said(built):
    some = embedded.model(1)
    some.W_E.data[torch.arange(len(some.W_E)) != built.provenance.tokens(40)[-1]] = 0
    uncentred = ITDA.from_atoms(built.atoms.data, 100, provenance=built.provenance, metadata={"hook_name": HOOK})
    with pytest.warns(UserWarning, match=r"fewer than k=100, so it has k=\d"):
        assert transfer(uncentred, some, "hook_embed").cfg.k < 100


def test_bad_input_is_named(built, other):
    prov = built.provenance
    bare = ITDA.from_atoms(built.atoms.data, 2)
    with pytest.raises(ValueError, match="has no provenance"):
        transfer(bare, other, HOOK)
    positions = ITDA.from_atoms(built.atoms.data, 2, provenance=Provenance(prov.row, prov.position))
    with pytest.raises(ValueError, match="neither tokens nor text"):
        transfer(positions, other, HOOK)
    with pytest.raises(ValueError, match=r"no hook point 'blocks.3.hook_resid_pots'. Near it"):
        transfer(built, other, "blocks.3.hook_resid_pots")
    with pytest.raises(ValueError, match="has no vector for each token"):
        transfer(built, other, "blocks.3.attn.hook_pattern")
    with pytest.raises(ValueError, match="hook_head_index 9 does not fit"):
        transfer(built, other, "blocks.3.attn.hook_z", head_index=9)
    with pytest.raises(ValueError, match="non-negative view"):
        transfer(built.nonnegative_view(), other, HOOK)
    with pytest.raises(ValueError, match=r"does not come from transfer\(\)"):
        source_atoms(built)
    with pytest.raises(ValueError, match=r"native lacks blocks\.0"):
        transfer_table(built, other, native={HOOK: built}, dataset=embedded.dataset())
    textless = dataclasses.replace(prov, prompts=(), tokenizer_digest="another")
    with pytest.raises(ValueError, match=r"another tokenizer than .* and these atoms have no text"):
        transfer(ITDA.from_atoms(built.atoms.data, 2, provenance=textless), other, HOOK)
    unknown = dataclasses.replace(prov, prompts=(), tokenizer_digest=None)
    with pytest.warns(UserWarning, match="does not say which tokenizer"):
        transfer(ITDA.from_atoms(built.atoms.data, 2, provenance=unknown), other, HOOK)
    with pytest.raises(ValueError, match="layer_norm"):
        transfer(ITDA.from_atoms(built.atoms.data, 2, provenance=prov, normalize_activations="layer_norm"), other, HOOK)


def test_activations_that_are_not_finite_are_named(built):
    broken = embedded.model(1)
    broken.W_E.data[built.provenance.tokens(40)[-1]] = torch.inf
    with pytest.raises(ValueError, match=r"row \d+ at position \d+ at blocks.3.hook_resid_post .* NaN or infinite"):
        transfer(built, broken, HOOK)
