"""The hub, both ways, with a folder in its place."""

from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.training import upload_saes_to_huggingface as uploading

import itda_lens.hub
from itda_lens import ITDA, upload

REPO = "someone/some-itdas"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """SAELens's and our own calls of the hub's client, kept in a folder."""

    class Client:
        def repo_info(self, repo_id: str) -> None:
            assert repo_id == REPO

        def file_exists(self, repo_id: str, filename: str, revision: str) -> bool:
            return (tmp_path / filename).exists()

        def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, **_: object) -> None:
            (tmp_path / path_in_repo).write_bytes(path_or_fileobj)

        def upload_folder(
            self, *, folder_path: Path, path_in_repo: str, allow_patterns: list[str], **_: object
        ) -> None:
            (tmp_path / path_in_repo).mkdir(parents=True)
            for name in allow_patterns:
                if (folder_path / name).exists():
                    (tmp_path / path_in_repo / name).write_bytes((folder_path / name).read_bytes())

    def download(repo_id: str, filename: str, **_: object) -> str:
        if not (tmp_path / filename).exists():
            raise loaders.EntryNotFoundError("no such file")
        return str(tmp_path / filename)

    monkeypatch.setattr(uploading, "HfApi", Client)
    monkeypatch.setattr(itda_lens.hub, "HfApi", Client)
    monkeypatch.setattr(loaders, "hf_hub_download", download)
    return tmp_path


def test_17_what_is_uploaded_comes_back_whole_and_its_page_says_how(hub, built):
    with pytest.warns(UserWarning, match=r"holds [\d,]+ characters of text from embedded.*provenance='positions'"):
        upload({"layers/3": built}, REPO, show_progress=False)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    for kind in (SAE, ITDA):
        loaded = kind.from_pretrained(REPO, "layers/3")
        assert isinstance(loaded, ITDA)
        assert torch.equal(loaded(x), built(x))
        assert loaded.provenance.identities() == built.provenance.identities()
    assert Path(built.cfg.metadata.model_path).is_absolute()
    for path in hub.rglob("*.*"):
        assert built.cfg.metadata.model_path.encode() not in path.read_bytes()
    page = (hub / "README.md").read_text()
    code = page[page.index("```python") + 9 : page.index("```", page.index("```python") + 9)]
    scope: dict[str, object] = {}
    exec(code, scope)
    assert torch.equal(scope["itda"](x), built(x))
    assert f"`{built.provenance.prompt(0)[0]}«{built.provenance.prompt(0)[1]}»`" in page
    assert "| `layers/3` | `itda-embedded-seed0` | `blocks.3.hook_resid_post` | 256 | 8 |" in page


def test_a_page_that_is_there_is_left_alone(hub, built):
    (hub / "README.md").write_text("mine")
    upload({"a": built}, REPO, provenance="none", show_progress=False)
    assert (hub / "README.md").read_text() == "mine"


@pytest.mark.parametrize("published", ["positions", "none"])
def test_text_is_published_only_when_asked_for(hub, built, published, recwarn):
    upload({"a": built}, REPO, provenance=published, show_progress=False)
    assert not [w for w in recwarn if "characters of text" in str(w.message)]
    provenance = ITDA.from_pretrained(REPO, "a").provenance
    if published == "none":
        assert provenance is None
    else:
        assert provenance.kinds == ("position",)
        assert provenance.identities("position") == built.provenance.identities("position")
    phrases = [before[-25:] for before, _ in built.provenance.prompts if len(before) > 25]
    for path in hub.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not any(phrase.encode() in content for phrase in phrases)
    assert "text" in built.provenance.kinds, "the dictionary itself is left as it was"


def test_bad_arguments_are_named_before_anything_is_sent(hub, built):
    with pytest.raises(ValueError, match="'full', 'positions' or 'none', got 'some'"):
        upload({"a": built}, REPO, provenance="some")
    with pytest.raises(ValueError, match="itdas is empty"):
        upload({}, REPO)
    assert not list(hub.iterdir())
