"""How a dictionary fares at each layer of another model, after transfer."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from itda_lens.interpret.decompose import decompose
from itda_lens.interpret.prompts import probe, run_prompts
from itda_lens.interpret.transfer import source_atoms, transfer_all
from itda_lens.metadata import prepends_bos
from itda_lens.sae import ITDA
from itda_lens.streams import HookedModel, canonical_hooks
from itda_lens.streams.datasets import AnyDataset


def transfer_table(
    itda: ITDA,
    model: HookedModel,
    hooks: Sequence[str] | None = None,
    *,
    dataset: AnyDataset | str | Path | None = None,
    native: Mapping[str, ITDA] | None = None,
    tokens: int = 4096,
    column: str | None = None,
) -> pd.DataFrame:
    """Carry a dictionary to several hooks of another model, and see how it does at each.

    `agreement` asks whether its prompts stand to each other there as they did: it is the cosine between the matrices
    of the atoms' cosines, `<A A^T, B B^T> / (|A A^T| |B B^T|)` over the atoms that both have (kernel alignment,
    Cristianini et al. 2001), from 0 to 1, and needs no text.

    Args:
        itda: a dictionary with provenance.
        model: the model that it is carried to.
        hooks: where; the same hook of every layer if not given.
        dataset: held-out text, for the errors.
        native: dictionaries that were built in that model, by hook, to compare with.
        tokens: how many tokens of the text are looked at.
        column: the dataset's column with the text, when it is not called `text`.

    Returns:
        A row for each hook: `carried`, how many atoms came along; `agreement`; with a dataset `error`, the mean
        relative error of reconstruction, and with native dictionaries `native_error`.

    Raises:
        ValueError: as `transfer`; a native dictionary is missing, or is given without a dataset.

    Example:
        >>> from itda_lens import BuildConfig, build, embedded
        >>> hook = "blocks.2.hook_resid_post"
        >>> config = BuildConfig(k=8, n_atoms=100, tokens=2000, progress=False)
        >>> itda = build(embedded.model(0), embedded.dataset(), hook, config)[hook]
        >>> transfer_table(itda, embedded.model(0))["agreement"].idxmax()
        'blocks.2.hook_resid_post'
    """
    metadata: Any = itda.cfg.metadata
    hooks = same_hook_of_each_layer(model, metadata.hook_name) if hooks is None else hooks
    native = native or {}
    if native and dataset is None:
        raise ValueError("native dictionaries are compared on text: give a dataset, too")
    if native and (missing := sorted(set(hooks) - set(native))):
        raise ValueError(f"native lacks {', '.join(missing)}: build dictionaries there, or name the hooks that it has")
    carried = transfer_all(itda, model, hooks, head_index=metadata.hook_head_index)
    table = pd.DataFrame(
        {
            "carried": [carried[hook].cfg.d_sae for hook in hooks],
            "agreement": [alignment(itda.atoms[source_atoms(carried[hook])], carried[hook].atoms) for hook in hooks],
        },
        index=pd.Index(hooks, name="hook"),
    )
    if dataset is not None:
        columns = {"error": carried} | ({"native_error": native} if native else {})
        for name, dictionaries in columns.items():
            table[name] = _errors(model, dictionaries, hooks, dataset, tokens, column, metadata)
    return table


def best_layer(itda: ITDA, model: HookedModel, hooks: Sequence[str] | None = None) -> str:
    """The hook of another model where a dictionary's prompts stand to each other most as they do in its own.

    Example:
        >>> from itda_lens import BuildConfig, build, embedded
        >>> hook = "blocks.2.hook_resid_post"
        >>> config = BuildConfig(k=8, n_atoms=100, tokens=2000, progress=False)
        >>> best_layer(build(embedded.model(0), embedded.dataset(), hook, config)[hook], embedded.model(0))
        'blocks.2.hook_resid_post'
    """
    return str(transfer_table(itda, model, hooks)["agreement"].idxmax())


@torch.no_grad()
def alignment(a: Float[Tensor, "n _"], b: Float[Tensor, "n _"]) -> float:
    """`<A A^T, B B^T> / (|A A^T| |B B^T|)`: 1 where the rows of both have the same cosines, up to a factor.

    Example:
        >>> round(alignment(torch.eye(2), torch.eye(2)), 6)
        1.0
    """
    a, b = (t.detach().double().cpu() for t in (a, b))
    # |A B^T| by way of the widths: <A A^T, B B^T> = |A^T B|^2.
    return float((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()))


def same_hook_of_each_layer(model: HookedModel, hook: str) -> list[str]:
    """The hook of the same kind in each layer of a model.

    Example:
        >>> from itda_lens import embedded
        >>> same_hook_of_each_layer(embedded.model(), "blocks.2.hook_mlp_out")[:2]
        ['blocks.0.hook_mlp_out', 'blocks.1.hook_mlp_out']
    """
    if not re.match(r"blocks\.\d+\.", hook or ""):
        raise ValueError(f"{hook!r} is not of one layer: name the hooks")
    kind = re.sub(r"^blocks\.\d+\.", "", hook)
    return [f"blocks.{layer}.{kind}" for layer in range(model.cfg.n_layers)]


def _errors(
    model: HookedModel,
    dictionaries: Mapping[str, ITDA],
    hooks: Sequence[str],
    dataset: AnyDataset | str | Path,
    tokens: int,
    column: str | None,
    metadata: Any,
) -> list[float]:
    prompts = probe(
        model,
        dataset,
        tokens=tokens,
        context_size=min(metadata.context_size or 128, model.cfg.n_ctx),
        prepend_bos=prepends_bos(metadata),
        pack=metadata.pack is not False,
        column=column,
    )
    sums = dict.fromkeys(hooks, 0.0)
    for batch in run_prompts(model, prompts, canonical_hooks(model, hooks), head_index=metadata.hook_head_index):
        for hook, x in batch.activations.items():
            sums[hook] += float(decompose(dictionaries[hook], x).relative_error.sum())
    return [sums[hook] / len(prompts) for hook in hooks]
