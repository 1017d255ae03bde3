"""Are atoms the features that activations are made of? SAELens's synthetic models know theirs.

    python -m benchmarks.quality.synthetic

Pursuit may reconstruct without finding features (arXiv 2602.14687), so what a dictionary finds stands beside what it
reconstructs. Results go to `benchmarks/cache/synthetic/<world>/seed<seed>/`; what is there is not done again.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.synthetic import (
    HierarchyConfig,
    LowRankCorrelationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    eval_sae_on_synthetic_data,
)
from sae_lens.util import temporary_seed
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.quality.dictionaries import PURSUITS, Dictionary, ours, random_activations, random_directions
from benchmarks.quality.opponents import RATES
from benchmarks.quality.saes import Settings, train
from benchmarks.quality.subjects import CACHE
from itda_lens import ITDA

FOLDER = CACHE.parent / "synthetic"
SEEDS = range(3)
INDEPENDENT = SyntheticModelConfig(
    num_features=512,
    hidden_dim=128,
    firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.2, min_prob=0.005),
    std_firing_magnitudes=0.25,
)
WORLDS = {
    "independent": INDEPENDENT,
    "dependent": replace(
        INDEPENDENT,
        firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.3, min_prob=0.005),
        hierarchy=HierarchyConfig(total_root_nodes=32, branching_factor=4, max_depth=1, mutually_exclusive_portion=1.0),
        correlation=LowRankCorrelationConfig(rank=8, correlation_scale=0.1),
    ),
}
"""Features that fire by themselves, and features that fire together, under parents, or in each other's place."""
DISTINCT = 500_000
DRAWS = 2_000_000
HELDOUT = 20_000
TRAINED = ("topk", "matching_pursuit")


@lru_cache(maxsize=1)
def world(name: str, seed: int) -> SyntheticModel:
    return SyntheticModel(replace(WORLDS[name], seed=seed))


@torch.no_grad()
def sample(model: SyntheticModel, n: int, seed: int) -> Tensor:
    """Activations `[n, d]`. Of one seed, more begin with others than fewer."""
    with temporary_seed(seed):
        return torch.cat([model.sample(min(10_000, n - i)) for i in range(0, n, 10_000)])


@torch.no_grad()
def true_l0(model: SyntheticModel) -> int:
    with temporary_seed(0):
        return round(float((model.activation_generator.sample(HELDOUT) > 0).sum(-1).float().mean()))


@torch.no_grad()
def found(sae: SAE[Any], model: SyntheticModel) -> dict[str, float]:
    """How an SAE reconstructs fresh activations, how near its directions are to features, and how its latents fire."""
    with temporary_seed(1):
        result = eval_sae_on_synthetic_data(
            sae, model.feature_dict, model.activation_generator, num_samples=HELDOUT, batch_size=2_000
        )
    detection = result.classification
    return {
        "explained_variance": result.explained_variance,
        "mcc": result.mcc,
        "f1": detection.f1_score,
        "precision": detection.precision,
        "recall": detection.recall,
        "uniqueness": result.uniqueness,
        "l0": result.sae_l0,
        "true_l0": result.true_l0,
        "dead": result.dead_latents / len(sae.W_dec),
    }


def dictionaries(model: SyntheticModel, k: int, seed: int) -> Iterator[tuple[str, Dictionary, int]]:
    """By name, each made from 1 % of an SAE's draws, with how many activations that took."""
    x = sample(model, DRAWS // 100, seed=100 + seed)
    n = model.cfg.num_features
    for make in (ours, random_activations, random_directions):
        yield make.__name__, make(x, n, k, 400 + seed), len(x)  # a world's features are randn from its own seed
    features = model.feature_dict
    yield "true features", Dictionary(features.feature_vectors.detach(), features.bias.detach()), 0


def trained(name: str, seed: int, architecture: str, k: int) -> tuple[Settings, Path]:
    """An SAE of SAELens: its learning rate is the best for the first seed, by validation."""
    common = Settings(architecture=architecture, n=WORLDS[name].num_features, k=k, draws=DRAWS)
    rates = {rate: _training(name, 0, replace(common, lr=rate))["validation_explained_variance"] for rate in RATES}
    settings = replace(common, lr=max(rates, key=lambda rate: rates[rate]), seed=seed)
    _training(name, seed, settings)
    return settings, folder(name, seed) / settings.name


def _training(name: str, seed: int, settings: Settings) -> dict[str, Any]:
    target = folder(name, seed) / settings.name
    if not (target / "training.json").exists():
        x, validation = _activations(name, seed)
        return train(f"synthetic {name}", "", x, validation, settings, target)
    return json.loads((target / "training.json").read_text())


@lru_cache(maxsize=1)
def _activations(name: str, seed: int) -> tuple[Tensor, Tensor]:
    model = world(name, seed)
    return sample(model, DISTINCT, seed=200 + seed), sample(model, HELDOUT, seed=300 + seed)


def folder(name: str, seed: int) -> Path:
    return FOLDER / name / f"seed{seed}"


def measure(name: str, seed: int) -> list[dict[str, Any]]:
    """A row for each dictionary under each pursuit, and for each trained SAE."""
    model = world(name, seed)
    k = true_l0(model)
    where = {"world": name, "seed": seed, "n": model.cfg.num_features, "k": k}
    rows = []

    def add(method: str, dictionary: Dictionary, samples: int) -> None:
        atoms, bias = dictionary
        for pursuit, settings in PURSUITS.items():
            itda = ITDA.from_atoms(atoms, k, bias=bias, **settings)
            rows.append(where | {"method": method, "pursuit": pursuit, "samples": samples} | found(itda, model))

    for method, dictionary, samples in dictionaries(model, k, seed):
        add(method, dictionary, samples)
    for architecture in TRAINED:
        settings, path = trained(name, seed, architecture, k)
        sae = SAE.load_from_disk(path)
        how = {"method": architecture, "pursuit": "sae", "samples": settings.draws, "lr": settings.lr}
        rows.append(where | how | found(sae, model))
        directions = normalize(sae.W_dec.detach(), dim=-1)
        add(f"{architecture} decoder", Dictionary(directions, sae.b_dec.detach()), settings.draws)
    return rows


def run() -> None:
    for name in WORLDS:
        for seed in SEEDS:
            path = folder(name, seed) / "found.json"
            if not path.exists():
                started = time.perf_counter()
                rows = measure(name, seed)
                path.write_text(json.dumps(rows, indent=1) + "\n")
                print(f"{time.strftime('%H:%M:%S')}  {time.perf_counter() - started:6.1f} s  {name} {seed}", flush=True)


if __name__ == "__main__":
    run()
