"""How long a matching pursuit takes, as a multiple of one dense product `x @ atoms.T`.

    python benchmarks/pursuit.py [--out results.json]

Everything is measured in turn in one process, `--repeats` times; the table shows medians of ratios within a turn.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sae_lens import MatchingPursuitSAE, MatchingPursuitSAEConfig

from itda_lens import matching_pursuit
from itda_lens.pursuit import gram_matrix, matching_pursuit_reference, pursue_eager


def contenders(d: int, n: int, k: int, tokens: int, seed: int = 0) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d, generator=generator)
    atoms = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=-1)
    gram = gram_matrix(atoms)
    peer = MatchingPursuitSAE(MatchingPursuitSAEConfig(d_in=d, d_sae=n, max_iterations=k, residual_threshold=0.0))
    peer.W_dec.data = atoms
    return {
        "one dense product": lambda: x @ atoms.T,
        "itda_lens": lambda: matching_pursuit(x, atoms, k, gram=gram),
        "plain torch with the Gram matrix": lambda: pursue_eager(x @ atoms.T, gram, k),
        "plain loop (the paper's Algorithm 2)": lambda: matching_pursuit_reference(x, atoms, k),
        "SAELens MatchingPursuitSAE": lambda: peer.encode(x),
    }


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@torch.no_grad()
def measure(d: int, n: int, k: int, tokens: int, repeats: int) -> dict[str, float]:
    runs = contenders(d, n, k, tokens)
    for run in runs.values():
        run()
    turns = [{name: seconds(run) for name, run in runs.items()} for _ in range(repeats)]
    return {name: statistics.median(turn[name] / turn["one dense product"] for turn in turns) for name in runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024)
    arguments = parser.parse_args()
    shapes = [(128, 1024, 40), (768, 4096, 40), (768, 16384, 40)]
    results = []
    for d, n, k in shapes:
        ratios = measure(d, n, k, arguments.tokens, arguments.repeats)
        results.append({"d": d, "n": n, "k": k, "tokens": arguments.tokens, "ratios": ratios})
    table = Table("", *(f"d={r['d']}, n={r['n']}, k={r['k']}" for r in results), title="times one dense product")
    for name in results[0]["ratios"]:
        table.add_row(name, *(f"{r['ratios'][name]:.1f}" for r in results))
    Console(width=120).print(table)
    if arguments.out:
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        arguments.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
