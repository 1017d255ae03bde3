"""What layer matching found: tables and heatmaps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from itda_lens.similarity.calibration import Calibration
from itda_lens.similarity.layers import matching_interval

Pair = tuple[str, str]
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class LayerMatching:
    """Similarities of every layer of every model with every layer of every model, by several measures."""

    models: Sequence[str]
    hooks: Sequence[str]
    tokens: int
    """How many tokens were compared."""
    matrices: dict[str, dict[Pair, Tensor]]
    """By measure and ordered pair of models: a layer of the first in each row."""
    calibrations: dict[str, dict[Pair, Calibration]] = field(default_factory=dict)
    """By measure and pair of different models, in one order."""
    sizes: dict[str, list[int]] = field(default_factory=dict)
    """Atoms of each layer's dictionary at the one threshold, by model."""
    notes: Sequence[str] = ()
    """What to know before the figures are believed."""

    def table(self) -> pd.DataFrame:
        """One row for each measure, the best first.

        `accuracy` is that of layer matching, over pairs of different models, with a bootstrap interval over pairs from
        `low` to `high` where there are several; `with_self` also counts each model with itself, as the paper's table
        does. `effect` is the mean over matching layers, `significant` the share of all cells above chance at 5 %, for
        all cells together.
        """
        rows: list[dict[str, Any]] = []
        for measure, matrices in self.matrices.items():
            found = matching_interval(matrices)
            row = {"measure": measure, "accuracy": found.accuracy}
            if len(self.models) > 2:
                row |= {"low": found.low, "high": found.high}
            row |= {"with_self": matching_interval(matrices, self_pairs=True).accuracy, "cells": found.cells}
            if calibrated := list(self.calibrations.get(measure, {}).values()):
                row["effect"] = float(torch.cat([c.effect.diagonal() for c in calibrated]).mean())
                above = torch.stack([c.p_adjusted <= SIGNIFICANT for c in calibrated])
                row["significant"] = float(above.double().mean())
            rows.append(row)
        return pd.DataFrame(rows).sort_values("accuracy", ascending=False, kind="stable").set_index("measure")

    def cells(self) -> pd.DataFrame:
        """One row for each measure, ordered pair of models and pair of layers; `effect` and `p` where calibrated."""
        rows: list[dict[str, Any]] = []
        for measure, matrices in self.matrices.items():
            for (a, b), matrix in matrices.items():
                calibration = self.calibrations.get(measure, {}).get((a, b))
                for i, hook_a in enumerate(self.hooks):
                    for j, hook_b in enumerate(self.hooks):
                        row: dict[str, Any] = {"measure": measure, "model_a": a, "model_b": b}
                        row |= {"hook_a": hook_a, "hook_b": hook_b}
                        row["similarity"] = float(matrix[i, j])
                        if calibration is not None:
                            row["effect"] = float(calibration.effect[i, j])
                            row["p"] = float(calibration.p[i, j])
                            row["p_adjusted"] = float(calibration.p_adjusted[i, j])
                        rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, measures: Sequence[str] | None = None) -> Any:
        """A matplotlib figure of heatmaps: the mean over ordered pairs of different models, a panel for each measure.

        A ring marks the most similar layer of each row. Raises a ValueError for a measure that there is not.
        """
        from matplotlib import pyplot as plt

        names = list(self.matrices) if measures is None else list(measures)
        if unknown := [name for name in names if name not in self.matrices]:
            raise ValueError(f"{unknown[0]!r} was not measured, only {sorted(self.matrices)}")
        columns = min(4, len(names))
        rows = -(-len(names) // columns)
        figure, axes = plt.subplots(
            rows, columns, figsize=(3.1 * columns, 3.2 * rows), squeeze=False, constrained_layout=True
        )
        for axis in axes.flat[len(names) :]:
            axis.set_axis_off()
        for axis, name in zip(axes.flat, names, strict=False):
            matrices = [matrix for (a, b), matrix in self.matrices[name].items() if a != b]
            mean = torch.stack(matrices).mean(dim=0)
            axis.imshow(mean.numpy(), cmap="viridis")
            axis.plot(mean.argmax(dim=1).numpy(), range(len(mean)), "o", mfc="none", mec="white")
            axis.set_title(f"{name}: {matching_interval(self.matrices[name]).accuracy:.2f}", fontsize=9)
            axis.set(xlabel="layer of the other model", ylabel="layer")
        return figure
