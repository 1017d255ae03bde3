"""An ITDA beside a SAELens `TopKSAE` of the same shape, alone and hooked into a model: time and peak memory.

    python benchmarks/saelens.py [--write]

The model has the shape of GPT-2 small, and random weights. Times are taken in turn in one process, `--repeats` times;
the table shows medians, and medians of the ratio to the `TopKSAE` within a turn, with the least and the most. Peak
memory (on Linux) is that of a process for each SAE, above what it holds after a first, very small call; the median of
as many processes.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from measure import in_turn, peak_mib, seconds, spread, write
from rich.console import Console
from rich.table import Table
from sae_lens import SAE, HookedSAETransformer, TopKSAE, TopKSAEConfig
from transformer_lens import HookedTransformerConfig

from itda_lens import ITDA

HOOK = "blocks.6.hook_resid_pre"
D = 768
OTHER = "TopKSAE"
KINDS = ("ITDA", "ITDA, orthogonal", OTHER)


def gpt2_small(seed: int = 0) -> HookedSAETransformer:
    torch.manual_seed(seed)
    shape = {"n_layers": 12, "d_model": D, "n_heads": 12, "d_head": 64, "d_vocab": 50257, "n_ctx": 1024}
    config = HookedTransformerConfig(**shape, act_fn="gelu_new", normalization_type="LN", seed=seed)
    return HookedSAETransformer(config).eval()


def sae_of(kind: str, n: int, k: int, seed: int = 0) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(n, D, generator=generator), dim=-1)
    if kind != OTHER:
        return ITDA.from_atoms(rows, k, orthogonal=kind != "ITDA", metadata={"hook_name": HOOK})
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


@torch.no_grad()
def speed(n: int, k: int, rows: int, context: int, repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """By what is timed and by kind: the median in seconds, and the ratio to the other SAE."""
    model = gpt2_small()
    by_sae = {kind: jobs(sae_of(kind, n, k), model, rows, context) for kind in KINDS}
    cold = {kind: seconds(jobs["encode and decode"]) for kind, jobs in by_sae.items()}
    figures = {"encode and decode, first call": compared([cold])}
    for name in by_sae[OTHER]:
        figures[name] = compared(in_turn({kind: jobs[name] for kind, jobs in by_sae.items()}, repeats))
    return figures


def compared(turns: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        kind: {"seconds": statistics.median(turn[kind] for turn in turns)}
        | {f"ratio_{name}": value for name, value in spread([turn[kind] / turn[OTHER] for turn in turns]).items()}
        for kind in KINDS
    }


def prepare_peak(
    kind: str, n: int, k: int, rows: int, context: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    small, sae = sae_of(kind, k, k), sae_of(kind, n, k)
    x = torch.randn(rows, context, D, generator=torch.Generator().manual_seed(1))
    return lambda: small(torch.zeros(1, D)), lambda: [sae.decode(sae.encode(x)) for _ in range(3)]


def cell(figures: dict[str, float]) -> str:
    ratio, least, most = (figures[f"ratio_{name}"] for name in ("median", "least", "most"))
    if least == most:
        return f"{figures['seconds']:.3f} s, {ratio:.2f}"
    return f"{figures['seconds']:.3f} s, {ratio:.2f} ({least:.2f} to {most:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the figures to benchmarks/results")
    parser.add_argument("--atoms", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    shape = (args.atoms, args.k, args.rows, args.context)
    times = speed(*shape, args.repeats)
    peaks = {
        kind: statistics.median(peak_mib(prepare_peak, kind, *shape) for _ in range(args.repeats)) for kind in KINDS
    }
    gram = 4 * args.atoms**2 / 2**20
    title = f"d={D}, {args.atoms} atoms, k={args.k}, {args.rows} x {args.context} tokens"
    table = Table("", *KINDS, title=title)
    for name, row in times.items():
        table.add_row(name, *(cell(row[kind]) for kind in KINDS))
    table.add_row("peak memory above the weights", *(f"{peaks[kind]:.0f} MiB" for kind in KINDS))
    Console(width=120).print(table, f"of which the Gram matrix of an ITDA: {gram:.0f} MiB")
    if args.write:
        write("saelens", vars(args), times=times, peak_mib=peaks, gram_mib=gram)


if __name__ == "__main__":
    main()
