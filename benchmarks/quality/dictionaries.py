"""Dictionaries of real activations, and their baselines: each made from 1 % of an SAE's token draws, then scored.

    python -m benchmarks.quality.dictionaries [--only TEXT]

Each is a file `benchmarks/cache/quality/<model>/<hook>/<method>-n<n>-k<k>-seed<seed>.json`; what is there is not done
again. A seed chooses the rows of text, and whatever else a method draws.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.quality.opponents import CELLS, FIRST, Cell, folder
from benchmarks.quality.saes import Settings
from benchmarks.quality.scores import score
from benchmarks.quality.subjects import CONTEXT, PRETRAINED, Subject, subject
from itda_lens import ITDA, DictionaryBuilder

ROWS = Settings().draws // 100 // CONTEXT
"""1 % of the draws: 320 rows, all tokens distinct places in the text."""
PAPER_BATCH = 32 * CONTEXT
PURSUITS: dict[str, dict[str, bool]] = {
    "plain": {},
    "orthogonal": {"orthogonal": True},
    "non-negative": {"orthogonal": True, "nonnegative": True},
}


class Dictionary(NamedTuple):
    atoms: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Job:
    cell: Cell
    method: str
    n: int = 1024
    k: int = 8
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.method}-n{self.n}-k{self.k}-seed{self.seed}"


def ours(x: Tensor, n: int, k: int, seed: int) -> Dictionary:
    """The builder's default."""
    builder = DictionaryBuilder(x.shape[1], k, n_atoms=n, tokens=len(x))
    builder.update(x[None])
    itda = builder.to_itda()
    return Dictionary(itda.atoms.data, itda.b_dec.data)


def paper(x: Tensor, n: int, k: int, seed: int) -> Dictionary:
    """The paper's released selection, at the threshold that just fills `n` atoms within the budget, then cropped."""

    def atoms(threshold: float) -> Tensor:
        builder = DictionaryBuilder.paper(x.shape[1], k, threshold)
        for batch in x.split(PAPER_BATCH):
            builder.update(batch[None])
        return builder.to_itda().atoms.data

    low, high = 0.0, 2 / x.shape[1]
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (middle, high) if len(atoms(middle)) >= n else (low, middle)
    return Dictionary(atoms(low)[:n], torch.zeros(x.shape[1]))


def random_activations(x: Tensor, n: int, k: int, seed: int) -> Dictionary:
    bias = x.mean(0)
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n]
    return Dictionary(normalize(x[chosen] - bias, dim=-1), bias)


def random_directions(x: Tensor, n: int, k: int, seed: int) -> Dictionary:
    rows = torch.randn(n, x.shape[1], generator=torch.Generator().manual_seed(seed))
    return Dictionary(normalize(rows, dim=-1), x.mean(0))


def exemplars(x: Tensor, n: int, k: int, seed: int) -> Dictionary:
    """Leader clustering (arXiv 2605.14347): what is further than an angle from all exemplars becomes one."""
    bias = x.mean(0)
    rows = normalize(x - bias, dim=-1)

    def leaders(cosine: float) -> list[int]:
        chosen: list[int] = []
        nearest = torch.full((len(rows),), -1.0)
        while (nearest < cosine).any():
            chosen.append(int((nearest < cosine).int().argmax()))
            nearest = torch.maximum(nearest, rows @ rows[chosen[-1]]).index_fill(0, torch.tensor(chosen), 2.0)
            if len(chosen) > 2 * n:
                break
        return chosen

    low, high = 0.0, 1.0
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (low, middle) if len(leaders(middle)) >= n else (middle, high)
    return Dictionary(rows[leaders(high)[:n]], bias)


METHODS: dict[str, Callable[[Tensor, int, int, int], Dictionary]] = {
    "ours": ours,
    "random_activations": random_activations,
    "paper": paper,
    "exemplars": exemplars,
    "random_directions": random_directions,
}


def jobs() -> Iterator[Job]:
    main = ("ours", "random_activations", "paper")
    for seed in range(3):
        for cell in CELLS:  # what is known of a cell's model is held from one job to the next
            yield from (Job(cell, method, seed=seed) for method in (METHODS if seed == 0 else (*main, "exemplars")))
    yield from (Job(cell, method) for cell in PRETRAINED.items() for method in main)
    yield from (Job(FIRST, method, k=k) for method in main for k in (4, 16, 32))
    yield from (Job(FIRST, method, n=n) for method in main for n in (512, 2048))


def measure(job: Job) -> dict[str, Any]:
    """Make a dictionary, and score it under each pursuit at the same L0."""
    name, hook = job.cell
    held = subject(name)
    started = time.perf_counter()
    x = _activations(held, hook, job.seed)
    forward = time.perf_counter() - started
    started = time.perf_counter()
    atoms, bias = METHODS[job.method](x, job.n, job.k, job.seed)
    seconds = time.perf_counter() - started
    record = asdict(job) | {"tokens": len(x), "forward_seconds": forward, "seconds": seconds, "atoms": len(atoms)}
    for pursuit, settings in PURSUITS.items():
        if pursuit == "non-negative" and job.seed > 0:
            continue
        itda = ITDA.from_atoms(atoms, min(job.k, len(atoms)), bias=bias, **settings)
        record[pursuit] = asdict(score(held, hook, itda))
    return record


def _activations(held: Subject, hook: str, seed: int) -> Tensor:
    rows = torch.randperm(len(held.train), generator=torch.Generator().manual_seed(seed))[:ROWS]
    return held.activations(hook, held.train[rows])


@torch.no_grad()
def run(only: str = "") -> None:
    for job in jobs():
        path = folder(job.cell) / f"{job.name}.json"
        if only not in str(path) or path.exists():
            continue
        record = measure(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {path.parent.parent.name} {path.parent.name} {job.name}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only those with this text in model/hook/name")
    run(parser.parse_args().only)
