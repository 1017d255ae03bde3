"""The paper's artifacts: read whole, checked, and never executed."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from itda_lens import DictionaryBuilder, load_paper_artifact


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def artifact(tmp_path):
    """What the released code writes for a dictionary of its own selection."""
    x = torch.randn(6, 10, 12, generator=torch.Generator().manual_seed(0))
    builder = DictionaryBuilder.paper(12, k=3, threshold=0.01)
    builder.update(x)
    itda = builder.to_itda()
    torch.save(itda.atoms.data, tmp_path / "atoms.pt")
    torch.save(torch.stack([itda.provenance.row, itda.provenance.position], dim=1), tmp_path / "atom_indices.pt")
    settings = "{lm_name: gpt2, layer: 5, k: 3, dataset: NeelNanda/pile-10k, seq_len: 128, loss_threshold: 0.01}"
    (tmp_path / "metadata.yaml").write_text(settings)
    return tmp_path, itda, x


def test_an_artifact_is_the_dictionary_that_was_saved(artifact):
    folder, itda, x = artifact
    loaded = load_paper_artifact(folder)
    assert loaded.provenance.identities("position") == itda.provenance.identities("position")
    torch.testing.assert_close(loaded(x), itda(x))
    metadata = loaded.cfg.metadata
    assert (metadata.model_name, metadata.hook_name) == ("gpt2", "blocks.5.hook_resid_post")
    assert (metadata.context_size, metadata.dataset_path) == (128, "NeelNanda/pile-10k")
    assert load_paper_artifact(folder, k=7).cfg.k == 7
    loaded.save_model(folder / "saved")


def test_without_a_k_it_is_the_released_code_s_default(artifact):
    folder, _, _ = artifact
    (folder / "metadata.yaml").write_text("{lm_name: gpt2, layer: 5}")
    assert load_paper_artifact(folder).cfg.k == 40


def test_nothing_in_a_file_is_executed(artifact):
    folder, _, _ = artifact
    (folder / "atoms.pt").write_bytes(pickle.dumps(Bomb(folder / "exploded")))
    with pytest.raises(ValueError, match=r"atoms.pt can't be read as a tensor"):
        load_paper_artifact(folder)
    (folder / "metadata.yaml").write_text(f"!!python/object/apply:os.mkdir ['{folder / 'exploded'}']")
    with pytest.raises(ValueError):  # noqa: PT011
        load_paper_artifact(folder)
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("atoms.pt", torch.zeros(3), "not rows of atoms"),
        ("atoms.pt", {"atoms": 1}, "holds a dict, not a tensor"),
        ("atoms.pt", 3 * torch.eye(12), "atom_indices.pt holds shape"),
        ("atom_indices.pt", torch.zeros(5, 2), "atoms need whole numbers of shape"),
        ("metadata.yaml", "- a\n- b", "holds a list, not settings by name"),
        ("metadata.yaml", "{a: [", "is no YAML"),
    ],
)
def test_what_does_not_fit_is_named(artifact, name, content, message):
    folder, _, _ = artifact
    if isinstance(content, str):
        (folder / name).write_text(content)
    else:
        torch.save(content, folder / name)
    with pytest.raises(ValueError, match=message):
        load_paper_artifact(folder)


def test_a_missing_file_is_named(artifact):
    folder, _, _ = artifact
    (folder / "atom_indices.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks atom_indices\.pt"):
        load_paper_artifact(folder)
