"""`itda-lens compare`."""

import importlib.util
from dataclasses import fields

from rich.console import Console
from rich.markup import escape

from itda_lens.cli import loading
from itda_lens.cli.options import Compare
from itda_lens.cli.tables import metrics_table
from itda_lens.similarity import MatchingConfig, match_dictionaries, match_layers
from itda_lens.similarity.matching import LayerMatching
from itda_lens.streams import expand_hooks


def run(options: Compare, console: Console) -> None:
    loading.check_device(options.device)
    if bool(options.models) == bool(options.builds):
        raise ValueError("pass --models with --dataset, or --builds")
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    for path in (options.csv, options.plot):
        loading.check_file(path)
    found = _match_models(options) if options.models else _match_builds(options)
    console.print(metrics_table(found.table()), *map(escape, found.notes))
    if options.csv is not None:
        loading.write_csv(found.cells(), options.csv, index=False)
    if options.plot is not None:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        found.plot().savefig(options.plot, dpi=120)


def _match_builds(options: Compare) -> LayerMatching:
    return match_dictionaries({str(folder): loading.load_build(folder) for folder in options.builds})


def _match_models(options: Compare) -> LayerMatching:
    dataset = options.dataset
    if dataset is None:
        raise ValueError("--models needs --dataset, the text that they read")
    for name in options.models:
        loading.check_model(name)
    config = MatchingConfig(**{f.name: getattr(options, f.name) for f in fields(MatchingConfig)})
    config.column = None
    text, models = loading.text_and(
        dataset,
        lambda: loading.text_named(dataset, options, column=options.column),
        lambda: {name: loading.model_named(name, options) for name in options.models},
    )
    hooks = expand_hooks(next(iter(models.values())), options.hooks)
    return match_layers(models, text, hooks or None, config)
