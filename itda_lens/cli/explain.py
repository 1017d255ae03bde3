"""`itda-lens explain`."""

from rich.console import Console

from itda_lens.cli import loading
from itda_lens.cli.options import Explain
from itda_lens.cli.tables import explanation_table
from itda_lens.interpret import explain
from itda_lens.streams.models import check_device


def run(options: Explain, console: Console) -> None:
    check_device(options.device)
    itda = loading.load_itda(options.itda, options.device)
    model = loading.model_of(itda, options.model, "--model", options)
    for explanation in explain(itda, model, options.prompt, options.positions, options.n_terms):
        console.print(explanation_table(explanation))
