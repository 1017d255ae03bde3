"""Any causal model of Hugging Face is loaded as it is, or refused with a reason; and no model passes for another."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, BartConfig, Gemma3Config, GPT2Model, T5Config

from itda_lens import BuildConfig, build, embedded
from itda_lens.streams import agreement, check_model, load_model
from itda_lens.streams.models import check_model_name, is_bridge, listed, load_model_of, model_metadata
from tests.tiny_models import CONFIGS, configuration, make

REFUSED = {
    "GPT-2, untied, narrow MLP, unscaled attention": "HookedTransformer fails .* TransformerBridge differ by 0",
    "Falcon, new decoder": "TransformerBridge fails",
    "Falcon, ALiBi": "TransformerBridge differ by",
    "Cohere": "TransformerBridge differ by",
    "BERT": "is not causal: logits change by",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the model of a name, made once."""
    base = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = make(base / str(len(made)), configuration(name))
        return made[name]

    return of


def logits(model, tokens):
    with torch.no_grad():
        out = model(tokens)
    return getattr(out, "logits", out).float()


def loaded_or_why_not(path: Path):
    try:
        return load_model(path)
    except ValueError as e:
        return str(e)


def random_tokens(n: int, seed: int = 7):
    return torch.randint(1, 1000, (2, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_computes_what_hugging_face_s_own_does_at_any_length_or_is_refused_with_the_reason(name, folder):
    path = folder(name)
    model = loaded_or_why_not(path)
    if isinstance(model, str):
        assert re.search(REFUSED.get(name, "nothing may be wrong"), model)
        return
    assert name != "BERT"
    own = AutoConfig.from_pretrained(path)
    n_ctx = getattr(own, "max_position_embeddings", None) or getattr(own, "max_seq_len", None)
    assert n_ctx is None or model.cfg.n_ctx == n_ctx
    tokens = random_tokens(min(model.cfg.n_ctx, 96))
    expected = logits(AutoModelForCausalLM.from_pretrained(path), tokens)
    assert (logits(model, tokens) - expected).abs().max() < 1e-4 * max(1, expected.std())
    assert expected.std() > 0.3


def test_most_configurations_load_and_both_kinds_of_model_are_needed(folder):
    assert len(CONFIGS) - len(REFUSED) >= 40
    assert isinstance(load_model(folder("Llama")), HookedSAETransformer)
    assert isinstance(load_model(folder("Llama, yarn rope")), SAETransformerBridge)


@pytest.mark.parametrize("name", ["my-llama-runs/a", "gemma-3/1b", "bert-like"])
def test_what_a_folder_is_called_says_nothing_of_its_model(tmp_path, monkeypatch, folder, name):
    path = tmp_path / name
    shutil.copytree(folder("GPT-2"), path)
    monkeypatch.setenv("HOME", str(tmp_path))
    given = {"my-llama-runs/a": f"{path}/", "gemma-3/1b": path, "bert-like": "~/bert-like"}[name]
    model = load_model(given)
    assert isinstance(model, HookedSAETransformer)
    assert model.cfg.model_name == path.name
    with listed(path, "an-alias"):  # this is how SAEBench loads it
        theirs = HookedSAETransformer.from_pretrained_no_processing("an-alias", device="cpu")
    assert_close(logits(theirs, random_tokens(20)), logits(model, random_tokens(20)))


def test_a_folder_runs_in_half_precision_on_either_kind_of_model(folder):
    for name in ("Llama", "Gemma"):
        whole, half = load_model(folder(name)), load_model(folder(name), dtype="bfloat16")
        assert is_bridge(half) is is_bridge(whole) is (name == "Gemma")
        assert {half.cfg.dtype, *(p.dtype for p in half.parameters())} == {torch.bfloat16}
        assert agreement.difference(logits(half, random_tokens(20)), logits(whole, random_tokens(20))) < 0.15
    assert load_model(folder("Llama"), dtype=torch.float16).cfg.dtype == torch.float16


@pytest.fixture
def hub(tmp_path, monkeypatch, folder):
    """A cache of the hub that holds one model under a name that TransformerLens has never heard of."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--their-stable"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(folder("StableLM"), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_a_model_of_the_hub_is_one_model_under_its_name_and_in_its_cached_snapshot(hub):
    by_name, by_path = load_model("someone/their-stable"), load_model(hub)
    assert by_name.cfg.model_name == by_path.cfg.model_name == "someone/their-stable"
    assert torch.equal(logits(by_name, random_tokens(20)), logits(by_path, random_tokens(20)))
    for a, b in ((by_name, by_path), (by_path, by_name)):
        check_model(SAEMetadata(**model_metadata(a)), b)
    check_model_name(SAEMetadata(**model_metadata(by_name)), str(hub))
    assert model_metadata(by_name)["model_path"] is None


def test_what_can_not_be_used_is_refused_with_the_reason_and_the_way_out(tmp_path, folder):
    def without(file: str) -> Path:
        path = tmp_path / f"without {file.replace('*', 'any')}"
        shutil.copytree(folder("GPT-2"), path)
        for found in path.glob(file):
            found.unlink()
        return path

    bare = tmp_path / "bare"
    shutil.copytree(folder("GPT-2"), bare)
    GPT2Model.from_pretrained(bare).save_pretrained(bare)
    weights = AutoModelForCausalLM.from_pretrained(folder("Llama"))
    del weights.model.layers[2:]
    cut = tmp_path / "cut"
    shutil.copytree(folder("Llama"), cut)
    weights.save_pretrained(cut)
    shutil.copy(folder("Llama") / "config.json", cut)
    t5 = T5Config(d_model=32, vocab_size=2048, d_ff=64, num_layers=1, num_heads=4, d_kv=8)
    bart = BartConfig(d_model=32, vocab_size=2048, encoder_layers=1, decoder_layers=1, max_position_embeddings=96)
    for name, config in {"t5": t5, "bart": bart, "gemma3": Gemma3Config()}.items():
        config.save_pretrained(tmp_path / name)
    broken = without("tokenizer.json")
    unknown = without("no such file")
    (unknown / "config.json").write_text(json.dumps({"model_type": "of-tomorrow"}))
    for given, reason in {
        str(without("tokenizer*")): "has no tokenizer.*put the files of its tokenizer",
        str(broken): "has no tokenizer",
        str(without("config.json")): "it has no config.json",
        str(without("*.safetensors")): "Hugging Face can't load .*safetensors",
        str(unknown): "the configuration of .* can't be read.*of-tomorrow",
        str(cut): r"the weights of cut lack model\.layers\.2\.\S+ and \d+ more, which LlamaForCausalLM needs",
        str(tmp_path / "t5"): r"t5 \(t5\) is an encoder-decoder: only causal",
        str(tmp_path / "bart"): r"bart \(bart\) is an encoder-decoder: only causal",
        str(tmp_path / "gemma3"): r"gemma3 \(gemma3\) reads more than text.*save its language model alone",
        str(tmp_path / "nowhere"): "no Hugging Face model folder",
        "gpt3": "'gpt3' is neither a model that .* nor a local Hugging Face folder.*Near it: .*gpt2",
        "someone/nothing-like-it": "is neither a model that Hugging Face's hub gives",
    }.items():
        with pytest.raises(ValueError, match=reason):
            load_model(given)
    assert load_model(bare).cfg.n_layers == 3  # its head is the embedding
    with pytest.raises(ValueError, match=r"dtype must be one of float32, .* got 'int8'"):
        load_model("gpt2", dtype="int8")
    with pytest.raises(ValueError, match="device 'nonsense' can't be used here"):
        load_model("gpt2", device="nonsense")


def test_a_model_whose_logits_are_not_finite_is_refused(tmp_path):
    def overflow(model) -> None:
        model.transformer.wte.weight.mul_(1e4)
        model.transformer.ln_f.weight.mul_(1e4)

    path = make(tmp_path / "large", configuration("GPT-2"), edit=overflow)
    assert load_model(path)
    with pytest.raises(ValueError, match=r"logits of large in torch.float16 hold NaN.*wider dtype"):
        load_model(path, dtype="float16")


def twist(model) -> None:
    """What a small fine-tune of low rank does: one matrix of one layer."""
    model.transformer.h[1].attn.c_proj.weight[3].mul_(1.05)


def test_two_folders_of_one_name_do_not_pass_for_one_model_nor_does_a_fine_tune(tmp_path):
    config = configuration("GPT-2")
    a, same, tuned, other = (
        load_model(make(tmp_path / run / "final", config, seed=seed, edit=edit))
        for run, seed, edit in (("a", 0, None), ("same", 0, None), ("tuned", 0, twist), ("other", 1, None))
    )
    metadata = SAEMetadata(**json.loads(json.dumps(model_metadata(a))))
    check_model(metadata, a)
    check_model(metadata, same)
    for model in (tuned, other):
        with pytest.raises(ValueError, match=r"the model 'final', but was given 'final', whose logits .* differ by"):
            check_model(metadata, model, "it")
    metadata.model_fingerprint = None  # as in a file of an earlier version
    check_model(metadata, tuned)
    metadata.model_name = "another"
    with pytest.raises(ValueError, match="'another', but was given 'final'"):
        check_model(metadata, a)


def test_a_model_whose_weights_are_edited_in_memory_is_another_model(folder):
    edits = {
        "in place": lambda model: model.blocks[1].mlp.W_out.mul_(1.1),
        "its data": lambda model: model.blocks[1].mlp.W_out.data.zero_(),
        "replaced": lambda model: setattr(
            model.blocks[0].mlp, "W_in", torch.nn.Parameter(model.blocks[1].mlp.W_in * 1)
        ),
    }
    for edit in edits.values():
        model = load_model(folder("GPT-2"))
        metadata = SAEMetadata(**model_metadata(model))
        check_model(metadata, model)
        with torch.no_grad():
            edit(model)
        with pytest.raises(ValueError, match="logits on the same tokens differ"):
            check_model(metadata, model)


def test_one_model_is_itself_in_every_kind_dtype_and_processing(folder):
    path = folder("GPT-2")
    bridge = SAETransformerBridge.boot_transformers(str(path), device="cpu")
    plain = load_model(path)
    folded = load_model(path)
    folded.process_weights_(fold_ln=True, center_writing_weights=True, center_unembed=True)
    assert not torch.allclose(folded.W_E, plain.W_E)
    models = [plain, folded, bridge, load_model(path, dtype="bfloat16"), load_model(path, dtype="float16")]
    for a in models:
        metadata = SAEMetadata(**model_metadata(a))
        for b in models:
            check_model(metadata, b)
    gemma = [
        SAEMetadata(**model_metadata(load_model(folder("Gemma"), dtype=dtype))) for dtype in ("float32", "bfloat16")
    ]
    for metadata in gemma:
        with pytest.raises(ValueError, match="logits on the same tokens"):
            check_model(metadata, models[3])


def test_a_dictionary_finds_its_local_model_again_without_its_name(tmp_path, folder, monkeypatch):
    path = tmp_path / "runs" / "final"
    shutil.copytree(folder("Llama"), path)
    config = BuildConfig(k=4, n_atoms=16, tokens=300, context_size=32, center_tokens=64, progress=False)
    itda = build(load_model(path), embedded.dataset("heldout"), "blocks.1.hook_resid_post", config).popitem()[1]
    itda.save_model(tmp_path / "saved")
    metadata = type(itda).load_from_disk(tmp_path / "saved").cfg.metadata
    assert metadata.model_path == str(path)
    monkeypatch.chdir(tmp_path / "runs")
    model = load_model_of(metadata, dtype="bfloat16")
    assert model.cfg.dtype == torch.bfloat16
    check_model(metadata, model)
    path.rename(tmp_path / "runs" / "elsewhere")
    with pytest.raises(ValueError, match=r"'final' of this dictionary can't be loaded.*no model in .*final any more"):
        load_model_of(metadata)
    with pytest.raises(ValueError, match="name no model: pass the model"):
        load_model_of(SAEMetadata())


def test_a_long_row_is_compared_only_where_positions_change_and_it_is_not_too_far():
    def lengths(name: str, n_ctx: int, **changed: int) -> list[int]:
        config = configuration(name)
        for key, value in changed.items():
            setattr(config, key, value)
        return [probe.tokens.shape[1] for probe in agreement.probes(config, n_ctx)]

    assert lengths("Llama", 96) == [32]
    assert lengths("Llama", 12) == [12]
    assert lengths("Mistral, sliding window", 96) == [32]
    assert lengths("Phi-3, sliding window", 96) == [32, 56]
    assert lengths("Phi-3, sliding window", 41) == [32, 41]
    assert lengths("Phi-3, longrope", 96) == [32, 64]
    assert lengths("Mistral, sliding window", 32768, sliding_window=4096) == [32, 4112]
    assert lengths("Mistral, sliding window", 131072, sliding_window=65536) == [32]
    # Too far to compare: Hugging Face's own code is what the bridge runs.


def test_a_window_too_far_to_compare_takes_the_bridge(tmp_path):
    config = configuration("Mistral, no window")
    config.sliding_window, config.max_position_embeddings = 5000, 8192
    assert isinstance(load_model(make(tmp_path / "far", config)), SAETransformerBridge)
