"""`itda-lens compare`."""

import importlib.util
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from itda_lens.cli import loading, saving
from itda_lens.cli.options import Compare
from itda_lens.cli.tables import metrics_table
from itda_lens.similarity import MatchingConfig, match_dictionaries, match_layers
from itda_lens.similarity.matching import LayerMatching
from itda_lens.streams import expand_hooks
from itda_lens.streams.models import check_device


def run(options: Compare, console: Console) -> None:
    check_device(options.device)
    if bool(options.models) == bool(options.builds):
        raise ValueError("pass --models with --dataset, or --builds")
    if options.plot is not None:
        _check_plot(options.plot)
    for path in (options.csv, options.plot):
        saving.check_file(path)
    found = _match_models(options) if options.models else _match_builds(options)
    writes: dict[Path, Callable[[Path], object]] = {}
    if options.csv is not None:
        writes[options.csv] = lambda path: saving.write_csv(found.cells(), path, index=False)
    if options.plot is not None:
        writes[options.plot] = lambda path: _plot(found, path)
    written = saving.write_all(writes)
    console.print(metrics_table(found.table()), *found.notes)
    written.check()


def _check_plot(path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise ValueError(f"--plot {path} is no image file: name one that ends in .{', .'.join(sorted(kinds))}")


def _plot(found: LayerMatching, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    found.plot().savefig(path, dpi=120)


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
