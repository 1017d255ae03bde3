"""What training an SAE costs besides its own steps: the model's forward passes, and a whole run as SAELens does it."""

import time
import warnings
from typing import Any

from datasets import Dataset
from sae_lens import ActivationsStore, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.config import LoggingConfig

from benchmarks.quality.saes import Settings
from benchmarks.quality.subjects import BATCH, CONTEXT, Subject


def forward_cost(subject: Subject, hook: str, tokens: int = 65_536) -> dict[str, float]:
    """Seconds for a token to leave SAELens's `ActivationsStore`: forward pass, filter and shuffle."""
    config = runner_config(subject, hook, Settings())
    store = ActivationsStore.from_config(subject.model, config, override_dataset=_dataset(subject))
    next(store)
    batches = tokens // config.train_batch_size_tokens
    started = time.perf_counter(), time.process_time()
    for _ in range(batches):
        next(store)
    wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    drawn = batches * config.train_batch_size_tokens
    return {"wall_seconds_per_token": wall / drawn, "cpu_seconds_per_token": cpu / drawn, "tokens_measured": drawn}


def end_to_end(subject: Subject, hook: str, settings: Settings, share: float = 0.05) -> dict[str, float]:
    """The time of SAELens's own runner, forward passes and all, on a share of the draws, and extrapolated to all."""
    config = runner_config(subject, hook, settings, training_tokens=int(share * settings.draws))
    started = time.perf_counter(), time.process_time()
    runner = LanguageModelSAETrainingRunner(config, override_dataset=_dataset(subject), override_model=subject.model)
    sae = runner.run()
    wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    assert sae.cfg.d_sae == settings.n
    return {
        "draws": config.training_tokens,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "extrapolated_wall_seconds": wall / share,
        "extrapolated_cpu_seconds": cpu / share,
    }


def runner_config(subject: Subject, hook: str, settings: Settings, **changes: Any) -> LanguageModelSAERunnerConfig[Any]:
    warnings.filterwarnings("ignore", message="All samples in the training dataset have been exhausted")
    options: dict[str, Any] = {
        "sae": settings.config(subject.model.cfg.d_model),
        "hook_name": hook,
        "dataset_path": subject.name,
        "streaming": False,
        "context_size": CONTEXT,
        "training_tokens": settings.draws,
        "store_batch_size_prompts": BATCH,
        "train_batch_size_tokens": settings.batch,
        "exclude_special_tokens": True,
        "lr": settings.lr,
        "dead_feature_window": settings.dead_window,
        "n_batches_for_norm_estimate": 5,  # once in a run: more would be multiplied when extrapolated
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": None,
        "output_path": None,
        "verbose": False,
    }
    return LanguageModelSAERunnerConfig(**options | changes)


def _dataset(subject: Subject) -> Dataset:
    return Dataset.from_dict({"tokens": subject.train.tolist()})
