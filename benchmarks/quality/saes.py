"""One SAE, trained by SAELens: the opponents of ITDA.

What is SAELens's own: the training SAE, its losses, `SAETrainer` with its schedules and its scaling of activations.
What is not: the activations of the frozen model are computed once and held, and drawn in shuffled epochs, which mixes
them better than a store's buffer. What the forward passes would have cost is measured apart, by `forward_cost`.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    MatchingPursuitTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks.quality.subjects import CONTEXT

POINTS = 10


@dataclass(frozen=True)
class Settings:
    architecture: str = "topk"
    n: int = 1024
    k: int = 8
    lr: float = 1e-3
    l1: float = 0.0
    """Of `standard` alone, whose L0 follows from it."""
    draws: int = 4_100_000
    batch: int = 1024
    warm_up: float = 0.05
    """Share of the steps in which the rate rises."""
    decay: float = 0.3
    """Share of the steps, at the end, in which the rate falls to zero."""
    dead_window: int = 250
    """Steps without use after which a latent is dead and the auxiliary loss trains it."""
    center: bool = False
    """Begin with the mean of the activations as `b_dec`, instead of zeros as SAELens does."""
    seed: int = 0

    @property
    def name(self) -> str:
        """The folder of an SAE: what differs from the default, besides kind, size and rate."""
        own = "" if self.architecture == "standard" else f"-k{self.k}"
        rest = {key: value for key, value in asdict(self).items() if key not in ("architecture", "n", "k", "lr")}
        defaults = asdict(Settings())
        changed = "".join(f"-{key}{value:g}" for key, value in rest.items() if value != defaults[key])
        return f"{self.architecture}-n{self.n}{own}-lr{self.lr:g}{changed}"

    def config(self, d_in: int) -> TrainingSAEConfig:
        common: dict[str, Any] = {
            "d_in": d_in,
            "d_sae": self.n,
            "normalize_activations": "expected_average_only_in",
        }
        if self.architecture == "topk":
            return TopKTrainingSAEConfig(**common, k=self.k)
        if self.architecture == "batchtopk":
            return BatchTopKTrainingSAEConfig(**common, k=self.k)
        if self.architecture == "standard":
            warm_up = int(self.warm_up * self.steps)
            return StandardTrainingSAEConfig(**common, l1_coefficient=self.l1, l1_warm_up_steps=warm_up)
        if self.architecture == "matching_pursuit":  # always k steps, as ITDA has it
            return MatchingPursuitTrainingSAEConfig(
                **common,
                decoder_init_norm=1.0,
                max_iterations=self.k,
                residual_threshold=0.0,
                stop_on_duplicate_support=False,
            )
        raise ValueError(f"{self.architecture!r} is none of topk, batchtopk, standard, matching_pursuit")

    @property
    def steps(self) -> int:
        return self.draws // self.batch


def epochs(x: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches of rows, each epoch in another order, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for indices in torch.randperm(len(x), generator=generator).split(batch):
            if len(indices) == batch:
                yield x[indices]


def train(name: str, hook: str, x: Tensor, validation: Tensor, settings: Settings, folder: Path) -> dict[str, Any]:
    """Train an SAE on `x [tokens, d]`; write it to `folder` as SAELens does, with `training.json` beside it.

    Returns what `training.json` holds.
    """
    torch.manual_seed(settings.seed)
    scale = x.shape[1] ** 0.5 / float(x.norm(dim=-1).mean())
    sae: TrainingSAE[Any] = TrainingSAE.from_dict(settings.config(x.shape[1]).to_dict())
    if settings.center:
        sae.b_dec.data = scale * x.mean(0)
    trainer: SAETrainer[Any, Any] = SAETrainer(
        SAETrainerConfig(
            total_training_samples=settings.draws,
            train_batch_size_samples=settings.batch,
            lr=settings.lr,
            lr_end=settings.lr,
            lr_warm_up_steps=int(settings.warm_up * settings.steps),
            lr_decay_steps=int(settings.decay * settings.steps),
            dead_feature_window=settings.dead_window,
            n_checkpoints=POINTS - 1,
        ),
        sae,
        epochs(x, settings.batch, settings.seed),
        save_checkpoint_fn=lambda checkpoint_path: observe(),
    )
    trainer.activation_scaler.scaling_factor = scale  # SAELens's own estimate, from all tokens instead of a sample
    curve: list[dict[str, float]] = []
    overhead = [0.0, 0.0]

    @torch.no_grad()
    def observe() -> None:
        started = time.perf_counter(), time.process_time()
        recons = trainer.activation_scaler.unscale(sae(trainer.activation_scaler.scale(validation)))
        curve.append(
            {
                "draws": trainer.n_training_samples,
                "explained_variance": explained_variance(validation, recons),
                "dead": float(trainer.dead_neurons.float().mean()),
            }
        )
        overhead[0] += time.perf_counter() - started[0]
        overhead[1] += time.process_time() - started[1]

    started = time.perf_counter(), time.process_time()
    trainer.fit()
    wall, cpu = (now - then for now, then in zip((time.perf_counter(), time.process_time()), started, strict=True))
    wall, cpu = wall - overhead[0], cpu - overhead[1]
    observe()
    sae.cfg.metadata.model_name = name
    sae.cfg.metadata.hook_name = hook
    sae.cfg.metadata.context_size, sae.cfg.metadata.prepend_bos = CONTEXT, True
    sae.save_inference_model(folder)
    with torch.no_grad():
        final = explained_variance(validation, SAE.load_from_disk(folder)(validation))
    record = {
        "subject": name,
        "hook": hook,
        "settings": asdict(settings),
        "draws": trainer.n_training_samples,
        "distinct_tokens": len(x),
        "steps": trainer.n_training_steps,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "threads": torch.get_num_threads(),
        "validation_explained_variance": final,
        "curve": curve,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def explained_variance(x: Tensor, recons: Tensor) -> float:
    return float(1 - (x - recons).square().sum() / (x - x.mean(0)).square().sum())
