"""How long pursuit takes, and how much memory, as a multiple of one dense product `x @ atoms.T`.

    python benchmarks/pursuit.py [--device cuda --d 4096 [--precision high]] [--write]

Everything is measured in turn in one process, `--repeats` times, per token (the slow ones on fewer tokens); the table
shows medians of the ratios within a turn. Activations and atoms are random: the worst case for what decays or repeats.
Peak memory is that of a process for each, above its inputs, the Gram matrix counted in where one is used.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from measure import RESULTS, in_turn, machine, peak_mib, spread, write
from rich.console import Console
from rich.table import Table
from sae_lens import MatchingPursuitSAE, MatchingPursuitSAEConfig, TopKSAE, TopKSAEConfig
from torch import Tensor

from itda_lens import matching_pursuit
from itda_lens.pursuit import GramRows, gram_matrix, inner_products, matching_pursuit_reference, pursue_eager

DENSE = "one dense product"
OURS = "itda_lens"
ORTHOGONAL = "itda_lens, orthogonal"
Contender = Callable[[Tensor, Tensor, Callable[[], Tensor], int], Callable[[], object]]


class Entry(NamedTuple):
    prepare: Contender
    """From activations, atoms, a function that makes the Gram matrix and `k` to what is timed."""
    share: int = 1
    """One in so many tokens is enough."""
    peers_only: bool = False
    """Not for a GPU."""


def _matching_pursuit_sae(x: Tensor, atoms: Tensor, gram: Callable[[], Tensor], k: int) -> Callable[[], object]:
    n, d = atoms.shape
    config = MatchingPursuitSAEConfig(
        d_in=d, d_sae=n, max_iterations=k, residual_threshold=0.0, device=str(atoms.device)
    )
    sae = MatchingPursuitSAE(config)
    sae.W_dec.data = atoms
    return lambda: sae.encode(x)


def _topk_sae(x: Tensor, atoms: Tensor, gram: Callable[[], Tensor], k: int) -> Callable[[], object]:
    n, d = atoms.shape
    sae = TopKSAE(TopKSAEConfig(d_in=d, d_sae=n, k=k, device=str(atoms.device)))
    sae.W_dec.data, sae.W_enc.data = atoms, atoms.T.contiguous()
    return lambda: sae.encode(x)


def _scikit_learn(x: Tensor, atoms: Tensor, gram: Callable[[], Tensor], k: int) -> Callable[[], object]:
    from sklearn.linear_model import orthogonal_mp_gram

    products, correlations = gram().numpy(), (atoms @ x.T).numpy()
    return lambda: orthogonal_mp_gram(products, correlations, n_nonzero_coefs=k)


def ours(**settings: bool) -> Contender:
    def prepare(x: Tensor, atoms: Tensor, gram: Callable[[], Tensor], k: int) -> Callable[[], object]:
        products = gram()
        return lambda: matching_pursuit(x, atoms, k, gram=products, **settings)

    return prepare


def _eager(x: Tensor, atoms: Tensor, gram: Callable[[], Tensor], k: int) -> Callable[[], object]:
    products = gram()
    return lambda: [
        pursue_eager(part @ atoms.T, products, k) for part in x.split(64 if x.device.type == "cpu" else 4096)
    ]


CONTENDERS = {
    DENSE: Entry(lambda x, atoms, gram, k: lambda: x @ atoms.T),
    "the same by oneDNN": Entry(lambda x, atoms, gram, k: lambda: inner_products(x, atoms), peers_only=True),
    OURS: Entry(ours()),
    "itda_lens, non-negative": Entry(ours(nonnegative=True)),
    ORTHOGONAL: Entry(ours(orthogonal=True)),
    "itda_lens, orthogonal and non-negative": Entry(ours(orthogonal=True, nonnegative=True)),
    "itda_lens, Gram rows on demand": Entry(
        lambda x, atoms, gram, k: lambda: matching_pursuit(x, atoms, k, gram=GramRows(atoms))
    ),
    "plain torch with the Gram matrix": Entry(_eager, share=4),
    "plain loop (the paper's Algorithm 2)": Entry(
        lambda x, atoms, gram, k: lambda: matching_pursuit_reference(x, atoms, k), share=4
    ),
    "SAELens MatchingPursuitSAE": Entry(_matching_pursuit_sae, share=4),
    "SAELens TopKSAE": Entry(_topk_sae),
    "scikit-learn orthogonal_mp_gram": Entry(_scikit_learn, share=128, peers_only=True),
}


def problem(d: int, n: int, tokens: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, atoms = torch.randn(tokens, d, generator=generator), torch.randn(n, d, generator=generator)
    return x.to(device), torch.nn.functional.normalize(atoms, dim=-1).to(device)


def entries(device: str) -> dict[str, Entry]:
    return {name: entry for name, entry in CONTENDERS.items() if device == "cpu" or not entry.peers_only}


@torch.no_grad()
def ratios(d: int, n: int, k: int, tokens: int, device: str, repeats: int) -> dict[str, dict[str, float]]:
    x, atoms = problem(d, n, tokens, device)
    gram, chosen = gram_matrix(atoms), entries(device)
    runs = {name: e.prepare(x[: max(1, tokens // e.share)], atoms, lambda: gram, k) for name, e in chosen.items()}
    turns = in_turn(runs, repeats)
    return {name: spread([turn[name] * e.share / turn[DENSE] for turn in turns]) for name, e in chosen.items()} | {
        "orthogonal / plain": spread([turn[ORTHOGONAL] / turn[OURS] for turn in turns])
    }


def prepare_peak(name: str, d: int, n: int, k: int, tokens: int) -> tuple[Callable[[], object], Callable[[], object]]:
    entry = CONTENDERS[name]
    small, few = problem(d, 2 * k, 4, "cpu")
    x, atoms = problem(d, n, max(1, tokens // entry.share), "cpu")

    def run() -> object:
        return entry.prepare(x, atoms, lambda: gram_matrix(atoms), k)()

    return entry.prepare(small, few, lambda: gram_matrix(few), k), run


def plot(results: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in results[0]["ratios"] if " / " not in name]
    figure, axes = plt.subplots(figsize=(9, 4.6), constrained_layout=True)
    height = 0.8 / len(results)
    for i, result in enumerate(results):
        medians = [result["ratios"][name]["median"] for name in names]
        low = [m - result["ratios"][name]["least"] for name, m in zip(names, medians, strict=True)]
        high = [result["ratios"][name]["most"] - m for name, m in zip(names, medians, strict=True)]
        places = [j + (i - (len(results) - 1) / 2) * height for j in range(len(names))]
        label = f"d={result['d']}, {result['n']:,} atoms, k={result['k']}"
        axes.barh(places, medians, height, xerr=[low, high], label=label, error_kw={"linewidth": 0.8})
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time per token, as a multiple of one dense product (bars: median; lines: least and most)")
    axes.legend(loc="upper right", fontsize=8)
    figure.savefig(RESULTS / "pursuit.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="highest", help="of torch's float32 products on a GPU: 'high' is TF32")
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--atoms", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--k", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write the figures and a plot to benchmarks/results")
    args = parser.parse_args()
    torch.set_float32_matmul_precision(args.precision)
    shapes = [(args.d, n) for n in args.atoms] + ([(128, 1024)] if args.device == "cpu" else [])
    results = []
    for d, n in shapes:
        shape = {"d": d, "n": n, "k": args.k, "tokens": args.tokens}
        result = {**shape, "ratios": ratios(**shape, device=args.device, repeats=args.repeats)}
        if args.device == "cpu":
            result["peak_mib"] = {name: peak_mib(prepare_peak, name, *shape.values()) for name in CONTENDERS}
        results.append(result)
    heads = [f"d={r['d']}, n={r['n']}, k={r['k']}" for r in results]
    table = Table(
        "", *heads, title="times one dense product (least to most); peak memory in MiB", caption=str(machine())
    )
    for name in results[0]["ratios"]:
        cells = []
        for result in results:
            found, peak = result["ratios"][name], result.get("peak_mib", {}).get(name)
            memory = "" if peak is None else f"{peak:8.0f}"
            cells.append(f"{found['median']:6.2f} ({found['least']:.2f} to {found['most']:.2f}){memory}")
        table.add_row(name, *cells)
    Console(width=150).print(table)
    if args.write:
        name = "pursuit" if args.device == "cpu" else f"pursuit_{args.device}_{args.precision}"
        write(name, vars(args), results=results)
        plot(results) if args.device == "cpu" else None


if __name__ == "__main__":
    main()
