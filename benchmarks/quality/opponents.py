"""SAEs trained by SAELens on the whole grid, and their scores; what is in the cache already is not done again.

    nice -n 19 python -m benchmarks.quality.opponents [--only TEXT]

Each SAE is a folder `benchmarks/cache/quality/<model>/<hook>/<settings>/`: as SAELens saves it, with `training.json`
(settings, curve, seconds) and `scores.json` (as it is, and its decoder under pursuit). `forward.json` in the folder of
the hook has the cost of the forward passes. Learning rates are chosen on the end of the training text.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from sae_lens import SAE
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.quality.costs import end_to_end, forward_cost
from benchmarks.quality.saes import Settings, train
from benchmarks.quality.scores import score
from benchmarks.quality.subjects import CACHE, PRETRAINED, ZOO, Subject, subject
from itda_lens import ITDA

Cell = tuple[str, str]
CELLS = [(name, f"blocks.{layer}.hook_resid_post") for layer in (4, 2, 6) for name in ZOO]
FIRST = CELLS[0]
RATES = (1e-3, 2.5e-3, 6e-3, 1.5e-2)
"""Of Adam, on activations scaled to a mean norm of `sqrt(d)`."""
L1 = (2.0, 3.0)
"""Of the standard SAE, on activations scaled likewise: an L0 near 8."""
WITH_NEIGHBOURS = [("seed49", "blocks.2.hook_resid_post"), ("seed81", "blocks.6.hook_resid_post")]
DEFAULT = Settings()


def jobs() -> Iterator[tuple[Cell, Settings]]:
    """The most important first. Later ones depend on what earlier ones have left in the cache."""
    yield from ((FIRST, replace(DEFAULT, lr=rate)) for rate in RATES[1:3])
    best = chosen(FIRST, DEFAULT)
    for cell in CELLS[1:]:
        yield cell, best
    yield from ((FIRST, replace(DEFAULT, lr=rate)) for rate in (RATES[0], RATES[3]))
    yield from ((FIRST, replace(best, k=k)) for k in (4, 16, 32))
    yield from ((FIRST, replace(best, n=n)) for n in (512, 2048))
    yield from ((FIRST, settings) for settings in other_architectures(best))
    for cell in WITH_NEIGHBOURS:
        yield from ((cell, near) for near in neighbours(best))
    yield from (((name, hook), best) for name, hook in PRETRAINED.items())


def other_architectures(best: Settings) -> Iterator[Settings]:
    """TopK's rate does not suit matching pursuit: that is set by short runs, then trained in full."""
    yield replace(best, architecture="batchtopk")
    pursuit = replace(best, architecture="matching_pursuit", draws=best.draws // 10)
    yield from (replace(pursuit, lr=rate) for rate in RATES)
    yield replace(pursuit, lr=chosen(FIRST, pursuit).lr, draws=best.draws)
    yield from (replace(best, architecture="standard", l1=l1) for l1 in L1)


def chosen(cell: Cell, like: Settings) -> Settings:
    """Of the SAEs of a cell that differ from `like` in the rate alone, the best on the validation text."""
    found = {}
    for file in folder(cell).glob("*/training.json"):
        record = json.loads(file.read_text())
        settings = Settings(**record["settings"])
        if replace(settings, lr=like.lr) == like:
            found[settings] = record["validation_explained_variance"]
    if not found:
        raise FileNotFoundError(f"no SAE like {like.name} is in {folder(cell)}: run without --only first")
    return max(found, key=lambda settings: found[settings])


def training_curves() -> dict[float, list[dict[str, float]]]:
    """By learning rate, how the TopK SAEs of the first cell came along; those that the cache has."""
    files = {rate: folder(FIRST) / replace(DEFAULT, lr=rate).name / "training.json" for rate in RATES}
    return {rate: json.loads(file.read_text())["curve"] for rate, file in files.items() if file.exists()}


def neighbours(settings: Settings) -> list[Settings]:
    i = RATES.index(settings.lr)
    return [replace(settings, lr=RATES[j]) for j in (i - 1, i + 1) if 0 <= j < len(RATES)]


def folder(cell: Cell) -> Path:
    return CACHE.joinpath(*cell)


@lru_cache(maxsize=1)
def _activations(cell: Cell) -> tuple[Tensor, Tensor]:
    name, hook = cell
    held = subject(name)
    return held.activations(hook, held.train), held.activations(hook, held.validation)


def measure(cell: Cell, settings: Settings) -> None:
    """Train and score an SAE, so far as the cache does not have it."""
    name, hook = cell
    target = folder(cell) / settings.name
    if not (folder(cell) / "forward.json").exists():
        _write(folder(cell) / "forward.json", forward_cost(subject(name), hook))
    if not (target / "training.json").exists():
        train(name, hook, *_activations(cell), settings, target)
    if not (target / "scores.json").exists():
        _write(target / "scores.json", scores(subject(name), hook, SAE.load_from_disk(target), settings.k))


def scores(held: Subject, hook: str, sae: SAE[Any], k: int) -> dict[str, Any]:
    """Of an SAE as it is, on both texts, and of its decoder's directions under plain and orthogonal pursuit."""
    atoms = normalize(sae.W_dec.detach(), dim=-1)
    bias = sae.b_dec.detach()
    by_pursuit = {
        kind: ITDA.from_atoms(atoms, k, bias=bias, orthogonal=kind == "orthogonal") for kind in ("plain", "orthogonal")
    }
    found = {kind: asdict(score(held, hook, each)) for kind, each in {"sae": sae, **by_pursuit}.items()}
    return found | {"validation": asdict(score(held, hook, sae, "validation"))}


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def run(only: str = "") -> None:
    whole = folder(FIRST) / "end_to_end.json"
    for cell, settings in jobs():
        name = "/".join((*cell, settings.name))
        if only in name:
            started = time.perf_counter()
            measure(cell, settings)
            print(f"{time.strftime('%H:%M:%S')}  {time.perf_counter() - started:6.1f} s  {name}", flush=True)
    if not whole.exists():
        _write(whole, end_to_end(subject(FIRST[0]), FIRST[1], chosen(FIRST, DEFAULT)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only those with this text in model/hook/settings")
    run(parser.parse_args().only)
