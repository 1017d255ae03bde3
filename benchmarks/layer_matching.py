"""How often each measure finds the same layer in a model of another seed, beside controls that look at no content.

    python benchmarks/layer_matching.py [--models FOLDER ...] [--dataset FILE] [--write NAME]

Without models these are the three embedded ones, on held-out text and then training text. `--write` writes the table,
the cells and heatmaps to benchmarks/results.
"""

import argparse
import json
import time
from dataclasses import fields
from pathlib import Path

import pandas as pd
from datasets import concatenate_datasets
from measure import RESULTS, machine, write
from rich.console import Console
from rich.table import Table

from itda_lens import embedded
from itda_lens.similarity import LayerMatching, MatchingConfig, less_layer_mean, match_layers
from itda_lens.streams import load_model

PLOTTED = (
    "graded membership", "procrustes", "mutual_knn", "linear_cka", "jaccard, equal threshold", "jaccard, equal size",
    "size alone, equal threshold", "mean grade alone",
)  # fmt: skip


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
