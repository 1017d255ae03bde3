"""ITDAs of a real language model, SmolLM2-135M: what they cost beside its forward passes, and how good they are.

    python -m benchmarks.language_model --write

The model comes from the package index (`benchmarks.smollm2`), the text is the documentation that every Python carries.
All layers share one pass. For each, an ITDA stands beside random activations and random directions of several seeds,
with SAELens's metrics on held-out text. README's main call, which replaces every token, is measured on both kinds of
model, beside the same where special tokens are left out.
"""

import argparse
import time
from functools import partial
from typing import Any

import pandas as pd
import torch
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import Tensor

from benchmarks import measure, smollm2
from itda_lens import ITDA, BuildConfig, embedded, load_model
from itda_lens.evals import evaluate, random_activations, random_directions
from itda_lens.streams import activation_batches, canonical_hooks, special_token_ids, token_batches
from itda_lens.streams.models import model_metadata

SEEDS = range(3)
COLUMNS = ["ce_loss_score", "kl_div_score", "explained_variance_ordinary", "explained_variance", "massive", "l0"]


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    folder = smollm2.make(smollm2.default_folder())
    model = load_model(folder)
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in arguments.layers]
    config = BuildConfig(k=arguments.k, n_atoms=arguments.atoms, tokens=arguments.tokens, batch_size=16)
    itdas, costs = built(model, hooks, config)
    print(pd.DataFrame(costs).to_string())
    scored = table(model, itdas, config, arguments.rows)
    print(scored.to_string(float_format="{:.4f}".format))
    bridge = SAETransformerBridge.boot_transformers(str(folder), device="cpu")
    harm = pd.DataFrame(main_call(model, bridge, itdas, arguments.rows))
    print(harm.round(4).to_string())
    if arguments.write:
        measure.write(
            "language_model",
            vars(arguments),
            seconds=costs,
            scores=scored.reset_index().to_dict("records"),
            main_call=harm.to_dict("records"),
        )


def built(model: Any, hooks: list[str], config: BuildConfig) -> tuple[dict[str, ITDA], list[dict[str, Any]]]:
    """What `build` does, with the seconds of the model and of each builder, on the wall and on the processors."""
    builders = {hook: config.builder(model.cfg.d_model, tokenizer=model.tokenizer) for hook in hooks}
    seconds = dict.fromkeys(["model", *hooks], 0.0)
    busy = dict.fromkeys(["model", *hooks], 0.0)
    batches = iter(
        activation_batches(
            model,
            embedded.dataset(),
            canonical_hooks(model, hooks),
            context_size=config.context_size,
            batch_size=config.batch_size,
        )
    )
    tokens = 0

    def timed(name: str, run: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        found = run()
        seconds[name] += time.perf_counter() - wall
        busy[name] += time.process_time() - cpu
        return found

    while not all(builder.done for builder in builders.values()):
        batch = timed("model", partial(next, batches))
        tokens += int(batch.mask.sum())
        for hook, builder in builders.items():
            others = batch.real & ~batch.mask
            timed(hook, partial(builder.update, batch.activations[hook], batch.tokens, batch.mask, others))
    metadata = {**model_metadata(model), "prepend_bos": True, "context_size": config.context_size, "pack": True}
    metadata |= {"exclude_special_tokens": True, "seqpos_slice": [None]}
    itdas = {hook: builder.to_itda({**metadata, "hook_name": hook}) for hook, builder in builders.items()}
    rows = [{"what": name, "seconds": s, "cpu_seconds": busy[name], "tokens": tokens} for name, s in seconds.items()]
    for row in rows:
        row["tokens_per_cpu_second"] = tokens / row["cpu_seconds"]
        row["share_of_the_model"] = row["cpu_seconds"] / busy["model"]
        if row["what"] in itdas:
            row["sinks"] = itdas[row["what"]].cfg.metadata.itda_build["sinks"]
    return itdas, rows


def table(model: Any, itdas: dict[str, ITDA], config: BuildConfig, rows: int) -> pd.DataFrame:
    """Scores of each ITDA, and of baselines by seed."""
    activations = random_activations(itdas, model, embedded.dataset(), seed=list(SEEDS), batch_size=16)
    saes: dict[str, Any] = {}
    for hook, itda in itdas.items():
        saes[f"{hook}|ITDA|"] = itda
        saes |= {f"{hook}|random activations|{seed}": activations[hook][seed] for seed in SEEDS}
        saes |= {f"{hook}|random directions|{seed}": random_directions(itda, seed=seed) for seed in SEEDS}
    found = evaluate(saes, model, embedded.dataset("heldout"), batch_size=8, n_batches=rows // 8)[COLUMNS]
    names = pd.MultiIndex.from_tuples([tuple(name.split("|")) for name in found.index], names=["hook", "sae", "seed"])
    grouped = found.set_index(names).groupby(["hook", "sae"], sort=False)
    spread = grouped[COLUMNS[:3]].std().add_suffix("_std")
    joined = pd.concat([grouped.mean(), spread], axis=1)
    return joined.astype(object).where(joined.notna(), None)  # a single dictionary has no spread


@torch.no_grad()
def main_call(model: Any, bridge: Any, itdas: dict[str, ITDA], rows: int) -> list[dict[str, Any]]:
    """CE loss scores of `run_with_saes(tokens, saes=[itda])`, and of the same with special tokens left out."""
    tokens, _ = next(token_batches(model, embedded.dataset("heldout"), context_size=128, batch_size=rows))
    special = torch.isin(tokens, torch.tensor(special_token_ids(model)))
    found = []
    for kind, runner in {"HookedSAETransformer": model, "SAETransformerBridge": bridge}.items():
        for name, itda in itdas.items():
            [hook] = canonical_hooks(runner, [name]).values()
            own = itda.with_k(itda.cfg.k)
            own.cfg.metadata.hook_name = hook
            replacing = partial(_replacing, runner, hook)
            clean, zero, spared, everything = (
                _loss(run, tokens, special)
                for run in (
                    lambda part, _, runner=runner: runner(part, prepend_bos=False),
                    replacing(torch.zeros_like),
                    replacing(own),
                    lambda part, _, runner=runner, own=own: runner.run_with_saes(part, saes=[own], prepend_bos=False),
                )
            )
            scores = {"special_tokens_spared": spared, "everything_replaced": everything}
            scores = {name: (zero - loss) / (zero - clean) for name, loss in scores.items()}
            found.append({"kind": kind, "hook": name, "clean_loss": clean, "loss": everything, **scores})
            canonical_hooks(runner, [hook])  # mends the hook point that SAELens leaves on a bridge
    return found


def _replacing(model: Any, hook: str, replacement: Any) -> Any:
    """Runs a model on some rows with the activations of all but special tokens replaced."""

    def run(tokens: Tensor, special: Tensor) -> Tensor:
        def replace(x: Tensor, hook: Any) -> Tensor:
            return torch.where(special[..., None], x, replacement(x))

        return model.run_with_hooks(tokens, fwd_hooks=[(hook, replace)], prepend_bos=False)

    return run


def _loss(run: Any, tokens: Tensor, special: Tensor) -> float:
    """The mean loss at ordinary tokens, a few rows at a time."""
    losses = []
    for part, left_out in zip(tokens.split(4), special.split(4), strict=True):
        logits = run(part, left_out)
        found = torch.nn.functional.cross_entropy(logits[:, :-1].mT, part[:, 1:], reduction="none")
        losses.append(found[~left_out[:, :-1]])
    return float(torch.cat(losses).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 20])
    parser.add_argument("--atoms", type=int, default=4096)
    parser.add_argument("-k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    main(parser.parse_args())
