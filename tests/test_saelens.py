"""What SAELens asks of an architecture, in 28 numbered points: registration, weights, codes, files and metadata.

Point 17 is in test_hub.py and point 25 in test_saebench.py.
"""

import copy
import json
import math
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import MISSING, fields
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import sae_lens
import torch
from packaging.requirements import Requirement
from sae_lens import SAE, ActivationsStore, SAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.evals import EvalConfig, get_featurewise_weight_based_metrics, run_evals
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_class
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.topk_sae import TopK
from sae_lens.training import upload_saes_to_huggingface as uploading
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from itda_lens import (
    ITDA,
    BuildConfig,
    DictionaryBuilder,
    ITDAConfig,
    Provenance,
    build,
    cli,
    embedded,
    evals,
    interpret,
)
from itda_lens.pursuit import matching_pursuit_reference

HOOK = "blocks.3.hook_resid_post"
METADATA = {"model_name": "a-model", "hook_name": HOOK, "context_size": 64, "prepend_bos": True}
N, D, K = 48, 16, 4


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit_rows(n: int = N, d: int = D, seed: int = 1) -> Tensor:
    return nn.functional.normalize(gaussian(n, d, seed=seed), dim=-1)


def small_itda(bias: float = 1.0, provenance: Provenance | None = None, **cfg) -> ITDA:
    return ITDA.from_atoms(
        unit_rows(), K, bias=bias * gaussian(D, seed=2), provenance=provenance, metadata=METADATA, **cfg
    )


def same(x: Tensor, hook: object) -> Tensor:
    return x


def watched(itda: ITDA, watch: bool):
    """Pursuit takes another path while somebody watches its correlations."""
    return itda.hooks([("hook_sae_acts_pre", same)]) if watch else nullcontext()


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "cfg.json"
    cfg = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in cfg.items() if value is not MISSING}))


def edit_weights(folder: Path, **changes: Tensor) -> None:
    path = folder / "sae_weights.safetensors"
    save_file(load_file(path) | changes, path)


@pytest.fixture
def saved(tmp_path):
    small_itda().save_model(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture(scope="module")
def fresh_interpreter(tmp_path_factory):
    """What a Python that has not imported us yet sees, step by step."""
    folder = tmp_path_factory.mktemp("fresh")
    small_itda().save_model(folder)
    script = """
import importlib, json, sys
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.registry import SAE_CLASS_REGISTRY
seen, classes = {}, []
load = lambda: type(SAE.load_from_disk(sys.argv[1]))
try:
    load()
except Exception as e:
    seen["loading without the import"] = repr(e)
import itda_lens.sae
classes.append((load(), itda_lens.sae.ITDA))
importlib.reload(itda_lens.sae)
classes.append((load(), itda_lens.sae.ITDA))
for name in [name for name in sys.modules if name.startswith("itda_lens")]:
    del sys.modules[name]
import itda_lens.sae
classes.append((load(), itda_lens.ITDA))
seen["an ITDA after the import, a reload and another import"] = [loaded is ours for loaded, ours in classes]
seen["the stale classes differ"] = len({ours for _, ours in classes}) == 3
SAE_CLASS_REGISTRY["itda"] = foreign = (StandardSAE, StandardSAEConfig)
try:
    importlib.reload(itda_lens.sae)
except RuntimeError as e:
    seen["a foreign class"] = str(e)
seen["the foreign class stays"] = SAE_CLASS_REGISTRY["itda"] is foreign
print(json.dumps(seen))
"""
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def model():
    return embedded.model(0)


@pytest.fixture(scope="module")
def built(model):
    config = BuildConfig(k=8, n_atoms=64, tokens=1000, context_size=64, dataset_name="prose", progress=False)
    return build(model, embedded.dataset("train"), HOOK, config)[HOOK]


@pytest.fixture(scope="module")
def detailed_provenance():
    """Rows, positions and tokens that no float type but float64 could hold, and prompts beyond ASCII."""
    generator = torch.Generator().manual_seed(3)
    row = 2**40 + 2 * torch.randperm(N, generator=generator) + 1
    position = torch.randint(300, (N,), generator=generator)
    sequences = {r: torch.randint(2**24, (300,), generator=generator) for r in row.tolist()}
    prompts = tuple((f"naïve {i} …", f" 活{i}") for i in range(N))
    return Provenance(row, position, sequences, prompts, "a digest")


def test_01_importing_the_package_registers_the_architecture(saved):
    assert get_sae_class("itda") == (ITDA, ITDAConfig)
    assert type(SAE.load_from_disk(saved)) is ITDA


def test_01_without_the_import_loading_raises_a_bare_key_error(fresh_interpreter):
    assert fresh_interpreter["loading without the import"] == "KeyError('itda')"


def test_02_importing_and_reloading_again_replaces_our_class(fresh_interpreter):
    assert fresh_interpreter["an ITDA after the import, a reload and another import"] == [True, True, True]
    assert fresh_interpreter["the stale classes differ"]


def test_02_a_foreign_class_is_refused_and_left_in_place(fresh_interpreter):
    assert "sae_lens.saes.standard_sae" in fresh_interpreter["a foreign class"]
    assert fresh_interpreter["the foreign class stays"]


def test_03_there_is_no_training_class():
    assert "itda" not in SAE_TRAINING_CLASS_REGISTRY  # the choices of SAELens's own `--architecture`
    with pytest.raises(KeyError, match="itda"):
        TrainingSAE.from_dict(small_itda().cfg.to_dict())


def test_04_every_own_field_has_a_default():
    own = {f.name: f for f in fields(ITDAConfig) if f.name not in {g.name for g in fields(SAEConfig)}}
    assert "k" in own
    assert all(f.default is not MISSING or f.default_factory is not MISSING for f in own.values())


@pytest.mark.parametrize(
    "wrong",
    [
        *({"k": wrong} for wrong in (0, -1, 2.5, "4", None, True)),
        {"d_in": 0},
        {"d_sae": 0},
        {"nonnegative": "yes"},
        {"use_sparse_activations": None},
        {"apply_b_dec_to_input": 0.5},
        {"reshape_activations": "hook_q"},
        {"normalize_activations": "covariance_whitening"},
        {"normalize_activations": 1},
    ],
    ids=str,
)
def test_04_invalid_values_are_refused_in_code_and_in_files(saved, wrong):
    [name] = wrong
    with pytest.raises(ValueError, match=rf"^{name}"):
        ITDAConfig(**({"d_in": D, "d_sae": N} | wrong))
    edit_config(saved, **wrong)
    with pytest.raises(ValueError, match=rf"^{name}"):
        SAE.load_from_disk(saved)


def test_04_unknown_keys_are_ignored_and_missing_ones_are_errors(saved):
    edit_config(saved, something_newer=1)
    assert SAE.load_from_disk(saved).cfg.k == K
    edit_config(saved, d_in=MISSING)
    with pytest.raises(TypeError, match="d_in"):
        SAE.load_from_disk(saved)


def test_05_the_atoms_are_a_contiguous_parameter_of_unit_rows(saved):
    transposed = unit_rows().T.contiguous().T
    fresh = SAE.from_dict(small_itda().cfg.to_dict())
    for itda in (ITDA.from_atoms(transposed, K), fresh, SAE.load_from_disk(saved), small_itda().crop(20)):
        assert isinstance(itda.W_dec, nn.Parameter)
        assert itda.W_dec.is_contiguous()
        assert_close(itda.W_dec.norm(dim=-1), torch.ones(itda.cfg.d_sae))


def test_05_initialising_works_on_the_meta_device():
    itda = ITDA(ITDAConfig(d_in=D, d_sae=N, k=K, device="meta"))
    itda.initialize_weights()
    assert {name: (p.device.type, p.shape) for name, p in itda.named_parameters()} == {
        "W_dec": ("meta", (N, D)),
        "b_dec": ("meta", (D,)),
    }


def test_06_the_encoder_is_the_transposed_decoder_and_no_weight_of_its_own():
    itda = small_itda()
    assert "W_enc" not in itda.state_dict()
    itda.W_dec.data = unit_rows(seed=5)
    assert torch.equal(itda.W_enc, unit_rows(seed=5).T)


def test_06_weight_based_metrics_are_finite():
    metrics = get_featurewise_weight_based_metrics(small_itda())
    assert_close(torch.tensor(metrics["encoder_norm"]), torch.ones(N))
    assert_close(torch.tensor(metrics["encoder_decoder_cosine_sim"]), torch.ones(N))


def test_07_b_dec_is_a_parameter_of_zeros_or_the_given_bias():
    itda, without = small_itda(), ITDA.from_atoms(unit_rows(), K)
    assert isinstance(itda.b_dec, nn.Parameter)
    assert torch.equal(itda.b_dec, gaussian(D, seed=2))
    assert torch.equal(without.b_dec, torch.zeros(D))


def test_07_there_is_neither_b_enc_nor_a_buffer():
    itda = small_itda()
    itda(gaussian(3, D))
    assert "encoder_bias" not in get_featurewise_weight_based_metrics(itda)
    assert set(itda.state_dict()) == {"W_dec", "b_dec"}
    assert not list(itda.buffers())


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize("shape", [(D,), (5, D), (2, 3, D), (2, 1, 3, D), (0, D), (2, 0, D)], ids=str)
def test_08_any_leading_shape_is_encoded_row_by_row(shape, watch, sparse):
    itda, x = small_itda(), gaussian(*shape)
    rows = x.reshape(-1, D)
    codes, recons = itda.encode(rows), itda(rows)
    itda.cfg.use_sparse_activations = sparse
    with watched(itda, watch):
        acts, decoded = itda.encode(x), itda(x)
    assert acts.is_sparse == sparse
    assert_close(acts.to_dense(), codes.reshape(*shape[:-1], N))
    assert_close(decoded, recons.reshape(shape))


@pytest.mark.parametrize("bias", [0.0, 1.0])
@pytest.mark.parametrize("watch", [False, True])
def test_08_the_bias_itself_has_no_atoms(bias, watch):
    itda = small_itda(bias=bias)
    with watched(itda, watch):
        assert not itda.encode(itda.b_dec).any()
        assert torch.equal(itda(itda.b_dec), itda.b_dec)


@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_08_a_row_that_is_not_finite_becomes_nan_alone(watch, sparse, bad):
    itda, x = small_itda(use_sparse_activations=sparse), gaussian(6, D)
    clean = itda(x)
    x[2, 3] = bad
    with watched(itda, watch):
        recons = itda(x)
    others = [0, 1, 3, 4, 5]
    assert recons[2].isnan().all()
    assert_close(recons[others], clean[others])


def test_09_codes_are_dense_and_may_be_edited_in_place():
    itda, x = small_itda(), gaussian(6, D)
    untouched, before = x.clone(), itda.encode(x).detach().clone()
    acts = itda.encode(x)
    assert acts.layout == torch.strided
    acts[:, 7] = 5.0
    assert_close(itda.encode(x), before)
    assert torch.equal(x, untouched)


def test_09_a_call_in_inference_mode_leaves_nothing_behind():
    itda, x = small_itda(), gaussian(6, D).requires_grad_()
    with torch.inference_mode():
        itda(x)
    acts = itda.encode(x)
    assert not acts.is_inference()
    acts.sum().backward()
    assert x.grad is not None
    assert itda.W_dec.grad is not None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_09_sparse_codes_are_opt_in_and_decode_to_the_same(dtype, tolerance):
    dense = small_itda().to(dtype)
    sparse = small_itda(use_sparse_activations=True).to(dtype)
    x = gaussian(2, 3, D).to(dtype)
    acts = sparse.encode(x)
    assert acts.layout == torch.sparse_coo
    assert acts.dtype == dtype
    assert_close(acts.to_dense(), dense.encode(x))
    assert_close(sparse(x), dense(x), rtol=tolerance, atol=tolerance)


def test_09_hooks_on_sparse_codes_see_them_dense():
    itda, x, seen = small_itda(use_sparse_activations=True), gaussian(3, D), []
    with itda.hooks([("hook_sae_acts_post", lambda acts, hook: seen.append(acts))]):
        itda(x)
    assert_close(seen[0], small_itda().encode(x))


@pytest.mark.parametrize("watch", [False, True])
def test_10_coefficients_have_the_gradients_of_finite_differences(watch):
    itda = ITDA.from_atoms(unit_rows(8, 4).double(), 3, bias=gaussian(4, seed=2))
    x, atoms = gaussian(2, 4).double().requires_grad_(), itda.W_dec.detach().clone().requires_grad_()

    def reconstruct(atoms: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(itda, {"W_dec": atoms}, (x,))

    with watched(itda, watch):
        assert torch.autograd.gradcheck(itda.encode, (x,))
        assert torch.autograd.gradcheck(reconstruct, (atoms, x))


def test_10_backward_hooks_get_the_gradient_of_the_codes():
    itda, x, grads = small_itda(), gaussian(3, D), []
    with itda.hooks(bwd_hooks=[("hook_sae_acts_post", lambda grad, hook: grads.append(grad))]):
        (itda(x) * gaussian(3, D, seed=4)).sum().backward()
    assert_close(grads, [gaussian(3, D, seed=4) @ unit_rows().T])


def test_11_each_hook_fires_once_and_holds_what_its_name_says():
    itda, x, seen = small_itda(), gaussian(3, D), []
    centered, codes = x - itda.b_dec, itda.encode(x)
    with itda.hooks([(lambda name: name != "", lambda value, hook: seen.append((hook.name, value.clone())))]):
        recons = itda(x)
    names = [name for name, _ in seen]
    assert names == ["hook_sae_input", *(f"hook_sae_{p}" for p in ("acts_pre", "acts_post", "recons", "output"))]
    cache = dict(seen)
    assert_close(cache["hook_sae_acts_pre"], centered @ unit_rows().T)
    assert_close(cache["hook_sae_acts_post"], codes)
    assert_close(cache["hook_sae_recons"], recons)


def test_11_pursuit_leaves_cached_correlations_alone():
    itda, x = small_itda(), gaussian(3, D)
    _, cache = itda.run_with_cache(x)
    assert_close(cache["hook_sae_acts_pre"], (x - itda.b_dec) @ unit_rows().T)


def test_11_what_a_hook_returns_is_used():
    itda, x, other = small_itda(), gaussian(3, D), gaussian(3, D, seed=6)
    correlations = (other - itda.b_dec) @ itda.W_enc
    with itda.hooks([("hook_sae_acts_pre", lambda acts, hook: correlations)]):
        assert_close(itda.encode(x), itda.encode(other))
    replacement = gaussian(3, N, seed=7)
    with itda.hooks([("hook_sae_acts_post", lambda acts, hook: replacement)]):
        assert_close(itda(x), replacement @ itda.W_dec + itda.b_dec)


def test_11_an_ablated_correlation_keeps_its_atom_out():
    itda, x = small_itda(), gaussian(8, D)
    first = int(itda.encode_sparse(x).indices[0, 0])

    def ablate(correlations: Tensor, hook: object) -> Tensor:
        correlations[:, first] = 0
        return correlations

    with itda.hooks([("hook_sae_acts_pre", ablate)]):
        assert itda.encode_sparse(x).indices[0, 0] == first
        assert itda.encode(x)[0].argmax() != first


def test_11_features_reach_the_cache_of_a_model(model, built):
    _, cache = model.run_with_cache_with_saes(embedded.dataset("heldout")["text"][0], saes=[built])
    pre, post = (cache[f"{HOOK}.hook_sae_acts_{when}"] for when in ("pre", "post"))
    assert pre.shape == post.shape
    assert ((post != 0).sum(dim=-1) <= 8).all()
    assert (post != 0).any(dim=-1).all()


@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_12_half_precision_activations_get_the_atoms_of_a_double_precision_pursuit(dtype, watch):
    n, d, k = 512, 64, 16
    itda = ITDA.from_atoms(unit_rows(n, d), k).to(dtype)
    x = gaussian(200, d).to(dtype)

    def support(loop_dtype: torch.dtype) -> Tensor:
        codes = matching_pursuit_reference(x.to(loop_dtype), itda.W_dec.detach().to(loop_dtype), k)
        return codes.to_dense(n) != 0

    exact = support(torch.float64)
    with watched(itda, watch):
        acts = itda.encode(x)
    assert acts.dtype == dtype
    assert ((acts != 0) == exact).all(dim=-1).float().mean() > 0.99
    assert (support(dtype) == exact).all(dim=-1).float().mean() < 0.99  # a loop in this dtype would not do


@pytest.mark.parametrize("watch", [False, True])
def test_12_squares_beyond_the_range_of_half_precision_do_no_harm(watch):
    itda, x = ITDA.from_atoms(unit_rows(), K), (1e4 * gaussian(20, D)).half()
    expected = itda(x.float())
    itda.to(torch.float16)
    with watched(itda, watch):
        assert_close(itda(x).float(), expected, rtol=0.01, atol=100)


def test_12_coefficients_beyond_the_range_of_half_precision_are_found():
    itda, x = ITDA.from_atoms(unit_rows(), K), (3e4 * gaussian(20, D)).clamp(-6e4, 6e4).half()
    expected = itda.encode_sparse(x.float())
    codes = itda.to(torch.float16).encode_sparse(x)
    assert expected.values.max() > torch.finfo(torch.float16).max
    assert_close(codes.values, expected.values, rtol=0.01, atol=100)


def test_13_exactly_two_files_are_written(tmp_path, detailed_provenance):
    small_itda(provenance=detailed_provenance).save_model(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"cfg.json", "sae_weights.safetensors"}


def test_13_what_saelens_uploads_is_the_whole_itda(tmp_path, monkeypatch, detailed_provenance):
    class Hub:
        def repo_info(self, repo_id):
            pass

        def upload_folder(self, *, folder_path, path_in_repo, allow_patterns, **_):
            (tmp_path / path_in_repo).mkdir()
            for file in folder_path.iterdir():
                if file.name in allow_patterns:
                    (tmp_path / path_in_repo / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(uploading, "HfApi", Hub)
    itda, x = small_itda(provenance=detailed_provenance), gaussian(5, D)
    uploading.upload_saes_to_huggingface({"layer_3": itda}, "someone/some-saes", add_default_readme=False)
    downloaded = SAE.load_from_disk(tmp_path / "layer_3")
    assert torch.equal(downloaded(x), itda(x))
    assert downloaded.cfg.metadata == itda.cfg.metadata
    assert downloaded.provenance.identities() == detailed_provenance.identities()


@pytest.mark.parametrize("saved_as", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_14_provenance_survives_every_cast_of_the_weights_file(tmp_path, detailed_provenance, saved_as, dtype):
    small_itda(provenance=detailed_provenance).to(saved_as).save_model(tmp_path / "first")
    SAE.load_from_disk(tmp_path / "first", dtype=dtype).save_model(tmp_path / "second")
    loaded = SAE.load_from_disk(tmp_path / "second").provenance
    assert torch.equal(loaded.row, detailed_provenance.row)
    assert torch.equal(loaded.position, detailed_provenance.position)
    assert [loaded.tokens(i) for i in range(N)] == [detailed_provenance.tokens(i) for i in range(N)]
    assert loaded.prompts == detailed_provenance.prompts
    assert loaded.tokenizer_digest == detailed_provenance.tokenizer_digest


def test_14_provenance_is_compressed_bytes_inside_the_weights_and_not_in_the_metadata(tmp_path, detailed_provenance):
    itda = small_itda(provenance=detailed_provenance)
    itda.save_model(tmp_path)
    stored = load_file(tmp_path / "sae_weights.safetensors")
    assert set(stored) == {"W_dec", "b_dec", "note", "provenance"}
    packed = stored["provenance"]
    assert packed.dtype == torch.uint8
    assert set(packed.tolist()) == set(range(256))  # so the casts above were tried on every byte
    tokens = sum(len(sequence) for sequence in detailed_provenance.sequences.values())
    assert packed.numel() < 4 * tokens
    assert itda.cfg.to_dict()["metadata"].keys() == small_itda().cfg.to_dict()["metadata"].keys()


def test_14_an_itda_without_provenance_is_saved_and_loaded_without(saved):
    assert set(load_file(saved / "sae_weights.safetensors")) == {"W_dec", "b_dec", "note"}
    assert SAE.load_from_disk(saved).provenance is None


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_15_narrow_files_read_as_float32_get_unit_rows_again(tmp_path, narrow):
    small_itda().to(narrow).save_model(tmp_path)
    stored = load_file(tmp_path / "sae_weights.safetensors")["W_dec"].float()
    loaded = SAE.load_from_disk(tmp_path, dtype="float32")
    assert (stored.norm(dim=-1) - 1).abs().max() > 1e-5
    assert_close(loaded.W_dec.norm(dim=-1), torch.ones(N), rtol=0, atol=1e-5)
    assert_close(loaded.W_dec, nn.functional.normalize(stored, dim=-1))


@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_15_rows_far_off_unit_length_are_refused(saved, factor):
    atoms = load_file(saved / "sae_weights.safetensors")["W_dec"]
    atoms[5] *= factor
    edit_weights(saved, W_dec=atoms)
    with pytest.raises(ValueError, match="atom 5 "):
        SAE.load_from_disk(saved)


def test_15_a_float32_round_trip_is_exact_bit_for_bit(saved):
    itda, loaded, x = small_itda(), SAE.load_from_disk(saved), gaussian(5, D)
    assert torch.equal(loaded.W_dec, itda.W_dec)
    assert torch.equal(loaded.b_dec, itda.b_dec)
    assert torch.equal(loaded(x), itda(x))


def test_16_the_version_stays_and_with_it_the_metadata(tmp_path, built):
    itda = small_itda()
    itdas = [itda, itda.crop(20), itda.with_k(2), built, DictionaryBuilder.from_itda(itda, threshold=0.5).to_itda()]
    for i, made in enumerate(itdas):
        assert made.cfg.metadata.sae_lens_version == sae_lens.__version__
        made.save_model(tmp_path / str(i))
        assert SAE.load_from_disk(tmp_path / str(i)).cfg.metadata == made.cfg.metadata
        assert made.cfg.metadata.hook_name == HOOK


def test_18_folding_the_norms_of_unit_rows_changes_nothing(saved):
    itda, x = small_itda(), gaussian(5, D)
    folded = SAE.load_from_disk(saved)
    folded.fold_W_dec_norm()
    assert torch.equal(folded.W_dec, itda.W_dec)
    assert torch.equal(folded(x), itda(x))
    assert_close(folded.fold_and_get_W_dec_norm(), torch.ones(N))


def test_18_folding_the_norms_of_other_rows_is_refused():
    itda = small_itda()
    itda.W_dec.data[5] *= 2
    with pytest.raises(NotImplementedError, match="atom 5 "):
        itda.fold_W_dec_norm()


def test_19_folding_a_scaling_factor_moves_only_the_bias():
    itda, x, scale = small_itda(normalize_activations="expected_average_only_in"), gaussian(5, D), 0.3
    acts, recons = itda.encode(scale * x), itda(scale * x)
    itda.fold_activation_norm_scaling_factor(scale)
    assert itda.cfg.normalize_activations == "none"
    assert torch.equal(itda.W_dec, unit_rows())
    assert_close(itda.encode(x), acts / scale)
    assert_close(itda(x), recons / scale)


def test_20_folding_a_whitening_is_refused():
    itda = small_itda()
    with pytest.raises(NotImplementedError, match="whiten"):
        itda.fold_activation_whitening(torch.zeros(D), torch.eye(D), torch.eye(D))
    assert torch.equal(itda.W_dec, unit_rows())


def test_21_layer_norm_works_with_atoms_of_that_space():
    x = gaussian(N, D)
    normed = (x - x.mean(dim=-1, keepdim=True)) / x.std(dim=-1, keepdim=True)
    itda = ITDA.from_atoms(nn.functional.normalize(normed, dim=-1), 1, normalize_activations="layer_norm")
    for activations in (x, 3 * x + 5):
        assert torch.equal(itda.encode(activations).argmax(dim=-1), torch.arange(N))
        assert_close(itda(activations), activations, rtol=1e-3, atol=1e-3)


def test_21_constant_norm_rescaling_gives_nan_on_zero_vectors_alone():
    itda = ITDA.from_atoms(unit_rows(), K, normalize_activations="constant_norm_rescale")
    x = gaussian(5, D)
    x[2] = 0
    recons = itda(x)
    assert recons[2].isnan().all()
    assert_close(recons[[0, 1, 3, 4]], ITDA.from_atoms(unit_rows(), K)(x[[0, 1, 3, 4]]))


def test_22_a_built_itda_has_the_metadata_that_saelens_reads(built):
    given = built.cfg.metadata.to_dict()
    expected = {
        "model_name": "itda-embedded-seed0",
        "hook_name": HOOK,
        "hook_head_index": None,
        "prepend_bos": True,
        "context_size": 64,
        "dataset_path": "prose",
        "seqpos_slice": [None],
        "exclude_special_tokens": True,
        "neuronpedia_id": None,
        "model_from_pretrained_kwargs": {},
    }
    assert {key: given[key] for key in expected} == expected


def test_22_the_metadata_of_a_built_itda_is_json_native(built):
    cfg = built.cfg.to_dict()
    assert json.loads(json.dumps(cfg, allow_nan=False)) == cfg


def test_22_a_store_can_be_made_from_a_built_itda(model, built):
    store = ActivationsStore.from_sae(model, built, embedded.dataset("heldout"), total_tokens=1)
    assert store.get_batch_tokens(2).shape == (2, 64)


def test_22_metadata_that_json_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="when"):
        ITDA.from_atoms(unit_rows(), K, metadata={"when": {1, 2}})


def test_23_the_activation_function_is_a_placeholder_that_leaves_the_encoder_whole():
    """sae-dashboard asks for a TopK; for any other it cuts `W_enc`, which is no weight here. See test_dashboard.py."""
    itda, x = small_itda(), gaussian(5, D)
    assert isinstance(itda.activation_fn, TopK)
    assert itda.activation_fn.k == K
    assert not torch.allclose(itda.activation_fn((x - itda.b_dec) @ itda.W_enc), itda.encode(x))
    with pytest.raises(KeyError, match="W_enc"):
        itda.W_enc = nn.Parameter(itda.W_enc[:, :3])


def test_24_a_dictionary_built_by_hand_from_a_store_is_the_one_that_build_gives(model, built):
    store = ActivationsStore.from_sae(
        model, built, embedded.dataset("train"), total_tokens=1, store_batch_size_prompts=3
    )
    builder, done = DictionaryBuilder(96, 8, n_atoms=64, tokens=1000, tokenizer=model.tokenizer), False
    while not done:
        tokens = store.get_batch_tokens()
        mask = tokens != model.tokenizer.bos_token_id
        done = builder.update(store.get_activations(tokens), tokens, mask).done
    by_hand = builder.to_itda()
    assert by_hand.provenance.identities() == built.provenance.identities()
    assert by_hand.provenance.identities("position") == built.provenance.identities("position")
    assert_close(by_hand.atoms, built.atoms)
    assert_close(by_hand.b_dec, built.b_dec)


def test_24_a_store_of_many_hooks_serves_a_builder_for_each(model):
    hooks = ["blocks.1.hook_resid_post", HOOK]
    store = ActivationsStore.from_config_multi_hook(
        model,
        dataset=embedded.dataset("train"),
        hook_names=hooks,
        hook_d_ins=dict.fromkeys(hooks, 96),
        context_size=64,
        total_training_tokens=1,
        store_batch_size_prompts=20,
    )
    tokens = store.get_batch_tokens()
    config = BuildConfig(k=8, n_atoms=64, tokens=1000, context_size=64, progress=False)
    together = build(model, embedded.dataset("train"), hooks, config)
    for hook, x in store.get_multi_hook_activations(tokens).items():
        builder = DictionaryBuilder(96, 8, n_atoms=64, tokens=1000)
        builder.update(x, tokens, tokens != model.tokenizer.bos_token_id)
        assert_close(builder.to_itda().atoms, together[hook].atoms)


@torch.no_grad()
def test_24_the_store_itself_shuffles_so_that_its_batches_have_no_provenance(model, built):
    def store() -> ActivationsStore:
        sizes = {"store_batch_size_prompts": 2, "n_batches_in_buffer": 2, "train_batch_size_tokens": 64}
        return ActivationsStore.from_sae(model, built, embedded.dataset("train"), total_tokens=1, **sizes)

    ordered = store().get_activations(store().get_batch_tokens(4)).flatten(0, 1)
    distance, place = (next(store()).reshape(64, 1, 96) - ordered).norm(dim=-1).min(dim=1)
    assert distance.max() < 1e-3  # the same activations,
    assert (place.diff() < 0).any()  # but not in order


@pytest.mark.parametrize("kind", ["itda", "topk"])
def test_26_the_evals_of_sae_lens_fail_for_any_sae_at_the_alias_of_a_bridge_s_hook(built, kind):
    """So `evaluate` refuses aliases: test_evals.py, test_what_sae_lens_leaves_unchecked_is_refused."""
    sae = built.with_k(8) if kind == "itda" else TopKSAE(TopKSAEConfig(d_in=96, d_sae=64, k=8))
    sae.cfg.metadata = copy.deepcopy(built.cfg.metadata)

    def score(hook_name: str) -> float:
        sae.cfg.metadata.hook_name = hook_name
        bridge = SAETransformerBridge.boot_transformers(str(embedded.path(0)), device="cpu")
        store = ActivationsStore.from_sae(bridge, sae, embedded.dataset("heldout"), total_tokens=1)
        config = EvalConfig(batch_size_prompts=2, n_eval_reconstruction_batches=1, compute_ce_loss=True)
        metrics, _ = run_evals(sae, store, bridge, ActivationScaler(), config)
        return metrics["model_performance_preservation"]["ce_loss_score"]

    assert score("blocks.3.hook_out") < 1
    with pytest.raises(ZeroDivisionError):
        score(HOOK)


def test_26_a_wrong_hook_name_is_skipped_by_sae_lens_and_refused_by_us(model, built, tmp_path, caplog, capsys):
    wrong = built.with_k(8)
    wrong.cfg.metadata.hook_name = "blocks.3.hook_resid_pots"
    tokens = model.to_tokens("Return the list")
    assert torch.equal(model.run_with_saes(tokens, saes=[wrong]), model(tokens))
    assert "No hook found for blocks.3.hook_resid_pots" in caplog.text

    train, heldout = embedded.dataset("train"), embedded.dataset("heldout")
    refused = r"no hook point 'blocks.3.hook_resid_pots'. Near it: blocks.3.hook_resid_post"
    for call in (
        lambda: build(model, train, wrong.cfg.metadata.hook_name),
        lambda: evals.evaluate(wrong, model, heldout),
        lambda: evals.random_activations(wrong, model, train),
        lambda: interpret.explain(wrong, model, "Return the list"),
    ):
        with pytest.raises(ValueError, match=refused):
            call()
    wrong.save_model(tmp_path)
    for arguments in (
        ["eval", "--saes", str(tmp_path), "--dataset", "embedded:heldout"],
        ["explain", "--itda", str(tmp_path), "--prompt", "Return the list"],
    ):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert "no hook point 'blocks.3.hook_resid_pots'" in capsys.readouterr().err


CASTS = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}


@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize("cast", CASTS)
def test_27_casts_that_bypass_sae_lens_do_what_its_own_does(cast, watch):
    x, dtype = gaussian(5, D), CASTS[cast]
    expected = small_itda().to(dtype)
    for owner in ("the ITDA", "a module around it"):
        itda = small_itda()
        itda(x)
        getattr(itda if owner == "the ITDA" else nn.ModuleList([itda]), cast)()
        assert (itda.dtype, itda.cfg.dtype) == (dtype, expected.cfg.dtype)
        with watched(itda, watch):
            acts, recons = itda.encode(x), itda(x)
        assert acts.dtype == recons.dtype == dtype
        assert_close(acts, expected.encode(x))
        assert_close(recons, expected(x))


def test_27_the_device_is_followed_too():
    itda = nn.ModuleList([small_itda()]).to("meta")[0]
    assert (itda.device.type, itda.cfg.device) == ("meta", "meta")


@pytest.mark.parametrize("use", ["before", "never before"])
@pytest.mark.parametrize("change", ["edited in place", "loaded", "assigned", "replaced"])
def test_27_new_atoms_are_noticed_however_they_come(change, use):
    itda, x = small_itda(), gaussian(50, D)
    other = ITDA.from_atoms(unit_rows(seed=9), K, bias=gaussian(D, seed=3))
    if use == "before":
        itda(x)
    if change == "edited in place":
        itda.W_dec.data[:] = other.W_dec.data
        itda.b_dec.data[:] = other.b_dec.data
    elif change == "replaced":
        itda.W_dec.data, itda.b_dec.data = other.W_dec.data, other.b_dec.data
    else:
        itda.load_state_dict(other.state_dict(), assign=change == "assigned")
    assert_close(itda.encode(x), other.encode(x))
    assert_close(itda(x), other(x))


@pytest.mark.parametrize("mode", ["none", "layer_norm", "constant_norm_rescale"])
def test_27_a_deep_copy_is_the_same_and_independent(mode, detailed_provenance):
    itda, x, y = small_itda(normalize_activations=mode, provenance=detailed_provenance), gaussian(5, D), gaussian(9, D)
    expected = itda(x), itda(y)
    copied = copy.deepcopy(itda)
    assert copied.provenance.identities() == itda.provenance.identities()
    acts = itda.encode(x)
    assert_close(copied(y), expected[1])  # between the two halves of the other's pass
    assert_close(itda.decode(acts), expected[0])
    copied.W_dec.data.neg_()
    copied.cfg.k = 1
    assert_close(itda(x), expected[0])


def test_27_a_copy_of_an_itda_of_heads_works_before_the_first_use():
    itda = ITDA.from_atoms(unit_rows(), K, metadata={"hook_name": "blocks.2.attn.hook_z"})
    x = gaussian(5, 4, D // 4)
    assert_close(copy.deepcopy(itda)(x), itda(x))


@pytest.mark.parametrize(("package", "removed"), [("transformer-lens", "4.0.0"), ("sae-lens", "7.0.0")])
def test_28_versions_that_break_us_are_capped(package, removed):
    """transformer-lens 4 has no `HookedTransformer`."""
    [allowed] = [r.specifier for r in map(Requirement, requires("itda-lens")) if r.name == package]
    assert version(package) in allowed
    assert removed not in allowed
