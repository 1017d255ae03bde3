"""The table of the quality benchmark, from what `opponents` and `dictionaries` have left in the cache.

python -m benchmarks.quality.summary [--write]
"""

import argparse
import json
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks.measure import write
from benchmarks.quality.dictionaries import PURSUITS
from benchmarks.quality.opponents import CELLS
from benchmarks.quality.saes import Settings
from benchmarks.quality.subjects import CACHE

METRICS = ("ce_score", "kl", "explained_variance", "l0", "dead", "negative")


def collected() -> pd.DataFrame:
    """One row for each dictionary and pursuit: what it is, what it cost, and its scores on held-out text."""
    rows: list[dict[str, Any]] = []
    for file in sorted(CACHE.glob("*/*/*-seed*.json")):
        record = json.loads(file.read_text())
        (model, hook), common = record.pop("cell"), {key: record[key] for key in ("n", "k", "seed", "tokens")}
        common |= {"seconds": record["seconds"] + record["forward_seconds"]}
        for pursuit in PURSUITS.keys() & record.keys():
            rows.append({"model": model, "hook": hook, "method": record["method"], "pursuit": pursuit} | common)
            rows[-1] |= {metric: record[pursuit][metric] for metric in METRICS}
    for file in sorted(CACHE.glob("*/*/*/scores.json")):
        training, scores = (json.loads((file.parent / f"{name}.json").read_text()) for name in ("training", "scores"))
        forward = json.loads((file.parents[1] / "forward.json").read_text())["wall_seconds_per_token"]
        settings = training["settings"]
        common = {key: settings[key] for key in ("n", "k", "seed", "lr")} | {"tokens": training["draws"]}
        common |= {"seconds": training["wall_seconds"] + forward * training["draws"]}
        common |= {"validation": training["validation_explained_variance"], "distinct": training["distinct_tokens"]}
        for pursuit in ("sae", "plain", "orthogonal"):
            method = settings["architecture"] + ("" if pursuit == "sae" else " decoder")
            cell = {"model": training["subject"], "hook": training["hook"]}
            rows.append(cell | {"method": method, "pursuit": pursuit} | common)
            rows[-1] |= {metric: scores[pursuit][metric] for metric in METRICS}
    return pd.DataFrame(rows)


def on_the_grid(rows: pd.DataFrame) -> pd.DataFrame:
    """Each method's mean over seeds in each of the nine cells; of SAEs the learning rate that validation chose."""
    cells = pd.MultiIndex.from_tuples(CELLS)
    grid = rows[(rows.n == Settings().n) & (rows.k == Settings().k)].set_index(["model", "hook"])
    grid = grid[grid.index.isin(cells)].reset_index()
    key = ["method", "pursuit", "model", "hook"]
    trained = grid.lr.notna()
    best = grid[trained].sort_values("validation").groupby(key).tail(1)
    return pd.concat([grid[~trained], best]).groupby(key)[[*METRICS, "seconds", "tokens"]].mean()


def paired(grid: pd.DataFrame, one: tuple[str, str], other: tuple[str, str]) -> dict[str, float]:
    """The mean difference of CE loss scores over cells, and its standard error."""
    difference = (grid.loc[one].ce_score - grid.loc[other].ce_score).dropna()
    return {"mean": difference.mean(), "standard_error": difference.sem(), "cells": len(difference)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the figures to benchmarks/results")
    args = parser.parse_args()
    rows = collected()
    grid = on_the_grid(rows)
    table = Table("dictionary", "pursuit", "cells", "CE score", "KL", "explained", "dead", "negative", "seconds")
    for (method, pursuit), group in grid.groupby(level=[0, 1]):
        mean = group.mean()
        figures = (f"{mean[m]:.4f}" for m in ("ce_score", "kl", "explained_variance"))
        shares = (f"{mean[m]:.1%}" for m in ("dead", "negative"))
        table.add_row(method, pursuit, str(len(group)), *figures, *shares, f"{mean.seconds:.1f}")
    Console(width=120).print(table)
    ours, learned, random = ((name, "orthogonal") for name in ("ours", "topk decoder", "random_activations"))
    against = {
        "TopK SAE": paired(grid, ours, ("topk", "sae")),
        "random activations": paired(grid, ours, random),
        "the paper's mode": paired(grid, ours, ("paper", "plain")),
    }
    for name, figures in against.items():
        print(f"ours - {name}: {figures['mean']:+.4f}, standard error {figures['standard_error']:.4f}")
    means = {name: grid.loc[key].ce_score.mean() for name, key in (("o", ours), ("l", learned), ("r", random))}
    share = (means["o"] - means["r"]) / (means["l"] - means["r"])
    print(f"share of the way from random activations to learned directions: {share:.2f}")
    if args.write:
        write(
            "quality", {}, differences=against, share_of_learned=share, rows=json.loads(rows.to_json(orient="records"))
        )


if __name__ == "__main__":
    main()
