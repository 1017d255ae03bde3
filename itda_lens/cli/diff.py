"""`itda-lens diff`."""

from rich.console import Console

from itda_lens.cli import loading
from itda_lens.cli.options import Diff
from itda_lens.cli.tables import ranked_table
from itda_lens.interpret import diff


def run(options: Diff, console: Console) -> None:
    loading.check_device(options.device)
    if options.out is not None:
        loading.check_folder(options.out)
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
    console.print(f"[b]Prompts[/b]  that changed most, of {len(found.prompts)}; q < 0.05 stands out from the bulk")
    console.print(ranked_table(found.prompts.head(options.rows), "row", ["n_tokens", "shift", "z", "q"]))
    console.print("[b]Latents[/b]  that the other model uses more often")
    console.print(ranked_table(found.latents.head(options.rows), "latent", ["base_use", "tuned_use", "z"]))
    if native is not None:
        console.print("[b]Atoms[/b]  that only one of the two dictionaries has")
        console.print(ranked_table(found.atoms.head(options.rows), "", ["model", "atom", "shift", "need"]))
    if options.out is not None:
        for name, table in found._asdict().items():
            if len(table):
                loading.write_csv(table, options.out / f"{name}.csv")
