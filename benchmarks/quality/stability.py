"""What of a dictionary is chance: how much of it comes back with another order, other batches, other text.

    python -m benchmarks.quality.stability

The pairs are from the same model and hook, at 1,024 atoms and L0 = 8; two trained SAEs that differ by seed stand beside
them. Results go to `benchmarks/cache/stability/<model>/<hook>.json`; what is there is not done again.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from sae_lens.synthetic import mean_correlation_coefficient
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.quality.dictionaries import random_activations
from benchmarks.quality.opponents import DEFAULT, FIRST, Cell, chosen, folder, measure
from benchmarks.quality.scores import score
from benchmarks.quality.subjects import CACHE, Subject, subject
from itda_lens import ITDA, DictionaryBuilder

N, K, ROWS = 1024, 8, 320
FOLDER = CACHE.parent / "stability"
HOOKS = [(FIRST[0], f"blocks.{layer}.hook_resid_post") for layer in (2, 4, 6)]
SEEDS = (1, 2, 3)
NEAR = 0.9


class Made(NamedTuple):
    """A dictionary, and where each of its atoms is in the text: rows of `(row, position)`, or None if trained."""

    sae: SAE[Any]
    places: Tensor | None


class Agreement(NamedTuple):
    common: float | None
    """Share of atoms that are the same token of the same prompt."""
    mcc: float
    """Mean `|cosine|` of atoms matched one to one (as SAELens's `mean_correlation_coefficient`)."""
    near: float
    """Share of matched atoms with `|cosine| > .9`."""
    codes: float
    """Share of the latents active on held-out tokens whose match is active in the other dictionary."""


def rows_of(held: Subject, hook: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Activations `[rows, positions, d]` of rows of the training text, and the mask of the tokens that count."""
    mask = held.mask(held.train[rows])
    x = held.activations(hook, held.train[rows])
    return x.new_zeros(*mask.shape, x.shape[-1]).masked_scatter(mask[..., None], x), mask


def build(held: Subject, hook: str, rows: Tensor, n_atoms: int = N, batch: int = ROWS) -> Made:
    """The builder's default on these rows in this order, cut into updates of `batch` rows."""
    x, mask = rows_of(held, hook, rows)
    builder = DictionaryBuilder(x.shape[-1], K, n_atoms=n_atoms, tokens=int(mask.sum()))
    for i in range(0, len(x), batch):
        builder.update(x[i : i + batch], mask=mask[i : i + batch])
    itda = builder.to_itda()
    places = torch.tensor(itda.provenance.identities("position"))
    return Made(itda, torch.stack([rows[places[:, 0]], places[:, 1]], dim=1))


def randomly(held: Subject, hook: str, rows: Tensor, seed: int) -> Made:
    x, mask = rows_of(held, hook, rows)
    atoms, bias = random_activations(x[mask], N, K, seed)
    drawn = torch.randperm(int(mask.sum()), generator=torch.Generator().manual_seed(seed))[:N]
    places = mask.nonzero()[drawn]
    itda = ITDA.from_atoms(atoms, K, bias=bias, orthogonal=True)
    return Made(itda, torch.stack([rows[places[:, 0]], places[:, 1]], dim=1))


@torch.no_grad()
def agreement(one: Made, other: Made, x: Tensor) -> Agreement:
    """Of two dictionaries of equal size, their codes compared on activations `x [tokens, d]`."""
    first, second = (normalize(made.sae.W_dec, dim=-1) for made in (one, other))
    cosines = (first @ second.T).abs()
    _, match = linear_sum_assignment(1 - cosines.numpy())
    matched = cosines[torch.arange(len(match)), torch.from_numpy(match)]
    active, theirs = (made.sae.encode(x) != 0 for made in (one, other))
    common = None
    if one.places is not None and other.places is not None:
        same = set(map(tuple, one.places.tolist())) & set(map(tuple, other.places.tolist()))
        common = len(same) / len(one.places)
    return Agreement(
        common=common,
        mcc=mean_correlation_coefficient(first, second),
        near=float((matched > NEAR).float().mean()),
        codes=float((active & theirs[:, torch.from_numpy(match)]).sum() / active.sum()),
    )


def pairs(held: Subject, hook: str) -> dict[str, list[tuple[Made, Made]]]:
    """By what differs between the two."""
    first = torch.randperm(len(held.train), generator=torch.Generator().manual_seed(0))[:ROWS]
    ours, random = build(held, hook, first), randomly(held, hook, first, 0)

    def each(make: Callable[[int], tuple[Made, Made]]) -> list[tuple[Made, Made]]:
        return [make(seed) for seed in SEEDS]

    def shuffled(seed: int) -> Tensor:
        return first[torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))]

    def other_text(seed: int) -> Tensor:
        """Rows that the first dictionary has not seen."""
        left = torch.ones(len(held.train), dtype=torch.bool)
        left[first] = False
        rest = left.nonzero()[:, 0]
        return rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:ROWS]]

    return {
        "batches of 1, 7 and 64 rows": [(ours, build(held, hook, first, batch=batch)) for batch in (1, 7, 64)],
        "order of rows": each(lambda seed: (ours, build(held, hook, shuffled(seed)))),
        "other text": each(lambda seed: (ours, build(held, hook, other_text(seed)))),
        "random activations, same text": each(lambda seed: (random, randomly(held, hook, first, seed))),
        "random activations, other text": each(lambda seed: (random, randomly(held, hook, other_text(seed), seed))),
    }


def trained_pairs(cell: Cell) -> dict[str, list[tuple[Made, Made]]]:
    """TopK SAEs on all of the text, which differ by the seed of their weights and of the order of activations."""
    best = chosen(cell, DEFAULT)
    saes = []
    for seed in range(3):
        settings = replace(best, seed=seed)
        measure(cell, settings)
        saes.append(Made(SAE.load_from_disk(folder(cell) / settings.name), None))
    return {"TopK SAEs, seed": [(saes[0], each) for each in saes[1:]]}


def rows(cell: Cell) -> list[dict[str, Any]]:
    name, hook = cell
    held = subject(name)
    x = held.activations(hook, held.heldout)
    found = pairs(held, hook)
    if cell == FIRST:
        found |= trained_pairs(cell)
    return [
        {"model": name, "hook": hook, "differs": differs, **agreement(one, other, x)._asdict()}
        | {"ce_score": score(held, hook, other.sae).ce_score, "ce_score_of_first": score(held, hook, one.sae).ce_score}
        for differs, each in found.items()
        for one, other in each
    ]


def run() -> None:
    for cell in HOOKS:
        path = FOLDER / cell[0] / f"{cell[1]}.json"
        if not path.exists():
            started = time.perf_counter()
            found = rows(cell)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{time.strftime('%H:%M:%S')}  {time.perf_counter() - started:6.1f} s  {'/'.join(cell)}", flush=True)


if __name__ == "__main__":
    run()
