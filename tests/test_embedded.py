"""The embedded models and text: reproducible, as good as recorded, and offline."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from itda_lens import embedded
from itda_lens.embedded import text
from itda_lens.embedded.train import heldout_loss, token_stream


@pytest.mark.parametrize("seed", embedded.SEEDS)
def test_heldout_loss_is_as_recorded(seed):
    """With room for other versions of Python, whose documentation differs a little."""
    folder = embedded.path(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loss = heldout_loss(hf_model, token_stream(tokenizer, "heldout"), tokenizer.bos_token_id)
    recorded = json.loads((folder / "train.json").read_text())["heldout_loss"]
    assert loss == pytest.approx(recorded, abs=0.15)
    assert recorded < 3.8


def test_hooked_and_hugging_face_logits_agree(model):
    hf_model = AutoModelForCausalLM.from_pretrained(embedded.path(0), dtype=torch.float32)
    tokens = model.to_tokens("If the optional argument is given, return a list")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf_model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert model.cfg.normalization_type == "LN", "weights are not processed"


def test_models_are_small_and_share_one_tokenizer():
    folders = [embedded.path(seed) for seed in embedded.SEEDS]
    assert len({(folder / "tokenizer.json").read_bytes() for folder in folders}) == 1
    for folder in folders:
        assert (folder / "model.safetensors").stat().st_size < 2.5e6
    assert sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folders[0]).parameters()) < 1.2e6


def test_documents_split_by_name():
    train, heldout = embedded.dataset("train"), embedded.dataset("heldout")
    names = [set(train["name"]), set(heldout["name"])]
    assert not names[0] & names[1]
    assert all(text.is_heldout(name) for name in names[1])
    share = len(heldout) / (len(train) + len(heldout))
    assert 0.07 < share < 0.13
    assert sum(map(len, train["text"])) > 1_000_000
    assert embedded.dataset()["name"][:] == train["name"][:]


def test_a_python_without_docstrings_is_told_so(monkeypatch):
    monkeypatch.setattr(text, "_docstrings", lambda: iter(()))
    text._documents.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="without its sources or documentation"):
            embedded.dataset()
    finally:
        text._documents.cache_clear()


def test_bad_names_are_refused():
    with pytest.raises(ValueError, match=r"embedded models of the seeds \(0, 1, 2\), got 3"):
        embedded.model(3)
    with pytest.raises(ValueError, match="'train' or 'heldout', got 'test'"):
        text.dataset.__wrapped__("test")
