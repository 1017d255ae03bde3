"""`itda-lens diff`."""

from functools import partial

from rich.console import Console

from itda_lens.cli import loading, saving
from itda_lens.cli.options import Diff
from itda_lens.cli.tables import headed, ranked_table
from itda_lens.interpret import diff
from itda_lens.streams.models import check_device


def run(options: Diff, console: Console) -> None:
    check_device(options.device)
    if options.rows < 1:
        raise ValueError(f"rows must be at least 1, got {options.rows}")
    if options.out is not None:
        saving.check_folder(options.out)
    itda = loading.load_itda(options.itda, options.device)
    native, second = (
        None if folder is None else loading.load_itda(folder, options.device)
        for folder in (options.native, options.second)
    )
    for name in (options.base, options.tuned):
        loading.check_model(name)
    text, (base, tuned) = loading.text_and(
        options.dataset,
        lambda: loading.text_named(options.dataset, options, column=options.column),
        lambda: (loading.model_of(itda, options.base, "--base", options), loading.model_named(options.tuned, options)),
    )
    found = diff(base, tuned, itda, text, native=native, second=second, tokens=options.tokens)
    written = saving.write_all(
        {
            options.out / f"{name}.csv": partial(saving.write_csv, table)
            for name, table in found._asdict().items()
            if options.out is not None and len(table)
        }
    )
    more = f"that changed most, of {len(found.prompts)}; q < 0.05 stands out from the bulk"
    console.print(headed("Prompts", more))
    console.print(ranked_table(found.prompts.head(options.rows), "row", ["n_tokens", "shift", "z", "q"]))
    console.print(headed("Latents", "that the other model uses more often"))
    console.print(ranked_table(found.latents.head(options.rows), "latent", ["base_use", "tuned_use", "z"]))
    if native is not None:
        console.print(headed("Atoms", "that only one of the two dictionaries has"))
        console.print(ranked_table(found.atoms.head(options.rows), "", ["model", "atom", "shift", "need"]))
    written.check()
