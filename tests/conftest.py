"""Shape annotations are checked while the tests run; nothing here may reach the network."""

import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from jaxtyping import install_import_hook

# Triton looks for this when it is imported: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The dimensions that ours name would be taken for SAEBench's own: its environment runs without the check.
if importlib.util.find_spec("sae_bench") is None:
    install_import_hook("itda_lens", "beartype.beartype")

import pytest
from sae_lens import HookedSAETransformer

from itda_lens import ITDA, BuildConfig, build, embedded
from tests.compatibility import Compatibility

HOOK = "blocks.3.hook_resid_post"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility", type=Path, help="write what was found of each surface to this file")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--compatibility"):
        config.pluginmanager.register(Compatibility(path))


@pytest.fixture(scope="session")
def model() -> HookedSAETransformer:
    return embedded.model(0)


@pytest.fixture(scope="session")
def built(model: HookedSAETransformer) -> ITDA:
    """A small dictionary of real activations; tests must not change it."""
    config = BuildConfig(k=8, n_atoms=256, tokens=6000, dataset_name="embedded", progress=False)
    return build(model, embedded.dataset("train"), HOOK, config)[HOOK]
