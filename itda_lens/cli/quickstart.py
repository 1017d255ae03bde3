"""`itda-lens quickstart`."""

import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from sae_lens import SAE

from itda_lens import embedded
from itda_lens.building import BuildConfig, build
from itda_lens.cli import loading
from itda_lens.cli.options import Quickstart
from itda_lens.cli.tables import explanation_table, metrics_table, visible
from itda_lens.evals import evaluate, random_activations, random_directions
from itda_lens.interpret import explain


def run(options: Quickstart, console: Console) -> None:
    loading.check_device(options.device)
    loading.check_folder(options.out)
    config = BuildConfig(k=options.k, n_atoms=options.n_atoms, tokens=options.tokens)
    config.builder(1)  # whose checks hold for every width
    model = loading.model_named("embedded", options)
    train, heldout = embedded.dataset("train"), embedded.dataset("heldout")
    console.print(
        f"[b]1. Build[/b]  {options.n_atoms} atoms, L0 = {options.k}, at {escape(options.hook)} of the embedded model "
        f"(d = {model.cfg.d_model}),\n   from {options.tokens:,} tokens of Python's own documentation"
    )
    started = time.perf_counter()
    itda = build(model, train, options.hook, config)[options.hook]
    console.print(f"   built in {time.perf_counter() - started:.1f} s on {torch.get_num_threads()} CPU threads\n")
    itda.save_model(options.out)

    console.print("[b]2. Evaluate[/b]  on held-out text, beside two baselines of the same size")
    candidates: dict[str, SAE] = {
        "ITDA": itda,
        "random activations": random_activations(itda, model, train),
        "random directions": random_directions(itda),
    }
    console.print(metrics_table(evaluate(candidates, model, heldout)), "")

    console.print("[b]3. Explain[/b]  what the activations of a prompt are made of; each atom is a «token» of a prompt")
    prompt = options.prompt or " ".join(heldout[0]["text"].split(" ")[:16])
    console.print(f"   the last three tokens of the held-out prompt: {escape(visible(prompt))}")
    for explanation in explain(itda, model, prompt, [-3, -2, -1], n_terms=4):
        console.print(explanation_table(explanation))
    console.print(
        f"\n[b]4. Use it[/b]  saved to {escape(str(options.out))}; these lines load it and hook it into the model:\n"
    )
    console.print(escape(usage_lines(options.out)), highlight=False)


def usage_lines(folder: Path) -> str:
    """The Python that loads the quickstart's ITDA and runs the model with it."""
    return f"""\
import itda_lens                       # registers the architecture with SAELens
from sae_lens import SAE

model = itda_lens.embedded.model()     # any HookedSAETransformer
itda = SAE.load_from_disk("{folder}")
tokens = model.to_tokens("Return the number of items")
logits = model.run_with_saes(tokens, saes=[itda])
_, cache = model.run_with_cache_with_saes(tokens, saes=[itda])
acts = cache[itda.cfg.metadata.hook_name + ".hook_sae_acts_post"]
atom = int(acts[0, -1].abs().argmax())
print(repr(itda.provenance.text(atom)))"""
