"""Whole models by their dictionaries: one against another, and checkpoints against the last."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import pandas as pd
from torch import Tensor

from itda_lens.similarity.jaccard import Dictionary, identity_sets, jaccard, jaccard_index, provenance_of
from itda_lens.similarity.layers import layer_similarity
from itda_lens.similarity.matching import LayerMatching

Layers: TypeAlias = Sequence[Dictionary] | Mapping[str, Dictionary]


def model_jaccard(itdas_a: Layers, itdas_b: Layers) -> float:
    """The Jaccard index of two models: their dictionaries are joined over layers (arXiv 2505.17769, figure 11).

    The models may differ in depth, width and, where atoms have texts, tokenizer. The dictionaries of all layers should
    be of one size, or the larger ones count most.

    Args:
        itdas_a: the dictionaries of a model's layers, or `build`'s result.
        itdas_b: those of another, built on the same text.

    Raises:
        ValueError: no dictionaries, or what `jaccard` raises of provenances.

    Example:
        >>> import torch
        >>> from itda_lens import Provenance
        >>> start = torch.zeros(2, dtype=torch.int64)
        >>> a, b, c = (Provenance(torch.tensor(rows), start) for rows in ([1, 2], [2, 3], [3, 4]))
        >>> model_jaccard([a, b], [b, c])
        0.5
    """
    sides = [[provenance_of(itda) for itda in _listed(itdas)] for itdas in (itdas_a, itdas_b)]
    if not sides[0] or not sides[1]:
        raise ValueError("there are no dictionaries: give one or more of each model")
    sets = identity_sets([*sides[0], *sides[1]])
    joined_a, joined_b = (frozenset().union(*part) for part in (sets[: len(sides[0])], sets[len(sides[0]) :]))
    return jaccard_index(joined_a, joined_b)


def convergence(checkpoints: Mapping[Any, Mapping[str, Dictionary]]) -> pd.DataFrame:
    """Each checkpoint's dictionaries against the last checkpoint's, hook by hook (arXiv 2505.17769, figure 12).

    Args:
        checkpoints: `build`'s result for each step, in the order of training; all on the same stream.

    Returns:
        A row for each step and a column for each hook; 1 in the last row.

    Raises:
        ValueError: fewer than two checkpoints, hooks that differ, or what `jaccard` raises.
    """
    if len(checkpoints) < 2:
        raise ValueError(f"there are {len(checkpoints)} checkpoints: give at least two, the last one for reference")
    steps = list(checkpoints)
    last = checkpoints[steps[-1]]
    if odd := [step for step in steps if set(checkpoints[step]) != set(last)]:
        found = sorted(checkpoints[odd[0]])
        raise ValueError(f"checkpoint {odd[0]} has the hooks {found}, the last one {sorted(last)}: build all alike")
    rows = {step: {hook: jaccard(checkpoints[step][hook], last[hook]) for hook in last} for step in steps}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("step")


def plot_convergence(table: pd.DataFrame) -> Any:
    """A matplotlib figure of what `convergence` returns: a line for each hook."""
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4), constrained_layout=True)
    colours = plt.get_cmap("viridis")
    for i, hook in enumerate(table.columns):
        axis.plot(table.index, table[hook], "o-", color=colours(i / max(1, len(table.columns) - 1)), label=hook)
    axis.set(xlabel="training step", ylabel="Jaccard index with the last checkpoint", ylim=(0, 1.02))
    axis.legend(fontsize=7)
    return figure


def model_similarity(models: Mapping[str, Layers]) -> pd.DataFrame:
    """`model_jaccard` of every model with every model, by name."""
    names = list(models)
    matrix = layer_similarity(list(models.values()), list(models.values()), model_jaccard)
    return pd.DataFrame(matrix.numpy(), index=names, columns=names)


def match_dictionaries(models: Mapping[str, Mapping[str, Dictionary]]) -> LayerMatching:
    """Match layers by saved dictionaries alone: the Jaccard index, and their sizes for a control.

    Args:
        models: by name, `build`'s result for each, of the same hooks and on the same stream.

    Raises:
        ValueError: fewer than two models or hooks, hooks that differ, or what `jaccard` raises.
    """
    if len(models) < 2:
        raise ValueError(f"layers are matched between models, and there is {len(models)}: give at least two")
    names, hooks = list(models), list(next(iter(models.values())))
    if odd := [name for name in names if set(models[name]) != set(hooks)]:
        raise ValueError(
            f"{odd[0]} has the hooks {sorted(models[odd[0]])}, {names[0]} has {sorted(hooks)}: build all alike"
        )
    layers = {name: [provenance_of(models[name][hook]) for hook in hooks] for name in names}
    matrices: dict[str, dict[tuple[str, str], Tensor]] = {"jaccard": {}, "size alone": {}}
    for a, b in itertools.product(names, repeat=2):
        matrices["jaccard"][a, b] = layer_similarity(layers[a], layers[b], jaccard)
        matrices["size alone"][a, b] = layer_similarity(layers[a], layers[b], lambda x, y: -abs(len(x) - len(y)))
    return LayerMatching(names, hooks, 0, matrices)


def _listed(itdas: Layers) -> list[Dictionary]:
    return list(itdas.values()) if isinstance(itdas, Mapping) else list(itdas)
