"""How often each measure finds the same layer in a model of another seed, beside controls that look at no content.

    python benchmarks/layer_matching.py [--models FOLDER ...] [--dataset FILE] [--write NAME]

Without models these are the three embedded ones, on held-out text and then training text. `--write` writes the table,
the cells and heatmaps to benchmarks/results.
"""

import argparse
import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TypeAlias

import pandas as pd
import torch
from datasets import concatenate_datasets
from measure import RESULTS, machine, write
from rich.console import Console
from rich.table import Table

from itda_lens import BuildConfig, build, embedded
from itda_lens.interpret import transfer_table
from itda_lens.similarity import LayerMatching, MatchingConfig, less_layer_mean, match_layers
from itda_lens.streams import HookedModel, load_model
from itda_lens.streams.datasets import AnyDataset

Matrices: TypeAlias = dict[tuple[str, str], torch.Tensor]
PLOTTED = (
    "graded membership", "procrustes", "mutual_knn", "linear_cka", "jaccard, equal threshold", "jaccard, equal size",
    "size alone, equal threshold", "mean grade alone",
)  # fmt: skip


def agreement(models: Mapping[str, HookedModel], dataset: AnyDataset | Path, hooks: list[str]) -> Matrices:
    """How alike the atoms of each layer's dictionary stand to each other after transfer (see `transfer_table`)."""
    config = BuildConfig(k=8, n_atoms=512, tokens=20_000, progress=False)
    itdas = {name: build(model, dataset, hooks, config) for name, model in models.items()}
    return {
        (a, b): torch.tensor([transfer_table(itdas[a][hook], models[b], hooks)["agreement"].tolist() for hook in hooks])
        for a, b in itertools.product(models, repeat=2)
    }


def shown(table: pd.DataFrame) -> Table:
    table = table.drop(columns="cells")
    view = Table("measure", *table.columns)
    for name, row in table.iterrows():
        view.add_row(str(name), *("" if pd.isna(x) else f"{x:.3f}" for x in row))
    return view


def plot(found: LayerMatching, name: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    found.plot(PLOTTED).savefig(RESULTS / f"{name}.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, nargs="+", help="folders of models that differ by seed")
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--write", metavar="NAME")
    for option in fields(MatchingConfig):
        if isinstance(option.default, int | float):
            parser.add_argument(f"--{option.name.replace('_', '-')}", type=type(option.default), default=option.default)
    args = parser.parse_args()
    config = MatchingConfig(**{f.name: getattr(args, f.name, f.default) for f in fields(MatchingConfig)})
    models = {folder.name: load_model(str(folder)) for folder in args.models or map(embedded.path, embedded.SEEDS)}
    dataset = args.dataset or concatenate_datasets([embedded.dataset("heldout"), embedded.dataset("train")])
    started, processor = time.perf_counter(), time.process_time()
    found = match_layers(models, dataset, config=config)
    for name in ("linear_cka", "procrustes", "mutual_knn", "relative", "jaccard, equal size"):
        found.matrices[f"{name}, mean taken off"] = less_layer_mean(found.matrices[name])
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    found.matrices["agreement after transfer"] = agreement(models, dataset, list(found.hooks))
    console = Console(width=130)
    console.print(shown(found.table()), *found.notes, found.sizes)
    console.print(f"{found.tokens:,} tokens, {seconds:.0f} s ({processor:.0f} s of processor time); {machine()}")
    if args.write:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "models"}
        table = json.loads(found.table().reset_index().to_json(orient="records"))
        write(args.write, settings, models=list(models), table=table, sizes=found.sizes, tokens=found.tokens,
              seconds=seconds, processor_seconds=processor)  # fmt: skip
        plot(found, args.write)


if __name__ == "__main__":
    main()
