"""How fast a dictionary is built, beside the paper's algorithm written plainly, and how that grows with n, k and d.

    python benchmarks/building.py [--write]

The stream is synthetic: mixtures of sixteen of 2,000 fixed directions, used with unequal frequency, and noise. The
plain algorithm is Algorithm 1 of arXiv 2505.17769 with a product of the residuals with all atoms at each of `k` steps;
it judges a batch of 1,024 tokens at once. Both are given the same stream, threshold and mean, in turn.
"""

import argparse
import time
from collections.abc import Callable

import torch
from measure import RESULTS, machine, spread, write
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from itda_lens import ITDA, DictionaryBuilder
from itda_lens.pursuit import matching_pursuit_reference

CENTER_TOKENS = 2048
BATCH = 1024


def stream(tokens: int, d: int, features: int = 2000, active: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = normalize(torch.randn(features, d, generator=generator), dim=-1)
    frequency = 1 / torch.arange(1, features + 1).float()
    parts = []
    for size in (min(1000, tokens - start) for start in range(0, tokens, 1000)):
        which = torch.multinomial(frequency.expand(size, -1), active, generator=generator)
        weights = torch.rand(size, active, generator=generator) ** 3
        parts.append((weights[..., None] * directions[which]).sum(1))
        parts[-1] += 0.005 * torch.randn(size, d, generator=generator)
    return torch.cat(parts)


def plainly(x: Tensor, k: int, threshold: float) -> Tensor:
    """The atoms that the paper's algorithm chooses, as it is printed, with the mean removed and the relative loss."""
    x = x - x[:CENTER_TOKENS].mean(dim=0)
    atoms = x.new_empty(0, x.shape[1])
    for batch in x.split(BATCH):
        new = batch
        if len(atoms):
            codes = matching_pursuit_reference(batch, atoms, k)
            loss = (batch - codes.decode(atoms)).square().sum(-1) / batch.square().sum(-1)
            new = batch[loss > threshold]
        atoms = torch.cat([atoms, normalize(new, dim=-1)])
    return atoms


def ours(x: Tensor, k: int, threshold: float) -> Tensor:
    built = DictionaryBuilder(x.shape[1], k, threshold=threshold, center_tokens=CENTER_TOKENS)
    for batch in x.split(BATCH):
        built.update(batch[None])
    return built.to_itda().atoms


def timed(run: Callable[[Tensor, int, float], Tensor], *arguments: Tensor | int | float) -> tuple[float, int]:
    started = time.perf_counter()
    atoms = run(*arguments)  # type: ignore[arg-type]
    return time.perf_counter() - started, len(atoms)


def cost_per_token(n: int, k: int, d: int, tokens: int = 4096) -> float:
    """Microseconds to judge a token against `n` atoms, with all `k` steps taken and no atom added."""
    x = stream(n + tokens + BATCH, d, seed=1)
    itda = ITDA.from_atoms(normalize(x[:n], dim=-1), k)
    built = DictionaryBuilder.from_itda(itda, loss="cosine", threshold=1.9)
    built.update(x[None, n : n + BATCH])
    started = time.perf_counter()
    for batch in x[n + BATCH :].split(BATCH):
        built.update(batch[None])
    return 1e6 * (time.perf_counter() - started) / tokens


def growth() -> list[dict[str, float]]:
    centre = {"n": 4096, "k": 40, "d": 768}
    steps = {"n": [1024, 2048, 4096, 8192], "k": [8, 16, 32, 64], "d": [192, 384, 768, 1536]}
    found = []
    for name, values in steps.items():
        for value in values:
            shape = centre | {name: value}
            found.append({"varied": name, **shape, "microseconds": cost_per_token(**shape)})
    return found


def fitted(found: list[dict[str, float]]) -> tuple[float, float]:
    """`a` and `b` of `a d n + b k n`, by least squares on relative errors, in nanoseconds."""
    times = torch.tensor([row["microseconds"] * 1e3 for row in found])
    terms = torch.tensor([[row["d"] * row["n"], row["k"] * row["n"]] for row in found], dtype=torch.float32)
    a, b = torch.linalg.lstsq(terms / times[:, None], torch.ones(len(found), 1)).solution[:, 0].tolist()
    return a, b


def plot(found: list[dict[str, float]], a: float, b: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True, constrained_layout=True)
    for panel, name in zip(panels, ("n", "k", "d"), strict=True):
        rows = [row for row in found if row["varied"] == name]
        places = [row[name] for row in rows]
        panel.plot(places, [row["microseconds"] for row in rows], "o", label="measured")
        model = [(a * row["d"] * row["n"] + b * row["k"] * row["n"]) / 1e3 for row in rows]
        panel.plot(places, model, "-", label="a d n + b k n")
        others = ", ".join(f"{other} = {rows[0][other]}" for other in ("n", "k", "d") if other != name)
        panel.set(xlabel=f"{name}  ({others})", ylim=(0, None), xlim=(0, None))
    panels[0].set_ylabel("microseconds per token")
    panels[0].legend()
    figure.savefig(RESULTS / "building.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--k", type=int, default=40)
    parser.add_argument("--threshold", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the figures and a plot to benchmarks/results")
    args = parser.parse_args()
    x = stream(args.tokens, args.d)
    ours(x[:3000], args.k, args.threshold)
    turns = [
        {run.__name__: timed(run, x, args.k, args.threshold) for run in (plainly, ours)} for _ in range(args.repeats)
    ]
    ratio = spread([turn["plainly"][0] / turn["ours"][0] for turn in turns])
    table = Table("", "seconds", "tokens/s", "atoms", title=f"{args.tokens:,} tokens, d={args.d}, k={args.k}")
    for name in ("plainly", "ours"):
        times, (_, atoms) = spread([turn[name][0] for turn in turns]), turns[0][name]
        table.add_row(name, f"{times['median']:.1f}", f"{args.tokens / times['median']:,.0f}", f"{atoms:,}")
    table.add_row("ratio", f"{ratio['median']:.1f} ({ratio['least']:.1f} to {ratio['most']:.1f})", "", "")
    found = growth()
    a, b = fitted(found)
    console = Console(width=120)
    console.print(table)
    console.print(f"cost per token, all steps taken: {a * 1e3:.2f} ps x d n + {b * 1e3:.1f} ps x k n; {machine()}")
    for row in found:
        model = (a * row["d"] + b * row["k"]) * row["n"] / 1e3
        console.print(
            f"  n={row['n']:5} k={row['k']:2} d={row['d']:4}  {row['microseconds']:6.1f} us, fit {model:6.1f}"
        )
    if args.write:
        write("building", vars(args), turns=turns, ratio=ratio, growth=found, fit_picoseconds=[a * 1e3, b * 1e3])
        plot(found, a, b)


if __name__ == "__main__":
    main()
