"""An ITDA beside a SAELens `TopKSAE` of the same shape, alone and hooked into a model: time and peak memory.

    python benchmarks/saelens.py [--out results.json]

The model has the shape of GPT-2 small, and random weights. Times are taken in turn in one process, `--repeats` times;
the table shows medians, and medians of the ratio within a turn. Peak memory (on Linux) is that of a process for each
SAE, above what it holds after a first, very small call.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sae_lens import SAE, HookedSAETransformer, TopKSAE, TopKSAEConfig
from transformer_lens import HookedTransformerConfig

from itda_lens import ITDA

HOOK = "blocks.6.hook_resid_pre"
D = 768
KINDS = ("ITDA", "TopKSAE")


def gpt2_small(seed: int = 0) -> HookedSAETransformer:
    torch.manual_seed(seed)
    shape = {"n_layers": 12, "d_model": D, "n_heads": 12, "d_head": 64, "d_vocab": 50257, "n_ctx": 1024}
    config = HookedTransformerConfig(**shape, act_fn="gelu_new", normalization_type="LN", seed=seed)
    return HookedSAETransformer(config).eval()


def sae_of(kind: str, n: int, k: int, seed: int = 0) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(n, D, generator=generator), dim=-1)
    if kind == "ITDA":
        return ITDA.from_atoms(rows, k, metadata={"hook_name": HOOK})
    sae = TopKSAE(TopKSAEConfig(d_in=D, d_sae=n, k=k))
    sae.W_dec.data, sae.W_enc.data = rows, rows.T.contiguous()
    sae.cfg.metadata.hook_name = HOOK
    return sae


def jobs(sae: SAE, model: HookedSAETransformer, rows: int, context: int) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, context, D, generator=generator)
    tokens = torch.randint(50257, (rows, context), generator=generator)
    return {
        "encode and decode": lambda: sae.decode(sae.encode(x)),
        "run_with_saes": lambda: model.run_with_saes(tokens, saes=[sae]),
    }


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@torch.no_grad()
def speed(n: int, k: int, rows: int, context: int, repeats: int) -> dict[str, dict[str, float]]:
    model = gpt2_small()
    by_sae = {kind: jobs(sae_of(kind, n, k), model, rows, context) for kind in KINDS}
    cold = {kind: seconds(jobs["encode and decode"]) for kind, jobs in by_sae.items()}
    figures = {"encode and decode, first call": cold | {"ratio": cold["ITDA"] / cold["TopKSAE"]}}
    for name in by_sae["ITDA"]:
        turns = [{kind: seconds(jobs[name]) for kind, jobs in by_sae.items()} for _ in range(repeats + 1)][1:]
        medians = {kind: statistics.median(turn[kind] for turn in turns) for kind in KINDS}
        ratios = sorted(turn["ITDA"] / turn["TopKSAE"] for turn in turns)
        figures[name] = medians | {"ratio": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}
    figures["the model alone"] = {"ITDA": seconds(lambda: model(torch.zeros(rows, context, dtype=torch.int64)))}
    return figures


@torch.no_grad()
def peak_megabytes(kind: str, n: int, k: int, rows: int, context: int) -> float:
    sae_of(kind, k, k)(torch.zeros(1, D))  # loads what is compiled
    sae = sae_of(kind, n, k)
    x = torch.randn(rows, context, D, generator=torch.Generator().manual_seed(1))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = resident_kilobytes("VmRSS")
    for _ in range(3):
        sae.decode(sae.encode(x))
    return (resident_kilobytes("VmHWM") - before) / 1024


def resident_kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--atoms", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    shape = (args.atoms, args.k, args.rows, args.context)
    times = speed(*shape, args.repeats)
    # A process for each, since a peak never falls.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {kind: pool.apply(peak_megabytes, (kind, *shape)) for kind in KINDS}
    gram = 4 * args.atoms**2 / 2**20
    title = f"d={D}, {args.atoms} atoms, k={args.k}, {args.rows} x {args.context} tokens"
    table = Table("", *KINDS, "ratio", title=title)
    for name, row in times.items():
        spread = f" ({row['least']:.2f} to {row['most']:.2f})" if "least" in row else ""
        cells = [f"{row[kind]:.3f} s" if kind in row else "" for kind in KINDS]
        table.add_row(name, *cells, f"{row['ratio']:.2f}{spread}" if "ratio" in row else "")
    cells = [f"{peaks[kind]:.0f} MiB" for kind in KINDS]
    table.add_row("peak memory above the weights", *cells, f"Gram matrix: {gram:.0f} MiB")
    Console(width=120).print(table)
    if args.out:
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        settings = {name: value for name, value in vars(args).items() if name != "out"}
        results = {"machine": machine, "settings": settings, "times": times, "peak_mib": peaks, "gram_mib": gram}
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
