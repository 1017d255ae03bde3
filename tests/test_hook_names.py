"""A hook point is understood by any of its names, on both kinds of model, alone or in a pattern."""

import pytest
import torch
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch.testing import assert_close

from itda_lens import BuildConfig, build, embedded
from itda_lens.evals import random_activations
from itda_lens.interpret import explain, transfer
from itda_lens.streams import canonical_hooks, expand_hooks, hooked_model_from_folder
from itda_lens.streams.activations import activations_at
from itda_lens.streams.hooks import hook_widths
from tests.tiny_models import configuration, make

GROUPED = "Llama, grouped queries, tied"
SAME = {
    "hook_resid_pre": "hook_in",
    "hook_resid_post": "hook_out",
    "hook_attn_out": "attn.hook_out",
    "hook_mlp_out": "mlp.hook_out",
    "attn.hook_q": "attn.q.hook_out",
    "attn.hook_k": "attn.k.hook_out",
    "attn.hook_v": "attn.v.hook_out",
    "attn.hook_z": "attn.o.hook_in",
    "mlp.hook_post": "mlp.out.hook_in",
}
SEQUENTIAL = {"hook_resid_mid": "ln2.hook_in"}
PLAIN_MLP, GATED_MLP = (
    {"mlp.hook_pre": "mlp.in.hook_out"},
    {"mlp.hook_pre": "mlp.gate.hook_out", "mlp.hook_pre_linear": "mlp.in.hook_out"},
)
PAIRS = {
    "GPT-2": SAME | SEQUENTIAL | PLAIN_MLP,
    "GPT-NeoX": SAME | PLAIN_MLP,
    GROUPED: SAME | SEQUENTIAL | GATED_MLP,
}
CONFIG = BuildConfig(k=4, n_atoms=40, tokens=600, context_size=32, progress=False)


def small(name: str):
    config = configuration(name)
    config.vocab_size = embedded.model(0).cfg.d_vocab  # of the tokenizer
    return config


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Both kinds of one model, by the name of its configuration; none of them is changed."""
    found = {}
    for name in PAIRS:
        folder = make(tmp_path_factory.mktemp("model"), small(name))
        found[name] = (hooked_model_from_folder(folder), SAETransformerBridge.boot_transformers(str(folder)))
    return found


@pytest.mark.parametrize("name", PAIRS)
def test_each_kind_of_model_takes_the_names_of_the_other_for_the_same_activations(hosts, name):
    hooked, bridge = hosts[name]
    tokens = torch.randint(5, 1000, (2, 9), generator=torch.Generator().manual_seed(0))
    ours = {f"blocks.1.{hook}": f"blocks.1.{other}" for hook, other in PAIRS[name].items()}
    ours |= {"hook_embed": "embed.hook_out"}
    assert canonical_hooks(hooked, list(ours.values())) == {other: hook for hook, other in ours.items()}
    assert canonical_hooks(bridge, list(ours)) == ours
    x, y = activations_at(hooked, tokens, list(ours)), activations_at(bridge, tokens, list(ours.values()))
    for hook, other in ours.items():
        assert_close(x[hook], y[other], rtol=1e-4, atol=1e-4, msg=hook)


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("blocks.*.attn.hook_z", [0, 1, 2]),
        ("blocks.1-2.attn.hook_z", [1, 2]),
        ("blocks.2.attn.hook_z, blocks.0-0.attn.hook_z", [2, 0]),
        (["blocks.0-1.attn.hook_z", "blocks.2.attn.hook_z"], [0, 1, 2]),
    ],
)
def test_patterns_are_written_out(hosts, pattern, layers):
    for model in hosts["GPT-2"]:
        assert expand_hooks(model, pattern) == [f"blocks.{i}.attn.hook_z" for i in layers]


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        ("2", [2]),
        ("0-1", [0, 1]),
        ("*", [0, 1, 2]),
        ("model.layers.1", [1]),
        ("transformer.h.1,gpt_neox.layers.2", [1, 2]),
        ("model.language_model.layers.*", [0, 1, 2]),
    ],
)
def test_a_layer_stands_for_what_comes_out_of_it(hosts, given, layers):
    for model, name in zip(hosts["GPT-2"], ("hook_resid_post", "hook_out"), strict=True):
        assert expand_hooks(model, given) == [f"blocks.{i}.{name}" for i in layers]


def test_a_layer_alone_is_a_name_of_its_hook(hosts):
    hooked, bridge = hosts[GROUPED]
    assert canonical_hooks(hooked, ["1", "model.layers.2"]) == {
        "1": "blocks.1.hook_resid_post",
        "model.layers.2": "blocks.2.hook_resid_post",
    }
    with pytest.raises(ValueError, match="named twice"):
        canonical_hooks(bridge, ["1", "blocks.1.hook_resid_post"])


@pytest.mark.parametrize("hook", ["blocks.3.hook_resid_post", "blocks.1-3.hook_resid_post", "3", "model.layers.30"])
def test_a_layer_that_is_not_there_is_refused_with_those_that_are(hosts, hook):
    for model in hosts["GPT-2"]:
        with pytest.raises(ValueError, match="3 layers: 0 to 2"):
            canonical_hooks(model, expand_hooks(model, hook))
        with pytest.raises(ValueError, match="3 layers: 0 to 2"):
            build(model, "no-such-dataset.txt", hook, CONFIG)


def test_a_pattern_of_a_hook_that_no_layer_has_is_refused(hosts):
    for model in hosts["GPT-2"]:
        with pytest.raises(ValueError, match=r"no hook point 'blocks\.\*\.hook_resid_pots'"):
            canonical_hooks(model, expand_hooks(model, "blocks.*.hook_resid_pots"))


@pytest.mark.parametrize("built_on", ["model", "bridge"])
def test_a_dictionary_of_one_kind_of_model_is_used_on_the_other(hosts, built_on):
    home, other = hosts["GPT-2"] if built_on == "model" else hosts["GPT-2"][::-1]
    itda = build(home, embedded.dataset(), "blocks.1.attn.hook_z", CONFIG)["blocks.1.attn.hook_z"]
    mine, theirs = (explain(itda, model, "Return the number of items") for model in (home, other))
    assert [term.atom for term in mine[0].terms] == [term.atom for term in theirs[0].terms]
    assert transfer(itda, other, "model.layers.1").cfg.d_sae == 40
    assert_close(
        random_activations(itda, home, embedded.dataset()).atoms,
        random_activations(itda, other, embedded.dataset()).atoms,
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("kind", ["model", "bridge"])
def test_an_itda_of_any_hook_with_heads_runs_and_counts_grouped_heads_right(hosts, kind, tmp_path):
    # An SAE changes the hook points of a bridge, so it is not the one of the other tests.
    model = hosts[GROUPED][0]
    if kind == "bridge":
        model = SAETransformerBridge.boot_transformers(str(make(tmp_path, small(GROUPED))))
    hooks = {f"blocks.1.attn.hook_{name}": width for name, width in {"q": 32, "k": 16, "v": 16, "z": 32}.items()}
    tokens = torch.randint(5, 1000, (2, 9), generator=torch.Generator().manual_seed(0))
    for hook, itda in build(model, embedded.dataset(), list(hooks), CONFIG).items():
        assert itda.cfg.d_in == hooks[hook]
        by_hand = [(itda.cfg.metadata.hook_name, lambda x, hook, itda=itda: itda(x.flatten(2)).view_as(x))]
        with torch.no_grad():
            expected, clean = model.run_with_hooks(tokens, fwd_hooks=by_hand), model(tokens)
            assert_close(model.run_with_saes(tokens, saes=itda), expected, rtol=1e-4, atol=1e-4)
        assert (expected - clean).abs().max() > 1e-3
    names = canonical_hooks(model, ["blocks.1.attn.hook_k"])
    assert hook_widths(model, names, head_index=1) == {"blocks.1.attn.hook_k": 8}
    with pytest.raises(ValueError, match=r"head_index 2 does not fit 'blocks\.1\.attn\.hook_k'.* it has 2$"):
        hook_widths(model, names, head_index=2)
