"""Bad input is an error that says what is wrong, never another dictionary than was meant.

More on this: invalid values and rows off unit length in test_saelens.py (points 4 and 15), damaged provenance in
test_provenance.py, hooks and prompts in test_evals.py and test_build.py.
"""

import json
import math
import re
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
from sae_lens.saes.sae import SAEMetadata
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from itda_lens import ITDA, Provenance, cli, embedded, evals, interpret
from itda_lens.streams import check_model, hooked_model_from_folder

N, D, K = 20, 6, 2
WEIGHTS = "sae_weights.safetensors"
DTYPES = ["float32", "float64", "bfloat16", "float16"]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def itda_of(seed: int, n: int = N, **cfg: object) -> ITDA:
    row, position = torch.arange(n), torch.full((n,), 2)
    sequences = {r: torch.arange(3) + 100 * r + seed for r in range(n)}
    return ITDA.from_atoms(
        normalize(gaussian(n, D, seed=seed), dim=-1),
        K,
        bias=gaussian(D, seed=seed + 50),
        provenance=Provenance.from_tokens(row, position, sequences, embedded.model(0).tokenizer),
        metadata={"model_name": "a-model", "hook_name": "blocks.1.attn.hook_z"},
        **({"reshape_activations": "none"} | cfg),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    itda_of(seed=1).save_model(folder / "itda")
    itda_of(seed=2).save_model(folder / "other")
    topk = TopKSAE(TopKSAEConfig(d_in=D, d_sae=N, k=K))
    topk.save_model(folder / "topk")
    return folder


@pytest.fixture
def saved(folders, tmp_path) -> Path:
    return shutil.copytree(folders / "itda", tmp_path / "itda")


def from_disk(kind: type[SAE], folder: Path, dtype: str = "float32") -> SAE:
    return kind.load_from_disk(folder, dtype=dtype)


def from_hub(kind: type[SAE], folder: Path, dtype: str = "float32") -> SAE:
    def download(repo_id: str, folder_name: str, device: str, force_download: bool, cfg_overrides: dict[str, object]):
        return *sae_lens_disk_loader(folder, device, cfg_overrides), None

    return kind.from_pretrained("someone/some-saes", "an-sae", dtype=dtype, converter=download)


every_way = pytest.mark.parametrize("load", [from_disk, from_hub])


def assert_refused(folder: Path, message: str, **how: str) -> None:
    for load in (from_disk, from_hub):
        for kind in (SAE, ITDA):
            with pytest.raises(ValueError, match=message):
                load(kind, folder, **how)


def edit_config(folder: Path, *, without: str | None = None, **changes: object) -> None:
    path = folder / "cfg.json"
    cfg = json.loads(path.read_text()) | changes
    part, _, key = (without or "").rpartition(".")
    (cfg[part] if part else cfg).pop(key, None)
    path.write_text(json.dumps(cfg))


def edit_weights(folder: Path, *, without: str | None = None, **changes: Tensor) -> None:
    weights = load_file(folder / WEIGHTS) | changes
    weights.pop(without or "", None)
    save_file(weights, folder / WEIGHTS)


@every_way
def test_another_architecture_is_named_by_us_and_loaded_by_sae_lens(folders, load):
    with pytest.raises(ValueError, match=r"holds a 'topk' SAE, not an ITDA: use SAE\.load_from_disk"):
        load(ITDA, folders / "topk")
    assert type(load(SAE, folders / "topk")) is TopKSAE
    assert type(load(SAE, folders / "itda")) is type(load(ITDA, folders / "itda")) is ITDA


def test_the_weights_of_another_architecture_are_named(folders, saved):
    shutil.copy(folders / "topk" / WEIGHTS, saved)
    assert_refused(saved, "the weights hold W_enc, b_enc besides W_dec and b_dec: this is not an ITDA")
    edit_weights(saved, without="W_dec")
    assert_refused(saved, "the weights have no W_dec, only .*'W_enc'")


def test_a_weights_file_truncated_anywhere_is_refused(saved):
    whole = (saved / WEIGHTS).read_bytes()
    for length in range(0, len(whole), 41):
        (saved / WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(SafetensorError):
            SAE.load_from_disk(saved)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_flipped_bit_is_refused_or_changes_nothing(saved, dtype):
    """In half precision, bits that the cast drops are not seen."""
    itda, whole, loaded = SAE.load_from_disk(saved, dtype=dtype), (saved / WEIGHTS).read_bytes(), 0
    for i in range(0, len(whole), 11):
        damaged = bytearray(whole)
        damaged[i] ^= 1 << i % 8
        (saved / WEIGHTS).write_bytes(damaged)
        with suppress(ValueError, SafetensorError):
            found = SAE.load_from_disk(saved, dtype=dtype)
            assert torch.equal(found.W_dec, itda.W_dec)
            assert torch.equal(found.b_dec, itda.b_dec)
            assert found.provenance.prompts == itda.provenance.prompts
            assert found.provenance.identities("tokens") == itda.provenance.identities("tokens")
            loaded += 1
    assert loaded < len(whole) / 11 / (20 if dtype in ("float32", "float64") else 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bit", range(32))
def test_a_flipped_bit_of_the_bias_is_refused_or_changes_nothing(saved, dtype, bit):
    own, expected = load_file(saved / WEIGHTS)["b_dec"], SAE.load_from_disk(saved, dtype=dtype).b_dec
    own.view(torch.int32)[3] ^= torch.tensor(1 << bit).to(torch.int32)
    edit_weights(saved, b_dec=own)
    with suppress(ValueError):
        assert torch.equal(SAE.load_from_disk(saved, dtype=dtype).b_dec, expected)
        assert dtype in ("bfloat16", "float16"), "float32 and float64 hold every bit"


@pytest.mark.parametrize("dtype", DTYPES)
def test_atoms_and_provenance_of_different_dictionaries_are_not_mixed(folders, saved, dtype):
    own, other = load_file(saved / WEIGHTS), load_file(folders / "other" / WEIGHTS)
    for atoms in (other["W_dec"], own["W_dec"].roll(1, dims=0)):
        edit_weights(saved, W_dec=atoms)
        assert_refused(saved, rf"atom \d is not what was saved \(\d\d of {N + 1} rows differ\)", dtype=dtype)
    edit_weights(saved, W_dec=own["W_dec"], provenance=other["provenance"])
    assert_refused(saved, "the provenance is not the one that was saved with these atoms", dtype=dtype)
    edit_weights(saved, without="provenance")
    assert_refused(saved, "the provenance is not the one that was saved with these atoms", dtype=dtype)


def test_a_number_of_atoms_that_does_not_fit_is_named(folders, saved):
    own = load_file(saved / WEIGHTS)
    edit_weights(saved, provenance=itda_of(seed=1, n=N + 1).provenance.to_bytes())
    assert_refused(saved, f"the provenance names {N + 1} atoms, but the dictionary has {N}")
    edit_weights(saved, W_dec=own["W_dec"][:-1])
    assert_refused(saved, rf"W_dec has shape \({N - 1}, {D}\), but the configuration \(d_sae={N}, d_in={D}\)")
    edit_config(saved, d_sae=N - 1)
    edit_weights(saved, provenance=own["provenance"])
    assert_refused(saved, f"the provenance names {N} atoms, but the dictionary has {N - 1}")
    bare = itda_of(seed=1)
    bare.provenance = None
    bare.save_model(saved)
    edit_config(saved, d_sae=N - 1)
    edit_weights(saved, W_dec=own["W_dec"][:-1])
    assert_refused(saved, f"there are {N - 1} atoms, but {N} were saved")


@pytest.mark.parametrize("dtype", DTYPES)
def test_edited_rows_are_named(saved, dtype):
    own = load_file(saved / WEIGHTS)
    atoms, bias = own["W_dec"].clone(), own["b_dec"].clone()
    atoms[7] *= -1
    edit_weights(saved, W_dec=atoms)
    assert_refused(saved, rf"atom 7 is not what was saved \(1 of {N + 1} rows differ\)", dtype=dtype)
    bias[2] += 1
    edit_weights(saved, W_dec=own["W_dec"], b_dec=bias)
    assert_refused(saved, rf"b_dec is not what was saved \(1 of {N + 1} rows differ\)", dtype=dtype)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_named(saved, bad):
    own = load_file(saved / WEIGHTS)
    atoms, bias = own["W_dec"].clone(), own["b_dec"].clone()
    atoms[7, 1] = bias[1] = bad
    edit_weights(saved, W_dec=atoms)
    assert_refused(saved, "atom 7 holds NaN or infinite values")
    edit_weights(saved, W_dec=own["W_dec"], b_dec=bias)
    assert_refused(saved, "b_dec holds NaN or infinite values")


def test_a_note_that_was_edited_is_refused(saved):
    note = load_file(saved / WEIGHTS)["note"]
    assert b'"k": 2' in note.numpy().tobytes()
    edited = bytearray(note.numpy().tobytes().replace(b'"k": 2', b'"k": 3'))
    for content in (torch.frombuffer(edited, dtype=torch.uint8), note[:-1], note[:3], note[:0]):
        edit_weights(saved, note=content)
        assert_refused(saved, "the note in the weights file is not as it was written")


def test_weights_without_a_note_are_taken_as_they_are(folders, saved):
    """Whoever writes an ITDA by other means than `save_model` has none."""
    edit_weights(saved, W_dec=load_file(folders / "other" / WEIGHTS)["W_dec"], without="note")
    assert_close(SAE.load_from_disk(saved).W_dec.data, itda_of(seed=2).W_dec.data)


@pytest.mark.parametrize(
    ("cfg", "lost"),
    [
        ({}, "k"),
        ({"nonnegative": True}, "nonnegative"),
        ({"apply_b_dec_to_input": False}, "apply_b_dec_to_input"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations"),
        ({"reshape_activations": "hook_z"}, "reshape_activations"),
        ({}, "metadata"),
        ({}, "metadata.hook_name"),
        ({}, "metadata.model_name"),
        ({}, "metadata.sae_lens_version"),
    ],
)
def test_a_missing_key_never_becomes_a_default(tmp_path, cfg, lost):
    itda_of(seed=1, n=40, **cfg).save_model(tmp_path)
    edit_config(tmp_path, without=lost)
    assert_refused(tmp_path, rf"(?=.*\b{lost.rpartition('.')[2]}\b)(?=.*cfg\.json)")


@pytest.mark.parametrize("lost", ["d_in", "d_sae", "dtype", "architecture"])
def test_a_key_that_sae_lens_misses_is_named(saved, lost):
    edit_config(saved, without=lost)
    with pytest.raises((TypeError, KeyError), match=lost):
        SAE.load_from_disk(saved)


def test_settings_that_were_edited_are_refused_with_the_way_out(saved):
    edit_config(saved, k=1)
    assert_refused(saved, r"k is 1, but this ITDA was saved with 2.*itda\.with_k")


def test_metadata_that_were_edited_are_refused_with_the_way_out(saved):
    cfg = json.loads((saved / "cfg.json").read_text())
    for name, value in {"model_name": "another", "hook_name": "blocks.2.hook_resid_post", "prepend_bos": True}.items():
        edit_config(saved, metadata=cfg["metadata"] | {name: value})
        assert_refused(
            saved, rf"metadata\.{name} is {value!r}, .* saved with .*set itda\.cfg\.metadata\.{name} in code"
        )


def test_unknown_keys_are_ignored(saved):
    cfg = json.loads((saved / "cfg.json").read_text())
    edit_config(saved, metadata=cfg["metadata"] | {"more": 1}, something_newer=1)
    assert SAE.load_from_disk(saved).cfg.metadata.more == 1


def test_a_dtype_that_does_not_exist_is_named(saved):
    edit_config(saved, dtype="float7")
    with pytest.raises(ValueError, match="Invalid dtype: float7"):
        SAE.load_from_disk(saved)
    with pytest.raises(ValueError, match="Invalid dtype: float8"):
        SAE.load_from_disk(saved, dtype="float8")


@pytest.mark.parametrize("sparse", [False, True])
def test_activations_of_another_width_are_named(sparse):
    itda = itda_of(seed=1, use_sparse_activations=sparse)
    message = rf"shape \(3, {D + 1}\), hence width {D + 1}.*have width {D}.* blocks.1.attn.hook_z of a-model"
    for call in (itda, itda.encode, itda.encode_sparse):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(3, D + 1))
    with pytest.raises(ValueError, match=f"width {D}"):
        itda(torch.tensor(1.0))


def test_a_hook_of_another_width_is_named_by_the_model_and_by_us(model, built):
    wide = built.with_k(8)
    wide.cfg.metadata.hook_name = "blocks.3.mlp.hook_post"
    tokens = model.to_tokens("Return the list")
    with pytest.raises(ValueError, match="hence width 384, but this dictionary's atoms have width 96"):
        model.run_with_saes(tokens, saes=[wide])
    with pytest.raises(ValueError, match="hence width 384, but this dictionary's atoms have width 96"):
        interpret.explain(wide, model, "Return the list")
    with pytest.raises(ValueError, match=r"'wide' takes activations of width 96, .*hook_post.* have width 384"):
        evals.evaluate({"wide": wide}, model, embedded.dataset("heldout"))
    topk = TopKSAE(TopKSAEConfig(d_in=40, d_sae=50, k=4))
    topk.cfg.metadata = built.cfg.metadata
    with pytest.raises(ValueError, match=r"'topk' takes activations of width 40, .* have width 96"):
        evals.evaluate(topk, model, embedded.dataset("heldout"))


def test_a_model_of_another_name_is_refused_by_every_entry_point(built, tmp_path, capsys):
    other = embedded.model(1)
    both = "'itda-embedded-seed0', but was given 'itda-embedded-seed1'.*set metadata.model_name"
    foreign = TopKSAE(TopKSAEConfig(d_in=96, d_sae=50, k=4))
    foreign.cfg.metadata = built.cfg.metadata
    for call in (
        lambda: evals.evaluate(built, other, embedded.dataset("heldout")),
        lambda: evals.evaluate({"foreign": foreign}, other, embedded.dataset("heldout")),
        lambda: evals.random_activations(built, other, embedded.dataset("train")),
        lambda: interpret.explain(built, other, "Return the list"),
    ):
        with pytest.raises(ValueError, match=both):
            call()
    built.save_model(tmp_path)
    for arguments in (
        ["eval", "--saes", tmp_path, "--dataset", "embedded:heldout"],
        ["eval", "--saes", tmp_path, "--dataset", "embedded:heldout", "--built-on", "embedded"],
        ["explain", "--itda", tmp_path, "--prompt", "Return the list"],
    ):
        with pytest.raises(SystemExit):
            cli.main([*map(str, arguments), "--model", "embedded:1"])
        assert re.search(both, capsys.readouterr().err.replace("\n", " "))


def test_a_dictionary_that_names_no_model_or_hook_is_taken_or_asked_for_it(model, built):
    nameless = built.with_k(8)
    nameless.cfg.metadata.model_name = None
    assert interpret.explain(nameless, embedded.model(1), "Return the list")
    assert evals.evaluate(nameless, model, embedded.dataset("heldout"), batch_size=2, n_batches=1).shape[0] == 1
    nameless.cfg.metadata.hook_name = None
    for call in (interpret.explain, evals.evaluate):
        with pytest.raises(ValueError, match="lacks hook_name"):
            call(nameless, model, "Return the list")


@pytest.mark.parametrize(
    ("named", "given", "same"),
    [
        ("gpt2-small", "gpt2", True),
        ("gpt2", "openai-community/gpt2", True),
        ("openai-community/gpt2", "gpt2-small", True),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped", True),
        ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B", True),
        ("gpt2", "/models/gpt2-small", True),
        ("my-model", "/home/someone/my-model/", True),
        ("itda-embedded-seed0", str(embedded.path(0)), True),
        ("itda-embedded-seed0", str(embedded.path(1)), False),
        ("gpt2", "gpt2-medium", False),
        ("gpt2", "distilgpt2", False),
        ("pythia-70m", "pythia-70m-deduped", False),
        ("/models/mine", "/models/yours", False),
    ],
)
def test_one_model_may_have_several_names(named, given, same):
    model = SimpleNamespace(cfg=SimpleNamespace(model_name=given))
    check = getattr(check_model, "__wrapped__", check_model)  # without the run-time check of its model's type
    if same:
        check(SAEMetadata(model_name=named), model)
    else:
        with pytest.raises(ValueError, match=f"{named!r}, but was given {given!r}"):
            check(SAEMetadata(model_name=named), model)


def test_a_folder_gives_its_model_one_name_however_it_is_written():
    folder = str(embedded.path(0))
    names = {hooked_model_from_folder(path).cfg.model_name for path in (folder, folder + "/", embedded.path(0))}
    assert names == {"seed0"}


@pytest.mark.parametrize("command", ["eval", "explain"])
@pytest.mark.parametrize("damage", ["truncated", "no JSON", "no architecture", "unknown architecture", "no file"])
def test_the_command_line_names_the_folder_that_it_can_not_load(saved, command, damage, capsys):
    if damage == "truncated":
        (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:500])
    elif damage == "no file":
        (saved / WEIGHTS).unlink()
    elif damage == "no JSON":
        (saved / "cfg.json").write_text("{")
    else:
        edit_config(saved, without="architecture", **({} if damage == "no architecture" else {"architecture": "x"}))
    rest = ["--dataset", "embedded:heldout"] if command == "eval" else ["--prompt", "Return"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--saes" if command == "eval" else "--itda", str(saved), *rest])
    assert stopped.value.code == 2
    assert f"{saved} can't be loaded" in capsys.readouterr().err.replace("\n", "")
