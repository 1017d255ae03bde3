"""`itda-lens build`."""

from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from itda_lens.building import BuildConfig, build
from itda_lens.cli import loading
from itda_lens.cli.options import Build
from itda_lens.sae import ITDA
from itda_lens.streams import expand_hooks


def run(options: Build, console: Console) -> None:
    loading.check_device(options.device)
    config = BuildConfig(**{f.name: getattr(options, f.name) for f in fields(BuildConfig)})
    config.builder(1)  # whose checks hold for every width
    config.dataset_name, config.column = options.dataset_name or options.dataset, None
    loading.check_folder(options.out)
    _check_free(options, options.hooks)
    loading.check_model(options.model)
    text, model = loading.text_and(
        options.dataset,
        lambda: loading.text_named(options.dataset, options, column=options.column),
        lambda: loading.model_named(options.model, options),
    )
    hooks = expand_hooks(model, options.hooks)
    _check_free(options, hooks)
    try:
        itdas = build(model, text, hooks, config)
    except BaseException as e:
        for hook, itda in getattr(e, "itdas", {}).items():
            folder = options.out / f"{hook}.partial"
            _save(itda, folder, options)
            found = f"the build ended early; its {itda.cfg.d_sae} atoms at {hook} are in {folder}"
            console.print(f"[red]{escape(found)}[/red]")
        raise
    for hook, itda in itdas.items():
        _save(itda, options.out / hook, options)
        console.print(escape(f"{itda.cfg.d_sae} atoms at {hook}: {options.out / hook}"))


def _check_free(options: Build, hooks: list[str]) -> None:
    taken = [folder for hook in hooks if ((folder := options.out / hook) / "cfg.json").exists()]
    if taken and not options.overwrite:
        raise ValueError(f"{taken[0]} holds an SAE already: name another --out, or pass --overwrite")


def _save(itda: ITDA, folder: Path, options: Build) -> None:
    """With what of the dataset was read, which `build` did not see."""
    for name in ("column", "split", "config", "revision"):
        itda.cfg.metadata[f"dataset_{name}"] = getattr(options, name)
    itda.save_model(folder)
