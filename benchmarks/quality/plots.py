"""CE loss score against L0 and the number of atoms, and how SAEs converge, in the one cell where these were varied."""

from pathlib import Path

import pandas as pd

from benchmarks.quality.opponents import FIRST
from benchmarks.quality.saes import Settings

SHOWN = {
    ("topk decoder", "orthogonal"): ("TopK SAE's decoder, orthogonal pursuit", "tab:green", "s--"),
    ("topk", "sae"): ("TopK SAE (100 times the tokens)", "tab:green", "s-"),
    ("ours", "orthogonal"): ("ITDA (default)", "tab:blue", "o-"),
    ("random_activations", "orthogonal"): ("random activations, orthogonal pursuit", "tab:orange", "^-"),
    ("paper", "plain"): ("ITDA as in the paper", "tab:red", "v-"),
}


def plot(rows: pd.DataFrame, curves: dict[float, list[dict[str, float]]], path: Path) -> None:
    """Of what `collected` and `training_curves` return. The first seed is drawn; of learning rates, the best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    default = Settings()
    cell = rows[(rows.model == FIRST[0]) & (rows.hook == FIRST[1]) & (rows.seed == 0)]
    figure, (*panels, training) = plt.subplots(1, 3, figsize=(14, 4.2), constrained_layout=True)
    panels[1].sharey(panels[0])
    for panel, varied, fixed in zip(panels, ("k", "n"), ("n", "k"), strict=True):
        line = cell[cell[fixed] == getattr(default, fixed)]
        for (method, pursuit), (label, colour, style) in SHOWN.items():
            own = line[(line.method == method) & (line.pursuit == pursuit)]
            points = own.sort_values("validation").groupby(varied).tail(1).sort_values(varied)
            panel.plot(points[varied], points.ce_score, style, color=colour, label=label, markersize=5)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted(line[varied].unique()))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.set_title(f"{fixed} = {getattr(default, fixed):,}".replace("k =", "L0 =").replace("n =", "atoms ="))
        panel.grid(alpha=0.3)
    panels[0].set(xlabel="L0", ylabel="CE loss score")
    panels[1].set_xlabel("atoms")
    panels[1].legend(fontsize=8, loc="lower right")
    for rate, curve in curves.items():
        points = pd.DataFrame(curve)
        training.plot(points.draws / 1e6, points.explained_variance, label=f"learning rate {rate:g}")
    training.set(xlabel="million token draws", ylabel="explained variance, validation", title="TopK SAE in training")
    training.grid(alpha=0.3)
    training.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
