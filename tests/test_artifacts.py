"""The paper's artifacts: read whole, checked, and never executed."""

import os
import pickle
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


@pytest.mark.parametrize("k", ["null", "2.9", "true", ".inf", "-1", "0", "'3'", "[3]", "1e3", "2020-01-01"])
def test_a_k_that_is_no_whole_number_is_named_with_the_way_out(artifact, k):
    folder, _, _ = artifact
    (folder / "metadata.yaml").write_text(f"{{lm_name: gpt2, layer: 5, k: {k}}}")
    with pytest.raises(ValueError, match=r"k is .*, but must be a whole number.*load_paper_artifact\(folder, k=40\)"):
        load_paper_artifact(folder)
    assert load_paper_artifact(folder, k=2).cfg.k == 2


@pytest.mark.parametrize(
    "setting",
    [
        *(
            "layer: -1",
            "layer: 1.5",
            "layer: [1]",
            "layer: ../5",
            "lm_name: [gpt2]",
            "lm_name: 5",
            "dataset: 2020-01-01",
        ),
        *("seq_len: 0", "seq_len: .nan", "loss_threshold: .nan", "loss_threshold: high", "loss_threshold: !!set {1}"),
    ],
)
def test_settings_of_another_type_are_named(artifact, setting):
    folder, _, _ = artifact
    (folder / "metadata.yaml").write_text(f"k: 3\n{setting}")
    with pytest.raises(ValueError, match=rf"{setting.partition(':')[0]} in .*metadata.yaml is .*, but must be"):
        load_paper_artifact(folder)


def doubling(levels: int) -> str:
    """YAML of which each line is nine times the one before."""
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join(9 * [f'*a{i - 1}'])}]" for i in range(1, levels)]
    return "\n".join([*lines, f"lm_name: *a{levels - 1}"])


@pytest.mark.parametrize(
    "content",
    [
        doubling(30),
        "lm_name: &a [*a]",
        "[" * 60_000,
        "a: {" * 20_000,
        "k: " + "9" * 5000,
        "a: &b {k: 3}\n<<: *b",
        b"\xff",
        "#" * 70_000,
        "k: 3\nk2: 2020-99-99",
        "\0",
        "k: !!python/name:os.system",
        "? [k]\n: 3",
    ],
    ids=range(12),
)
def test_yaml_that_does_not_end_is_refused_at_once(artifact, content):
    folder, _, _ = artifact
    (folder / "metadata.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"metadata\.yaml"):
        load_paper_artifact(folder)


def test_tensors_that_are_not_dense_numbers_are_named(artifact):
    folder, itda, _ = artifact
    n, d = itda.W_dec.shape
    places = torch.load(folder / "atom_indices.pt")
    repeated = itda.W_dec.data[:1, :1].expand(10**6, 10**6)  # 4 TB, of 4 bytes
    odd = {
        "atoms.pt": [
            itda.W_dec.data.to_sparse(),
            torch.eye(n, d, dtype=torch.complex64),
            torch.empty(n, d, device="meta"),
        ],
        "atom_indices.pt": [
            places.bool(),
            places.to(torch.complex64),
            places.to_sparse(),
            places[:1].clone().expand(n, 2),
        ],
    }
    odd["atoms.pt"] += [repeated, torch.zeros(n, d).to(torch.float8_e4m3fn), torch.ones(n, d, dtype=torch.int64)]
    odd["atom_indices.pt"] += [-1 - places, places[:, :1], places.double(), places.to(torch.uint64)]
    for name, tensors in odd.items():
        whole = (folder / name).read_bytes()
        for tensor in tensors:
            torch.save(tensor, folder / name)
            with pytest.raises(ValueError, match=name):
                load_paper_artifact(folder)
        (folder / name).write_bytes(whole)
    torch.save(torch.nn.Parameter(itda.W_dec.data.double()), folder / "atoms.pt")
    torch.save(places.to(torch.int16), folder / "atom_indices.pt")
    assert torch.equal(load_paper_artifact(folder).W_dec, itda.W_dec)


@settings(
    deadline=None, max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_files_that_were_damaged_anywhere_are_a_value_error_or_an_artifact(artifact, data):
    folder, _, _ = artifact
    name = data.draw(st.sampled_from(["atoms.pt", "atom_indices.pt", "metadata.yaml"]))
    whole = (folder / name).read_bytes()
    damage = data.draw(st.sampled_from(["none of it", "garbage", "truncated", "flipped", "inserted"]))
    at = data.draw(st.integers(0, len(whole) - 1))
    piece = data.draw(st.binary(min_size=1, max_size=8))
    content = {
        "none of it": b"",
        "garbage": piece * 20,
        "truncated": whole[:at],
        "flipped": whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :],
        "inserted": whole[:at] + piece + whole[at:],
    }[damage]
    (folder / name).write_bytes(content)
    try:
        with warnings.catch_warnings(), suppress(ValueError):
            warnings.simplefilter("ignore")  # PyTorch's, of pickles that it does not know
            assert load_paper_artifact(folder).provenance.row.min() >= 0
    finally:
        (folder / name).write_bytes(whole)


def test_a_compressed_file_can_not_become_more_than_it_is(artifact):
    """PyTorch stores its tensors as they are."""
    folder, _, _ = artifact
    torch.save(torch.zeros(1000, 1000), folder / "zeros.pt")
    with zipfile.ZipFile(folder / "zeros.pt") as plain, zipfile.ZipFile(folder / "atoms.pt", "w", 8) as compressed:
        for entry in plain.namelist():
            compressed.writestr(entry, plain.read(entry))
    with pytest.raises(ValueError, match=r"atoms.pt would become 4,00\d,\d\d\d bytes, more than it has"):
        load_paper_artifact(folder)


def test_a_missing_file_is_named(artifact):
    folder, _, _ = artifact
    (folder / "atom_indices.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks atom_indices\.pt"):
        load_paper_artifact(folder)
