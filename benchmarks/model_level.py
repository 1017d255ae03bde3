"""Whole models by their dictionaries, and checkpoints of a training run against the last one.

    python benchmarks/model_level.py --dataset FILE [--models FOLDER ...] [--checkpoints FOLDER ...]
                                     [--other-seeds FOLDER ...] [--write NAME]

Dictionaries are of one size at every layer, and atoms compare by text, one document a row, so that models may have
different tokenizers. Beside the checkpoints stand other runs of the same training: what they share with the last
checkpoint, checkpoints share without having come nearer to it. `--write` writes the tables and a plot to
benchmarks/results.
"""

import argparse
import re
from pathlib import Path

import pandas as pd
from measure import RESULTS, write
from rich.console import Console

from itda_lens import ITDA, BuildConfig, build
from itda_lens.similarity import convergence, model_similarity, plot_convergence
from itda_lens.streams import load_model


def dictionaries(folder: Path, dataset: Path, config: BuildConfig) -> dict[str, ITDA]:
    model = load_model(str(folder))
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    if not set(names) <= set(model.hook_dict):
        names = [f"blocks.{layer}.hook_out" for layer in range(model.cfg.n_layers)]
    return build(model, dataset, names, config)


def step(folder: Path) -> float:
    found = re.search(r"step(\d+)$", folder.name)
    return int(found[1]) if found else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, nargs="*", default=[])
    parser.add_argument("--checkpoints", type=Path, nargs="*", default=[], help="...-stepN, and the end of training")
    parser.add_argument("--other-seeds", type=Path, nargs="*", default=[], help="models at the end of training")
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--n-atoms", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=25_000)
    parser.add_argument("--last-step", type=int, default=2000, help="the step of a checkpoint whose name has none")
    parser.add_argument("--write", metavar="NAME")
    args = parser.parse_args()
    config = BuildConfig(k=8, n_atoms=args.n_atoms, tokens=args.tokens, pack=False, progress=False)
    console, figures = Console(width=150), {}
    if args.models:
        table = model_similarity({folder.name: dictionaries(folder, args.dataset, config) for folder in args.models})
        console.print(table.round(3).to_string())
        figures["models"] = table.to_dict()
    if args.checkpoints:
        ordered = sorted(args.checkpoints, key=step)
        steps = {int(min(step(f), args.last_step)): dictionaries(f, args.dataset, config) for f in ordered}
        others = {f.name: dictionaries(f, args.dataset, config) for f in args.other_seeds}
        last = max(steps)
        table = convergence(steps)
        controls = convergence({**others, last: steps[last]}).drop(index=last) if others else table.iloc[:0]
        shown = pd.concat([table, controls])
        console.print(shown.rename(columns=lambda hook: hook.split(".")[1]).round(3).to_string())
        figures["convergence"] = shown.to_dict()
        figure = plot_convergence(table)
        if others:
            label = "other seeds, mean of layers"
            figure.axes[0].axhline(controls.to_numpy().mean(), linestyle="--", color="grey", label=label)
            figure.axes[0].legend(fontsize=7)
    if args.write:
        write(args.write, {k: str(v) for k, v in vars(args).items() if k in ("n_atoms", "tokens")}, **figures)
        if args.checkpoints:
            figure.savefig(RESULTS / f"{args.write}.png", dpi=110)


if __name__ == "__main__":
    main()
