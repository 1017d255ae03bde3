"""`build`: what the stream is, what may become an atom, and what bad input is told."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from sae_lens import HookedSAETransformer
from torch.nn.functional import normalize

from itda_lens import ITDA, BuildConfig, build, embedded
from itda_lens.streams import load_text, special_token_ids, token_batches
from tests.conftest import HOOK

QUICK = {"k": 4, "n_atoms": 64, "tokens": 3000, "progress": False}


def activation(model: HookedSAETransformer, tokens: list[int], hook: str = HOOK) -> torch.Tensor:
    with torch.no_grad():
        return model.run_with_cache(torch.tensor([tokens]), names_filter=[hook])[1][hook][0, -1].flatten()


def test_atoms_are_activations_of_the_prompts_they_name(model, built):
    for i in range(0, built.cfg.d_sae, 17):
        x = activation(model, built.provenance.tokens(i)) - built.b_dec.data
        torch.testing.assert_close(built.atoms.data[i], normalize(x, dim=0), rtol=1e-3, atol=1e-4)


def test_every_atom_is_found_again_in_the_text(built):
    rows = dict(enumerate(_packed(built.cfg.metadata.context_size)))
    for i, (row, position) in enumerate(built.provenance.identities("position")):
        assert built.provenance.tokens(i) == rows[row][: position + 1]


def _packed(context_size: int) -> list[list[int]]:
    batches = token_batches(embedded.model(), embedded.dataset(), context_size=context_size, batch_size=50)
    return next(tokens for tokens, _ in batches).tolist()


def test_one_pass_serves_every_hook(model):
    hooks = ["blocks.1.hook_resid_post", "blocks.3.hook_mlp_out", "blocks.2.attn.hook_z", "ln_final.hook_normalized"]
    passes = []
    handle = model.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    together = build(model, embedded.dataset(), hooks, BuildConfig(**QUICK))
    handle.remove()
    assert len(passes) == 2  # one batch of 32 x 128 tokens, and the probe for the widths
    assert list(together) == hooks
    for hook in hooks:
        alone = build(model, embedded.dataset(), hook, BuildConfig(**QUICK))[hook]
        assert torch.equal(together[hook].provenance.row, alone.provenance.row)
        torch.testing.assert_close(together[hook].atoms.data, alone.atoms.data)
        assert together[hook].cfg.metadata.hook_name == hook


def test_special_tokens_are_atoms_only_when_asked_for(model, built):
    special = set(special_token_ids(model))
    assert special == {0}
    assert not any(built.provenance.tokens(i)[-1] in special for i in range(len(built.provenance)))
    config = BuildConfig(**QUICK, exclude_special_tokens=False)
    asked = build(model, embedded.dataset(), HOOK, config)[HOOK].provenance
    assert any(asked.tokens(i)[-1] in special for i in range(len(asked)))


def test_unpacked_rows_are_documents(model):
    texts = ["", "Return the list.", "x" * 500, "The value of the key"]
    data = Dataset.from_dict({"text": texts})
    [(tokens, mask)] = token_batches(model, data, context_size=16, batch_size=8, pack=False)
    assert tokens.shape == mask.shape == (4, 16)
    for row, text in enumerate(texts):
        ids = [0, *model.tokenizer(text, add_special_tokens=False)["input_ids"]][:16]
        assert tokens[row][mask[row]].tolist() == ids
        assert mask[row, : len(ids)].all()
    config = BuildConfig(k=1, threshold=0.0, pack=False, context_size=16, progress=False)
    prov = build(model, data, HOOK, config)[HOOK].provenance
    assert {row for row, _ in prov.identities("position")} == {1, 2, 3}
    for i, (row, _) in enumerate(prov.identities("position")):
        assert texts[row].startswith(prov.text(i))
        assert prov.tokens(i)[-1] != 0


def test_the_stream_is_read_once_and_whole(model):
    """The last partial batch counts, and the data set does not begin again."""
    data = embedded.dataset("heldout").select(range(5))
    batches = list(token_batches(model, data, context_size=32, batch_size=8))
    rows = torch.cat([tokens for tokens, _ in batches])
    assert len(batches[-1][0]) < 8
    assert len(rows.unique(dim=0)) == len(rows)
    total = sum(len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in data["text"])
    assert abs(int((rows != 0).sum()) - total) < 32
    with pytest.warns(UserWarning, match="the stream ended after"):
        itda = build(model, data, HOOK, BuildConfig(k=4, n_atoms=5000, tokens=50_000, context_size=32, progress=False))
    assert itda[HOOK].cfg.metadata.itda_build["tokens_judged"] == int((rows != 0).sum())


def test_tokenised_data_gives_the_same_dictionary(model):
    config = BuildConfig(**QUICK)
    text = build(model, embedded.dataset(), HOOK, config)[HOOK]
    rows = Dataset.from_dict({"tokens": _packed(128)})
    tokens = build(model, rows, HOOK, config)[HOOK]
    torch.testing.assert_close(tokens.atoms.data, text.atoms.data)
    assert rows.format["type"] is None, "the user's dataset is left as it was"


def test_positions_outside_a_slice_and_other_heads_are_left_out(model):
    config = BuildConfig(**QUICK, seqpos_slice=(10, -5))
    positions = build(model, embedded.dataset(), HOOK, config)[HOOK].provenance.position
    assert positions.min() >= 10
    assert positions.max() < 123
    hook = "blocks.2.attn.hook_z"
    head = build(model, embedded.dataset(), hook, BuildConfig(**QUICK, hook_head_index=2))[hook]
    assert head.cfg.d_in == 24
    assert head.cfg.metadata.hook_head_index == 2
    tokens = head.provenance.tokens(3)
    x = activation(model, tokens, hook).view(4, 24)[2] - head.b_dec.data
    torch.testing.assert_close(head.atoms.data[3], normalize(x, dim=0), rtol=1e-3, atol=1e-4)


def test_a_threshold_alone_sets_no_other_limit(model):
    config = BuildConfig(k=4, threshold=0.3, progress=False)
    assert (config.n_atoms, config.tokens) == (None, None)
    assert (BuildConfig().n_atoms, BuildConfig().tokens) == (4096, 1_000_000)
    data = embedded.dataset().select(range(60))
    itda = build(model, data, HOOK, config)[HOOK]
    read = sum(int((tokens != 0).sum()) for tokens, _ in token_batches(model, data, context_size=128, batch_size=8))
    assert itda.cfg.metadata.itda_build["tokens_judged"] == read


def test_the_seeds_are_different_models():
    texts = {seed: activation(embedded.model(seed), [0, 5, 6]) for seed in embedded.SEEDS}
    assert not torch.allclose(texts[0], texts[1], atol=1e-2)
    assert not torch.allclose(texts[1], texts[2], atol=1e-2)


@pytest.mark.parametrize(
    ("hooks", "settings", "message"),
    [
        (
            "blocks.3.hook_resid_pots",
            {},
            r"no hook point 'blocks.3.hook_resid_pots'. Near it: blocks.3.hook_resid_post",
        ),
        ([], {}, "hook_names is empty"),
        ([HOOK, HOOK], {}, "named twice"),
        (HOOK, {"k": 0}, "k must be a whole number of at least 1, got 0"),
        (HOOK, {"k": 65}, "k is 65, but the dictionary shall have n_atoms=64"),
        (HOOK, {"tokens": 10}, "budget too small"),
        (HOOK, {"threshold": 1.5}, "can't be reached"),
        (HOOK, {"loss": "paper", "center": False, "threshold": 0.03}, r"between 0 and 0.0208333"),
        (HOOK, {"context_size": 129}, "between 2 and the 128 positions"),
        (HOOK, {"batch_size": 0}, "batch_size must be at least 1"),
        (HOOK, {"seqpos_slice": (200,) * 2}, "leaves no position"),
        ("blocks.2.attn.hook_z", {"hook_head_index": 7}, "hook_head_index 7 does not fit"),
    ],
)
def test_bad_settings_are_named_before_the_data_is_touched(model, hooks, settings, message):
    with pytest.raises(ValueError, match=message):
        build(model, "no-such-dataset.txt", hooks, BuildConfig(**(QUICK | settings)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Dataset.from_dict({"text": []}), "is empty"),
        (Dataset.from_dict({"body": ["a"]}), r"no column 'tokens' or .*only \['body'\]"),
        (DatasetDict({"test": Dataset.from_dict({"text": ["a"]})}), r"no split 'train', only \['test'\]"),
        ("nowhere/at/all.txt", "there is no file or folder nowhere/at/all.txt"),
    ],
)
def test_bad_data_is_named(model, data, message):
    with pytest.raises(ValueError, match=message):
        build(model, data, HOOK, BuildConfig(**QUICK))


def test_text_from_files_and_folders(tmp_path):
    data = Dataset.from_dict({"text": ["One.", "Two,\nstill two."], "id": [1, 2]})
    data.to_json(tmp_path / "a.jsonl")
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    (tmp_path / "a.txt").write_text("One.\n\nTwo,\nstill two.\n", encoding="utf8")
    for name in ("a.jsonl", "a.parquet", "saved", "splits", "a.txt"):
        assert [text.strip() for text in load_text(str(tmp_path / name))["text"]] == data["text"][:], name
    renamed = data.rename_column("text", "body")
    assert load_text(renamed, column="body")["text"][:] == data["text"][:]
    (tmp_path / "a.pdf").write_text("One.")
    for bad, message in [("a.pdf", "has the ending '.pdf'"), (".", "save_to_disk")]:
        with pytest.raises(ValueError, match=message):
            load_text(tmp_path / bad)


def test_what_was_built_outlives_a_failure(model):
    hooks = [HOOK, "blocks.1.hook_resid_post"]
    calls = []

    def break_later(activations: torch.Tensor, hook: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            activations = activations.clone()
            activations[2, 5, 0] = torch.nan
        return activations

    config = BuildConfig(**(QUICK | {"tokens": 20_000}), batch_size=16)
    with (
        model.hooks(fwd_hooks=[(HOOK, break_later)]),
        pytest.raises(ValueError, match=r"sequence 34 \(number 2 of this call\) at position 5") as failure,
    ):
        build(model, embedded.dataset(), hooks, config)
    kept = failure.value.itdas
    assert set(kept) == set(hooks)
    assert all(isinstance(itda, ITDA) and 10 < itda.cfg.d_sae <= 64 for itda in kept.values())
    assert int(kept[HOOK].provenance.row.max()) < 34
