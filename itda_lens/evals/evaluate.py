"""SAELens's `run_evals` in one call, for any of its SAEs side by side."""

import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens.model_bridge import TransformerBridge

from itda_lens.streams import HookedModel, canonical_hooks, check_model, load_text
from itda_lens.streams.datasets import AnyDataset
from itda_lens.streams.hooks import activation_shapes

_COLUMNS = {
    "ce_loss_score": ("model_performance_preservation", "ce_loss_score"),
    "kl_div_score": ("model_behavior_preservation", "kl_div_score"),
    "explained_variance": ("reconstruction_quality", "explained_variance"),
    "cosine": ("reconstruction_quality", "cossim"),
    "l0": ("sparsity", "l0"),
    "l1": ("sparsity", "l1"),
}
_SPLIT_INTO_HEADS = ("hook_q", "hook_k", "hook_v", "hook_z")


def evaluate(
    saes: SAE[Any] | Mapping[str, SAE[Any]],
    model: HookedModel,
    dataset: AnyDataset | str | Path,
    *,
    column: str | None = None,
    batch_size: int = 16,
    n_batches: int = 8,
    exclude_special_tokens: bool = True,
) -> pd.DataFrame:
    """One row of metrics for each SAE, all measured on the same tokens.

    `ce_loss_score` and `kl_div_score` are 1 for a perfect reconstruction and 0 for one no better than zeros;
    `dead` is the share of latents that never fired.

    Args:
        saes: an ITDA or any other SAE of SAELens, or several by name.
        model: the model that they belong to.
        dataset: held-out text.
        column: the dataset's column with the text, when it is not called `text`.
        batch_size: rows of `context_size` tokens in a batch.
        n_batches: batches.
        exclude_special_tokens: leave BOS, EOS and padding out, of the metrics and of what is replaced.

    Raises:
        ValueError: an SAE names another model, its hook is not in the model or has another width, its metadata
            lacks what a store needs, or SAELens's evals can't follow it there (the heads of a bridge).

    Example:
        >>> from itda_lens import ITDA, embedded
        >>> metadata = {"hook_name": "blocks.1.hook_resid_post", "context_size": 64, "prepend_bos": True}
        >>> itda = ITDA.from_atoms(torch.eye(96), k=8, metadata=metadata)
        >>> table = evaluate(itda, embedded.model(), embedded.dataset("heldout"), batch_size=4, n_batches=1)
        >>> bool(table.loc["itda", "l0"] <= 8)
        True
    """
    named = saes if isinstance(saes, Mapping) else {saes.cfg.architecture(): saes}
    for name, sae in named.items():
        _check(name, sae, model)
    data = load_text(dataset, column=column)
    rows = {
        name: _measure(sae, model, data, batch_size, n_batches, exclude_special_tokens) for name, sae in named.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def _measure(
    sae: SAE[Any], model: HookedModel, data: Any, batch_size: int, n_batches: int, exclude_special_tokens: bool
) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dataset is not tokenized")
        store = ActivationsStore.from_sae(
            model,  # pyright: ignore[reportArgumentType]  (SAELens takes bridges too)
            sae,
            data,
            store_batch_size_prompts=batch_size,
            total_tokens=1,
            device=str(sae.device),
        )
    config = EvalConfig(
        batch_size_prompts=batch_size,
        n_eval_reconstruction_batches=n_batches,
        n_eval_sparsity_variance_batches=n_batches,
        compute_ce_loss=True,
        compute_kl=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )
    started = time.perf_counter()
    metrics, by_latent = run_evals(
        sae,
        store,
        model,  # pyright: ignore[reportArgumentType]
        ActivationScaler(),
        config,
        exclude_special_tokens=exclude_special_tokens,
    )
    seconds = time.perf_counter() - started
    row = {column: metrics[group][name] for column, (group, name) in _COLUMNS.items()}
    row["dead"] = float((torch.tensor(by_latent["feature_density"]) == 0).float().mean())
    row["tokens_per_s"] = 2 * n_batches * batch_size * store.context_size / seconds
    return row


def _check(name: str, sae: SAE[Any], model: HookedModel) -> None:
    metadata = sae.cfg.metadata
    missing = [key for key in ("hook_name", "context_size", "prepend_bos") if metadata[key] is None]
    if missing:
        raise ValueError(f"the metadata of {name!r} lacks {', '.join(missing)}: set sae.cfg.metadata.{missing[0]}")
    check_model(metadata, model, repr(name))
    hook_point = model.hook_dict.get(metadata.hook_name)
    if isinstance(model, TransformerBridge) and hook_point is not None and hook_point.name != metadata.hook_name:
        raise ValueError(
            f"an SAE was attached to {metadata.hook_name!r} of this bridge and removed again, after which SAELens's "
            "evals can no longer hook it: boot the bridge anew"
        )
    [canonical] = canonical_hooks(model, [metadata.hook_name]).values()
    if canonical != metadata.hook_name:
        raise ValueError(
            f"{name!r} names the hook point {metadata.hook_name!r}, which {type(model).__name__} holds as "
            f"{canonical!r}: set sae.cfg.metadata.hook_name to that (SAELens's run_evals does not follow aliases)"
        )
    shape = activation_shapes(model, [canonical])[canonical]
    width = math.prod(shape[2:] if metadata.hook_head_index is None else shape[3:])
    if width != sae.cfg.d_in:
        raise ValueError(
            f"{name!r} takes activations of width {sae.cfg.d_in}, but those at {canonical!r} of {model.cfg.model_name} "
            f"have width {width}: pass the model that it was built on"
        )
    if len(shape) > 3 and not any(part in canonical for part in _SPLIT_INTO_HEADS):
        raise ValueError(
            f"{name!r} belongs to {canonical!r}, where {type(model).__name__} has heads, but SAELens's run_evals knows "
            f"heads by the names {', '.join(_SPLIT_INTO_HEADS)} alone: evaluate it on a HookedSAETransformer of the "
            "same weights, with sae.cfg.metadata.hook_name as it is called there, such as 'blocks.0.attn.hook_z'"
        )
