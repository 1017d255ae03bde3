"""`itda-lens build`."""

from dataclasses import fields
from functools import partial
from pathlib import Path

from rich.console import Console

from itda_lens.building import BuildConfig, build
from itda_lens.cli import loading, saving
from itda_lens.cli.options import Build
from itda_lens.sae import ITDA
from itda_lens.streams import canonical_hooks, expand_hooks
from itda_lens.streams.hooks import hook_widths
from itda_lens.streams.models import check_device


def run(options: Build, console: Console) -> None:
    check_device(options.device)
    config = BuildConfig(**{f.name: getattr(options, f.name) for f in fields(BuildConfig)})
    config.builder(1)  # whose checks hold for every width
    config.dataset_name, config.column = options.dataset_name or options.dataset, None
    saving.check_folder(options.out)
    _check_free(options, options.hooks)
    loading.check_model(options.model)
    _check_room(options, [loading.model_width(options.model)] * len(options.hooks))
    text, model = loading.text_and(
        options.dataset,
        lambda: loading.text_named(options.dataset, options, column=options.column),
        lambda: loading.model_named(options.model, options),
    )
    hooks = expand_hooks(model, options.hooks)
    widths = hook_widths(model, canonical_hooks(model, hooks), options.hook_head_index)
    _check_room(options, list(widths.values()))
    with saving.locked(options.out / hook for hook in hooks):
        _check_free(options, hooks)
        try:
            itdas = build(model, text, hooks, config)
        except BaseException as e:
            _save(getattr(e, "itdas", {}), options, console, ".partial")
            raise
        _save(itdas, options, console).check()


def _check_free(options: Build, hooks: list[str]) -> None:
    for folder in (options.out / f"{hook}{ending}" for hook in hooks for ending in ("", ".partial")):
        saving.check_folder(folder)
        if not options.overwrite and folder.exists() and any(folder.iterdir()):
            found = "an SAE" if (folder / "cfg.json").exists() else "files"
            raise ValueError(f"{folder} holds {found} already: name another --out, or pass --overwrite")


def _check_room(options: Build, widths: list[int]) -> None:
    """For the atoms alone, which are nearly all of it; as far as it is known how many there will be."""
    saving.check_room(options.out, 4 * (options.n_atoms or 0) * sum(widths))


def _save(itdas: dict[str, ITDA], options: Build, console: Console, ending: str = "") -> saving.Written:
    folders = {hook: options.out / f"{hook}{ending}" for hook in itdas}
    written = saving.write_all({folders[hook]: partial(_save_one, itda, options) for hook, itda in itdas.items()})
    for hook, itda in itdas.items():
        if (place := written.places.get(folders[hook])) is None:
            continue
        found = f"{itda.cfg.d_sae} atoms at {hook}"
        console.print(f"the build ended early; its {found} are in {place}" if ending else f"{found}: {place}")
    if ending:
        for problem in written.problems:
            console.print(problem, style="red")
    return written


def _save_one(itda: ITDA, options: Build, folder: Path) -> None:
    """With what of the dataset was read, which `build` did not see."""
    for name in ("column", "split", "config", "revision"):
        itda.cfg.metadata[f"dataset_{name}"] = getattr(options, name)
    itda.save_model(folder)
