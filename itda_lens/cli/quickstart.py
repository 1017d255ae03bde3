"""`itda-lens quickstart`."""

import json
import time
from pathlib import Path

import torch
from rich.console import Console
from sae_lens import SAE

from itda_lens import embedded
from itda_lens.building import BuildConfig, build
from itda_lens.cli import loading, saving
from itda_lens.cli.options import Quickstart
from itda_lens.cli.tables import explanation_table, headed, metrics_table, visible
from itda_lens.evals import evaluate, random_activations, random_directions
from itda_lens.interpret import explain
from itda_lens.streams.models import check_device

_MARK = "itda_quickstart"


def run(options: Quickstart, console: Console) -> None:
    check_device(options.device)
    saving.check_folder(options.out)
    config = BuildConfig(k=options.k, n_atoms=options.n_atoms, tokens=options.tokens)
    config.builder(1)  # whose checks hold for every width
    with saving.locked([options.out]):
        _check_free(options)
        _run(options, config, console)


def _run(options: Quickstart, config: BuildConfig, console: Console) -> None:
    model = loading.model_named("embedded", options)
    saving.check_room(options.out, 4 * options.n_atoms * model.cfg.d_model)
    train, heldout = embedded.dataset("train"), embedded.dataset("heldout")
    text = (
        f"{options.n_atoms} atoms, L0 = {options.k}, at {options.hook} of the embedded model "
        f"(d = {model.cfg.d_model}),\n   from {options.tokens:,} tokens of Python's own documentation"
    )
    console.print(headed("1. Build", text))
    started = time.perf_counter()
    itda = build(model, train, options.hook, config)[options.hook]
    seconds = time.perf_counter() - started
    itda.cfg.metadata[_MARK] = True
    written = saving.write_all({options.out: itda.save_model})
    console.print(f"   built in {seconds:.1f} s on {torch.get_num_threads()} CPU threads\n")

    console.print(headed("2. Evaluate", "on held-out text, beside two baselines of the same size"))
    candidates: dict[str, SAE] = {
        "ITDA": itda,
        "random activations": random_activations(itda, model, train),
        "random directions": random_directions(itda),
    }
    console.print(metrics_table(evaluate(candidates, model, heldout)), "")

    text = "what the activations of a prompt are made of; each atom is a «token» of a prompt"
    console.print(headed("3. Explain", text))
    prompt = options.prompt or " ".join(heldout[0]["text"].split(" ")[:16])
    console.print(f"   the last three tokens of the held-out prompt: {visible(prompt)}")
    for explanation in explain(itda, model, prompt, [-3, -2, -1], n_terms=4):
        console.print(explanation_table(explanation))
    written.check()
    console.print("")
    console.print(headed("4. Use it", f"saved to {options.out}; these lines load it and hook it into the model:\n"))
    console.print(usage_lines(options.out))


def _check_free(options: Quickstart) -> None:
    """An earlier quickstart's may be replaced, and nothing else."""
    if options.overwrite or not options.out.is_dir() or not any(options.out.iterdir()):
        return
    try:
        metadata = json.loads((options.out / "cfg.json").read_text(encoding="utf8"))["metadata"]
        replaceable = metadata[_MARK] is True
    except (OSError, ValueError, LookupError, TypeError):
        replaceable = False
    if not replaceable:
        raise ValueError(
            f"{options.out} holds what no quickstart has written: name another --out, or pass --overwrite to replace it"
        )


def usage_lines(folder: Path) -> str:
    """The Python that loads the quickstart's ITDA and runs the model with it."""
    return f"""\
import itda_lens                       # registers the architecture with SAELens
from sae_lens import SAE

model = itda_lens.embedded.model()     # any HookedSAETransformer
itda = SAE.load_from_disk({str(folder)!r})
tokens = model.to_tokens("Return the number of items")
logits = model.run_with_saes(tokens, saes=[itda])
_, cache = model.run_with_cache_with_saes(tokens, saes=[itda])
acts = cache[itda.cfg.metadata.hook_name + ".hook_sae_acts_post"]
atom = int(acts[0, -1].abs().argmax())
print(repr(itda.provenance.text(atom)))"""
