"""Saving and loading: whole or refused, whatever happens on the way."""

import json
import resource
import shutil
import stat
import threading
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.attack import kills
from itda_lens import ITDA, Provenance, integrity

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
DTYPES = ["float32", "float64", "bfloat16", "float16"]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def itda_of(seed: int, **more: object) -> ITDA:
    """ITDAs that differ in all that may differ: size, width, settings, metadata, provenance."""
    n, d, kind = 20 + seed, 6 + seed, ("resid_pre", "resid_post", "mlp_out")[seed % 3]
    return ITDA.from_atoms(
        normalize(gaussian(n, d, seed=seed), dim=-1),
        2 + seed % 3,
        bias=gaussian(d, seed=seed + 50),
        provenance=None if seed % 3 == 2 else Provenance(torch.arange(n), torch.full((n,), seed)),
        metadata={"model_name": "a-model", "hook_name": f"blocks.{seed}.hook_{kind}"},
        orthogonal=seed % 2 == 1,
        **more,
    )


def state(itda: ITDA) -> tuple:
    """What two ITDAs share exactly when they are the same."""
    prov, x = itda.provenance, gaussian(4, itda.cfg.d_in, seed=9)
    places = None if prov is None else (prov.row.tolist(), prov.position.tolist())
    tensors = [t.tolist() for t in (itda.W_dec, itda.b_dec, itda.encode(x), itda(x))]
    return itda.cfg.to_dict(), places, tensors


def mixture(folder: Path, old: ITDA, new: ITDA) -> None:
    """The folder as it is between the two renames of an overwriting save."""
    old.save_model(folder)
    cfg = (folder / CFG).read_bytes()
    new.save_model(folder)
    (folder / CFG).write_bytes(cfg)


@pytest.mark.parametrize("old", range(3))
@pytest.mark.parametrize("new", range(3))
@pytest.mark.parametrize("kind", [SAE, ITDA])
def test_a_save_that_was_interrupted_between_its_files_loads_as_the_new_one(tmp_path, old, new, kind):
    mixture(tmp_path, itda_of(old), itda_of(new))
    assert state(kind.load_from_disk(tmp_path)) == state(itda_of(new))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_interrupted_save_loads_in_every_dtype_as_the_whole_one_does(tmp_path, dtype):
    mixture(tmp_path / "mixture", itda_of(0), itda_of(4))
    itda_of(4).save_model(tmp_path / "whole")
    found, whole = (SAE.load_from_disk(tmp_path / name, dtype=dtype) for name in ("mixture", "whole"))
    assert state(found) == state(whole)


def test_interrupted_saves_one_after_the_other_load_as_the_last_and_are_mended_by_a_whole_one(tmp_path):
    itdas = [itda_of(seed) for seed in range(4)]
    itdas[0].save_model(tmp_path)
    cfg = (tmp_path / CFG).read_bytes()
    for itda in itdas[1:]:
        itda.save_model(tmp_path)
        (tmp_path / CFG).write_bytes(cfg)
        assert state(SAE.load_from_disk(tmp_path)) == state(itda)
    SAE.load_from_disk(tmp_path).save_model(tmp_path)
    assert json.loads((tmp_path / CFG).read_text()) == itdas[-1].cfg.to_dict()


def test_the_configuration_of_any_other_itda_is_refused(tmp_path):
    """One of the same sizes and settings, too: the metadata tell them apart."""
    itdas = [itda_of(0), itda_of(1), itda_of(0)]
    itdas[2].cfg.metadata.hook_name = "blocks.7.hook_resid_pre"
    for i, itda in enumerate(itdas):
        itda.save_model(tmp_path / str(i))
    for i, j in [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2)]:
        shutil.copytree(tmp_path / str(i), tmp_path / f"{i}{j}")
        shutil.copy(tmp_path / str(j) / CFG, tmp_path / f"{i}{j}")
        with pytest.raises(ValueError, match=r"edited|is another's"):
            SAE.load_from_disk(tmp_path / f"{i}{j}")


def test_a_killed_save_leaves_the_old_or_the_new_and_what_else_was_there():
    steps, moments = kills.run(scale=0.025, seed=0)
    for found in (steps, moments):
        assert found["mixed"] == found["refused"] == 0
        assert found["first"] + found["second"] == found["kills"] >= 5
    assert steps["first"] > steps["second"] > 0
    assert steps["between the files"] == 1


def test_savers_at_once_leave_one_of_them(tmp_path):
    itdas = [itda_of(seed) for seed in range(3)]
    threads = [threading.Thread(target=lambda i=i: [i.save_model(tmp_path) for _ in range(15)]) for i in itdas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state(SAE.load_from_disk(tmp_path)) in [state(itda) for itda in itdas]
    assert {path.name for path in tmp_path.iterdir()} == {CFG, WEIGHTS}


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    itda_of(0).save_model(tmp_path)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 500, (tmp_path / WEIGHTS).stat().st_size - 1):  # as a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))
        try:
            with pytest.raises((OSError, SafetensorError)):
                itda_of(1).save_model(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        assert state(SAE.load_from_disk(tmp_path)) == state(itda_of(0))
    assert {path.name for path in tmp_path.iterdir()} == {CFG, WEIGHTS}
    assert state(SAE.load_from_disk(tmp_path)) == state(itda_of(0))
    wrong = itda_of(1)
    wrong.cfg.metadata.itda_build = {1, 2}
    with pytest.raises(TypeError, match="not JSON serializable"):
        wrong.save_model(tmp_path)
    assert state(SAE.load_from_disk(tmp_path)) == state(itda_of(0))


def test_it_is_saved_where_it_is_told_to(tmp_path, monkeypatch):
    """A folder with parents, a link to one, where one works, one that holds another SAE's broken configuration."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    for folder in ("../a/b", tmp_path / "link", "."):
        for seed in (0, 1):
            assert itda_of(seed).save_model(folder) == (Path(folder) / WEIGHTS, Path(folder) / CFG)
            assert state(SAE.load_from_disk(folder)) == state(itda_of(seed))
    assert (tmp_path / "link").is_symlink()
    for content in ("", "[]", "{}", '{"architecture": "itda"}', '{"metadata": null}', '{"architecture": "foreign"}'):
        Path(CFG).write_text(content)
        itda_of(0).save_model(".")
        assert state(SAE.load_from_disk(".")) == state(itda_of(0))


def test_the_files_have_the_rights_that_they_had(tmp_path):
    itda_of(0).save_model(tmp_path)
    for name, mode in {CFG: 0o664, WEIGHTS: 0o640}.items():
        (tmp_path / name).chmod(mode)
        itda_of(1).save_model(tmp_path)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


@pytest.mark.parametrize("saved_as", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loaded_itda_does_not_change_with_its_file(tmp_path, saved_as, dtype):
    itda_of(0).to(saved_as).save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path, dtype=dtype)
    before, size = state(loaded), (tmp_path / WEIGHTS).stat().st_size
    with (tmp_path / WEIGHTS).open("r+b") as file:  # in place, as other programs may write
        file.write(b"\x11" * size)
    assert state(loaded) == before


@pytest.mark.parametrize("saved_as", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_other_value_is_refused_in_whichever_dtype_it_is_loaded(tmp_path, saved_as, dtype):
    """The least change that the dtype can show, in any place."""
    itda_of(0).to(saved_as).save_model(tmp_path)
    SAE.load_from_disk(tmp_path, dtype=dtype)
    whole, random = load_file(tmp_path / WEIGHTS), torch.Generator().manual_seed(0)
    coarser = max(saved_as, getattr(torch, dtype), key=lambda t: torch.finfo(t).eps)
    for name in ("W_dec", "b_dec") * 5:
        changed = whole[name].clone()
        where = [int(torch.randint(size, (1,), generator=random)) for size in changed.shape]
        changed[tuple(where)] *= 1 + 4 * torch.finfo(coarser).eps
        save_file(whole | {name: changed}, tmp_path / WEIGHTS)
        row = f"atom {where[0]}" if name == "W_dec" else "b_dec"
        with pytest.raises(ValueError, match=rf"({row}|some value) is not what was saved"):
            SAE.load_from_disk(tmp_path, dtype=dtype)


def test_a_note_of_an_earlier_version_is_checked_as_it_was(tmp_path):
    itda = itda_of(0)
    itda.save_model(tmp_path)
    whole = load_file(tmp_path / WEIGHTS)
    content = integrity.read(whole["note"], whole)
    settings = (
        "k",
        "orthogonal",
        "nonnegative",
        "apply_b_dec_to_input",
        "normalize_activations",
        "reshape_activations",
    )
    older = {
        "settings": {name: content["settings"][name] for name in settings},
        "metadata": sorted(content["metadata"]),
        "provenance": content["provenance"],
        "products": content["products"],
    }
    body = json.dumps(older).encode()
    note = torch.frombuffer(bytearray(integrity._digest([body]) + body), dtype=torch.uint8)
    save_file(whole | {"note": note}, tmp_path / WEIGHTS)
    for dtype in DTYPES:
        SAE.load_from_disk(tmp_path, dtype=dtype)
    assert state(SAE.load_from_disk(tmp_path)) == state(itda)
    save_file(whole | {"note": note, "W_dec": whole["W_dec"].roll(1, dims=0)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"atom \d is not what was saved"):
        SAE.load_from_disk(tmp_path)


def test_metadata_that_could_not_be_read_again_are_refused_before_anything_is_written(tmp_path):
    itda = itda_of(0)
    itda.cfg.metadata.itda_build = {"text": "x" * (5 << 20)}
    with pytest.raises(ValueError, match="the metadata is larger than the 4,194,304 bytes"):
        itda.save_model(tmp_path / "new")
    assert not (tmp_path / "new").exists()
