"""Activations are the model's own: what others left on it is refused, named or mended, and it is left as it was."""

import warnings

import pytest
import torch
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch.testing import assert_close

from itda_lens import BuildConfig, build, embedded, load_model
from itda_lens.interpret import explain, transfer
from itda_lens.streams import canonical_hooks, check_model, hooked_model_from_folder
from itda_lens.streams.activations import activations_at

HOOK, Z = "blocks.2.hook_resid_post", "blocks.2.attn.hook_z"
CONFIG = BuildConfig(k=8, n_atoms=64, tokens=1000, context_size=64, progress=False)
TOKENS = torch.arange(30).view(2, 15)


def boot(**settings) -> SAETransformerBridge:
    return SAETransformerBridge.boot_transformers(str(embedded.path(0)), device="cpu", **settings)


@pytest.fixture(params=["model", "bridge"])
def host(request):
    """Each kind of model, newly loaded."""
    return embedded.model(0) if request.param == "model" else boot()


@pytest.fixture(scope="module")
def itda():
    return build(embedded.model(0), embedded.dataset(), HOOK, CONFIG)[HOOK]


def test_nothing_is_built_or_explained_while_an_sae_is_attached(host, itda):
    with host.saes(itda):
        with pytest.raises(ValueError, match=rf"an SAE is attached at {HOOK}.* model.reset_saes\(\)"):
            build(host, "no-such-dataset.txt", "blocks.4.hook_resid_post", CONFIG)
        for hook in (HOOK, "blocks.4.hook_resid_post"):
            with pytest.raises(ValueError, match="an SAE is attached"):
                transfer(itda, host, hook)
        with pytest.raises(ValueError, match="an SAE is attached"):
            explain(itda, host, "Return the number of items")
    assert explain(itda, host, "Return the number of items")


@pytest.mark.parametrize("is_permanent", [False, True])
def test_hooks_that_were_left_are_named(host, is_permanent):
    [name] = canonical_hooks(host, [HOOK]).values()
    host.add_hook(name, lambda x, hook: x * 2, is_permanent=is_permanent)
    with pytest.warns(UserWarning, match=rf"hooks left at {name}: .*reset_hooks\(including_permanent=True\)"):
        canonical_hooks(host, [HOOK])
    host.reset_hooks(including_permanent=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        canonical_hooks(host, [HOOK])


def test_hooks_of_an_open_context_are_meant(host):
    [name] = canonical_hooks(host, [HOOK]).values()
    plain = activations_at(host, TOKENS, [name])[name]
    with host.hooks(fwd_hooks=[(name, lambda x, hook: x * 2)]), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(activations_at(host, TOKENS, list(canonical_hooks(host, [HOOK]).values()))[name], 2 * plain)


def test_a_forward_pass_ends_at_the_last_hook_and_leaves_nothing_behind(host):
    ran = []
    for i, block in enumerate(host.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    host.unembed.register_forward_hook(lambda *_: ran.append("unembed"))
    names = list(canonical_hooks(host, ["blocks.1.hook_resid_post", Z]).values())
    found = activations_at(host, TOKENS, names)
    assert sorted(found) == sorted(names)
    assert not any(x.requires_grad for x in found.values())
    assert ran == [0, 1]  # the hook is inside of the next
    last = list(canonical_hooks(host, [f"blocks.{host.cfg.n_layers - 1}.hook_resid_post"]).values())
    activations_at(host, TOKENS, last)
    assert "unembed" not in ran
    assert not any(point.fwd_hooks for point in host.hook_dict.values())
    expected = host.run_with_cache(TOKENS, names_filter=names)[1]
    for name, x in found.items():
        assert_close(x, expected[name])


def test_a_pass_that_fails_leaves_no_hook_behind(host):
    [name] = canonical_hooks(host, [HOOK]).values()
    with pytest.raises(IndexError):
        activations_at(host, TOKENS + 10**6, [name])
    assert not any(point.fwd_hooks for point in host.hook_dict.values())


def test_a_leading_bos_that_is_also_padding_is_not_masked(host):
    tokenizer = host.tokenizer
    [name] = canonical_hooks(host, [HOOK]).values()
    tokens = torch.cat([torch.full((2, 1), tokenizer.bos_token_id), TOKENS], dim=1)
    expected = activations_at(host, tokens, [name])[name]
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.bos_token
    assert_close(activations_at(host, tokens, [name])[name], expected)


def test_a_bridge_from_which_an_sae_was_removed_is_hooked_as_before(itda):
    bridge, before = boot(), boot()
    hooks = {hook: next(iter(canonical_hooks(bridge, [hook]).values())) for hook in (HOOK, Z)}
    for dictionary in (itda, build(bridge, embedded.dataset(), Z, CONFIG)[Z]):
        bridge.run_with_saes(TOKENS, saes=dictionary)
    assert list(canonical_hooks(bridge, [HOOK, Z]).values()) == list(hooks.values())
    for name in hooks.values():
        seen = []
        bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda x, hook, seen=seen: seen.append(x))])
        assert_close(seen[0], activations_at(before, TOKENS, [name])[name])


@pytest.mark.parametrize("hook", [HOOK, Z])
def test_a_bridge_that_was_loaded_here_runs_its_hooks_after_an_sae_was_on_it(hook):
    bridge = load_model(embedded.path(0), bridge=True)
    itda = build(bridge, embedded.dataset(), hook, CONFIG)[hook]
    zeros = {"fwd_hooks": [(itda.cfg.metadata.hook_name, lambda x, hook: torch.zeros_like(x))]}
    before = bridge.run_with_hooks(TOKENS, **zeros)
    bridge.run_with_saes(TOKENS, saes=itda)
    with bridge.saes(saes=itda):
        pass
    assert_close(bridge.run_with_hooks(TOKENS, **zeros), before)
    assert not torch.allclose(before, bridge(TOKENS), atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["model", "bridge"])
def test_half_precision_models_take_what_build_gives(kind, dtype):
    model = hooked_model_from_folder(embedded.path(0), dtype=dtype) if kind == "model" else boot(dtype=dtype)
    built = build(model, embedded.dataset(), [HOOK, Z, "blocks.1.mlp.hook_post"], CONFIG)
    for itda in built.values():
        assert itda.dtype == torch.float32
        logits = model.run_with_saes(TOKENS, saes=itda)
        assert logits.dtype == dtype
        assert logits.isfinite().all()
        x = activations_at(model, TOKENS, [itda.cfg.metadata.hook_name])[itda.cfg.metadata.hook_name]
        x_hat = itda(x)
        assert (x_hat.dtype, x_hat.shape) == (dtype, x.shape)
        assert_close(x_hat.float(), itda(x.float()), rtol=1e-2, atol=1e-2)
    assert len(model.run_with_saes(TOKENS, saes=list(built.values()))) == 2


@pytest.fixture
def processed():
    bridge = boot()
    bridge.enable_compatibility_mode(disable_warnings=True)
    folded = HookedSAETransformer(embedded.model(0).cfg, tokenizer=embedded.model(0).tokenizer)
    folded.load_and_process_state_dict(embedded.model(0).state_dict())
    return [folded, bridge]


def test_weights_that_were_processed_otherwise_are_named(processed, itda):
    plain = [embedded.model(0), boot()]
    of_processed = build(processed[0], embedded.dataset(), Z, CONFIG)[Z]
    for dictionary, fits, differs in ((itda, plain, processed), (of_processed, processed, plain)):
        for model in differs:
            with pytest.warns(UserWarning, match=r"was built on (un)?processed weights.* Load the model with"):
                check_model(dictionary.cfg.metadata, model)
        for model in fits:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                check_model(dictionary.cfg.metadata, model)
