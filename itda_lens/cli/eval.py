"""`itda-lens eval`."""

from contextlib import nullcontext, suppress
from functools import partial

import pandas as pd
from rich.console import Console
from rich.live import Live
from sae_lens import SAE

from itda_lens.cli import loading, saving
from itda_lens.cli.options import Eval, TextOptions
from itda_lens.cli.tables import metrics_table
from itda_lens.evals import evaluate, random_activations, random_directions
from itda_lens.sae import ITDA
from itda_lens.streams import HookedModel
from itda_lens.streams.models import check_device


def run(options: Eval, console: Console) -> None:
    check_device(options.device)
    saving.check_file(options.csv)
    saes = {str(folder): loading.load_sae(folder, options.device) for folder in options.saes}
    first = next(iter(saes.values()))
    if options.built_on is not None and not isinstance(first, ITDA):
        raise ValueError(f"{options.saes[0]} is no ITDA, so it was built on no stream: leave out --built-on")
    loading.check_model(options.model)
    text, model = loading.text_and(
        options.dataset,
        lambda: loading.text_named(options.dataset, options, column=options.column),
        lambda: loading.model_of(first, options.model, "--model", options),
    )
    if options.built_on is not None and isinstance(first, ITDA):
        console.print(f"taking random activations from {options.built_on}")
        saes |= _baselines(first, model, options.built_on)
    live, batches = Live(console=console), 0

    def on_batch(table: pd.DataFrame) -> None:
        nonlocal batches
        batches += 1
        if options.csv is not None:
            with suppress(OSError):  # what can't be written now is tried again at the end
                saving.write_csv(table, options.csv)
        live.update(metrics_table(table, caption=f"{batches} batches of {options.batch_size} rows"))

    with live if console.is_terminal else nullcontext():
        table = evaluate(
            saes,
            model,
            text,
            n_batches=options.n_batches,
            batch_size=options.batch_size,
            progress=not console.is_terminal,
            on_batch=on_batch,
        )
    written = saving.write_all({} if options.csv is None else {options.csv: partial(saving.write_csv, table)})
    if not console.is_terminal:
        console.print(metrics_table(table))
    written.check()


def _baselines(itda: ITDA, model: HookedModel, built_on: str) -> dict[str, SAE]:
    metadata = itda.cfg.metadata
    kept = {name: metadata[f"dataset_{name}"] for name in ("split", "config", "revision")}
    options = TextOptions(**{name: value for name, value in kept.items() if value is not None})
    text = loading.text_named(built_on, options, column=metadata.dataset_column)
    like = itda.with_k(itda.cfg.k)
    like.cfg.metadata.dataset_column = None  # the text is in its usual column by now
    return {
        "random activations": random_activations(like, model, text),
        "random directions": random_directions(itda),
    }
