"""Folders of saved ITDAs that were damaged, edited or mixed up by the thousand, and loaded as a user loads them.

Each load gives the ITDA that was saved, or is refused by a clear error; whatever else happens is counted under what it
is. Bombs come without a note, as from somebody else: they may load, but within bounds. Each load is a process of its
own, forked from one that has only imported, so that its peak of memory is seen.
"""

import multiprocessing
import random
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from safetensors import SafetensorError
from torch.nn.functional import normalize

from benchmarks.attack.mutations import BOMBS, MUTATIONS, Mutation
from itda_lens import ITDA, Provenance

COUNT = 5000
_DTYPES = ("float32", "bfloat16", "float16")
# What a load may take.
_TIMES_FILE, _MIB, _SECONDS = 10, 200, 10
# What SAELens, safetensors, JSON and this package raise of themselves; other errors come from further inside.
_CLEAR = (ValueError, SafetensorError, OSError, KeyError, TypeError)


class Outcome(NamedTuple):
    what: str
    seconds: float
    mib: float
    share: float
    """Of the memory that is allowed."""


def run(scale: float, seed: int, mutations: Sequence[Mutation] = (*MUTATIONS, *BOMBS)) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    chance = random.Random(seed)
    each = max(1, round(COUNT * scale / len(MUTATIONS)))
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, str(i)) for i in range(4)]
        for i, folder in enumerate(folders):
            _itda(i).save_model(folder)
        rows = []
        for mutate in mutations:
            found = []
            for i in range(len(_DTYPES) if mutate in BOMBS else each):
                work, whole = Path(name, "work"), folders[i % 4]
                shutil.copytree(whole, work)
                mutate(work, chance.choice([folder for folder in folders if folder != whole]), chance)
                found.append(_outcome(work, whole, chance.choice(_DTYPES), mutate in BOMBS))
                shutil.rmtree(work)
            rows.append(_row(mutate.__name__, found))
    return rows


def _row(name: str, found: list[Outcome]) -> dict[str, Any]:
    what = Counter(outcome.what for outcome in found)
    row: dict[str, Any] = {"mutation": name, "tried": len(found)}
    row |= {key: what.pop(key, 0) for key in ("as saved", "refused", "silently another")}
    row["other"] = ", ".join(f"{count} {key}" for key, count in what.items())
    row["most seconds"] = round(max(outcome.seconds for outcome in found), 2)
    row["most MiB"] = round(max(outcome.mib for outcome in found))
    row["beyond bounds"] = sum(outcome.share > 1 or outcome.seconds > _SECONDS for outcome in found)
    return row


def _outcome(folder: Path, whole: Path, dtype: str, bomb: bool) -> Outcome:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_load, args=(there, folder, whole, dtype, bomb))
    process.start()
    there.close()
    try:
        what, seconds, mib = here.recv() if here.poll(6 * _SECONDS) else ("hang", 6.0 * _SECONDS, 0.0)
    except EOFError:
        what, seconds, mib = "crash", 0.0, 0.0
    process.kill()
    process.join()
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    return Outcome(what, seconds, mib, mib / (_TIMES_FILE * size + _MIB))


def _load(results: Connection, folder: Path, whole: Path, dtype: str, bomb: bool) -> None:
    torch.set_num_threads(1)
    saved = SAE.load_from_disk(whole, dtype=dtype)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, started = _resident("VmRSS"), time.perf_counter()
    loaded = None
    try:
        loaded = SAE.load_from_disk(folder, dtype=dtype)
        what = "loaded"
    except _CLEAR as e:
        what = "refused" if str(e).strip() else f"{type(e).__name__} without a word"
    except BaseException as e:
        # Where cfg.json lacks the architecture, SAELens takes it for another, and says which weights that lacks.
        of_another = str(e).startswith("Error(s) in loading state_dict")
        what = "refused" if of_another else f"{type(e).__name__} in {traceback.extract_tb(e.__traceback__)[-1].name}"
    seconds, mib = time.perf_counter() - started, _resident("VmHWM") - before
    if loaded is not None and not bomb:
        what = "as saved" if _state(loaded) == _state(saved) else "silently another"
    results.send((what, seconds, mib))


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


@torch.no_grad()
def _state(itda: Any) -> Any:
    """What two ITDAs share exactly when they are the same; versions and keys that nobody knows are left."""
    metadata = itda.cfg.metadata.to_dict()
    known = {name: metadata.get(name) for name in _itda(0).cfg.metadata.to_dict() if "version" not in name}
    x = torch.randn(3, itda.cfg.d_in, generator=torch.Generator().manual_seed(0))
    tensors = (itda.W_dec, itda.b_dec, itda.encode(x), itda(x))
    own = itda.provenance
    identities = None if own is None else [own.identities(kind) for kind in own.kinds]
    return itda.cfg.to_dict() | {"metadata": known}, [tensor.tolist() for tensor in tensors], identities


def _itda(i: int) -> ITDA:
    """Of equal sizes but for the last, so that files of one fit beside those of another."""
    n, d, generator = 12, 6 + i // 3, torch.Generator().manual_seed(i)
    atoms, bias = (torch.randn(size, generator=generator) for size in ((n, d), (d,)))
    row, position = torch.arange(n) // 3, torch.arange(n) % 3
    sequences = {r: torch.randint(5000, (3,), generator=generator) for r in range(4)}
    prompts = tuple((" the" * p, f" word {i} {r}") for r, p in zip(row.tolist(), position.tolist(), strict=True))
    settings: Any = {"orthogonal": i % 2 == 0, "nonnegative": i == 1}
    return ITDA.from_atoms(
        normalize(atoms, dim=-1),
        3 + i % 2,
        bias=bias,
        provenance=Provenance(row, position, sequences, prompts, f"tokenizer {i}"),
        metadata={"model_name": "a-model", "hook_name": f"blocks.{i}.hook_resid_post", "context_size": 128},
        **settings,
    )
