"""The tables and plots of the quality benchmark, from what its parts have left in the cache.

python -m benchmarks.quality.summary [--write]
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks.measure import RESULTS, write
from benchmarks.quality import stability, synthetic
from benchmarks.quality.dictionaries import PURSUITS
from benchmarks.quality.opponents import CELLS, training_curves
from benchmarks.quality.plots import plot
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
    whole = grid[trained & (grid.tokens >= Settings().draws)]  # not the short runs that a rate was chosen by
    rates = whole.groupby([*key, "lr"])[[*METRICS, "seconds", "tokens", "validation"]].mean().reset_index()
    best = rates.sort_values("validation").groupby(key).tail(1)
    return pd.concat([grid[~trained], best]).groupby(key)[[*METRICS, "seconds", "tokens"]].mean()


def paired(grid: pd.DataFrame, one: tuple[str, str], other: tuple[str, str]) -> dict[str, float]:
    """The mean difference of CE loss scores over cells, and its standard error."""
    difference = (grid.loc[one].ce_score - grid.loc[other].ce_score).dropna()
    return {"mean": difference.mean(), "standard_error": difference.sem(), "cells": len(difference)}


def listed(files: Iterable[Path]) -> pd.DataFrame:
    """The rows of files that hold a list of them each."""
    return pd.DataFrame([row for file in sorted(files) for row in json.loads(file.read_text())])


def of_synthetic(rows: pd.DataFrame) -> Table:
    table = Table("synthetic", "dictionary", "pursuit", "explained", "MCC", "F1", "precision", "recall")
    for (world, method, pursuit), group in rows.groupby(["world", "method", "pursuit"], sort=False):
        columns = ("explained_variance", "mcc", "f1", "precision", "recall")
        table.add_row(world, method, pursuit, *(with_spread(group[column]) for column in columns))
    return table


def of_stability(rows: pd.DataFrame) -> Table:
    table = Table("what differs", "pairs", "atoms in common", "MCC", "cosine > .9", "codes that agree", "CE score")
    for differs, group in rows.groupby("differs", sort=False):
        columns = ("common", "mcc", "near", "codes", "ce_score")
        table.add_row(differs, str(len(group)), *(with_spread(group[column]) for column in columns))
    return table


def with_spread(values: pd.Series) -> str:
    """Mean and standard deviation."""
    return "" if values.isna().all() else f"{values.mean():.3f} ± {values.std():.3f}"


def run(to_file: bool = False) -> None:
    rows = collected()
    grid = on_the_grid(rows)
    table = Table("dictionary", "pursuit", "cells", "CE score", "KL", "explained", "dead", "negative", "seconds")
    for (method, pursuit), group in grid.groupby(level=[0, 1]):
        mean = group.mean()
        figures = (f"{mean[m]:.4f}" for m in ("ce_score", "kl", "explained_variance"))
        shares = (f"{mean[m]:.1%}" for m in ("dead", "negative"))
        table.add_row(method, pursuit, str(len(group)), *figures, *shares, f"{mean.seconds:.1f}")
    console = Console(width=140)
    console.print(table)
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
    on_synthetic = listed(synthetic.FOLDER.glob("*/*/found.json"))
    between_pairs = listed(stability.FOLDER.glob("*/*.json"))
    console.print(of_synthetic(on_synthetic), of_stability(between_pairs))
    if to_file:
        records = {"rows": rows, "synthetic": on_synthetic, "stability": between_pairs}
        as_lists = {name: json.loads(each.to_json(orient="records")) for name, each in records.items()}
        curves = training_curves()
        write("quality", {}, differences=against, share_of_learned=share, training=curves, **as_lists)
        plot(rows, curves, RESULTS / "quality.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the figures and plots to benchmarks/results")
    run(parser.parse_args().write)
