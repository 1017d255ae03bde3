"""Shape annotations are checked while the tests run; nothing here may reach the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from jaxtyping import install_import_hook

install_import_hook("itda_lens", "beartype.beartype")

import pytest
from sae_lens import HookedSAETransformer

from itda_lens import ITDA, BuildConfig, build, embedded

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture(scope="session")
def model() -> HookedSAETransformer:
    return embedded.model(0)


@pytest.fixture(scope="session")
def built(model: HookedSAETransformer) -> ITDA:
    """A small dictionary of real activations; tests must not change it."""
    config = BuildConfig(k=8, n_atoms=256, tokens=6000, dataset_name="embedded", progress=False)
    return build(model, embedded.dataset("train"), HOOK, config)[HOOK]
