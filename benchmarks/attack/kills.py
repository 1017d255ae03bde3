"""Processes that save one ITDA over another and are killed, at each step and at any moment."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from torch.nn.functional import normalize

from itda_lens import ITDA, Provenance

KILLS = 200
# Larger than one write, so that kills fall within the writing of either file, and between them.
_ATOMS = 1500


def run(scale: float, seed: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    # A fork of a process that has only imported: each saver starts at once, and with no thread of ours.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", __name__])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "itda")
        _itdas()[0].save_model(folder)
        (folder / "README.md").write_text("of another")
        found = [_at_each_step(folder), _at_random(folder, max(1, round(KILLS * scale)), random.Random(seed))]
        _itdas()[0].save_model(folder)
        left = sorted(path.name for path in folder.iterdir())
    assert left == ["README.md", "cfg.json", "sae_weights.safetensors"], left
    return found


def _at_each_step(folder: Path) -> dict[str, Any]:
    """Killed before the first, the second, ... of what Python asks of the system."""
    outcomes: list[Outcome] = []
    killed = True
    while killed:
        _itdas()[0].save_model(folder)
        saver = multiprocessing.get_context("forkserver").Process(target=_save_until, args=(folder, len(outcomes)))
        saver.start()
        saver.join()
        assert saver.exitcode in (0, -signal.SIGKILL), "the saver failed"
        if killed := saver.exitcode != 0:
            outcomes.append(_outcome(folder))
    return _row("each step", outcomes)


def _at_random(folder: Path, kills: int, moments: random.Random) -> dict[str, Any]:
    saved, outcomes = folder.with_name("saved"), []
    for _ in range(kills):
        saved.unlink(missing_ok=True)
        saver = multiprocessing.get_context("forkserver").Process(target=_save_again_and_again, args=(folder,))
        saver.start()
        while not saved.exists():
            saver.join(0.002)
            assert saver.exitcode is None, "the saver failed"
        saver.join(moments.uniform(0, 0.05))
        saver.kill()
        saver.join()
        outcomes.append(_outcome(folder))
    return _row("any moment", outcomes)


class Outcome(NamedTuple):
    what: str
    between: bool
    """The new weights were in place, and not yet their configuration."""
    writing: bool


def _row(killed_at: str, outcomes: list[Outcome]) -> dict[str, Any]:
    row: dict[str, Any] = {"killed at": killed_at, "kills": len(outcomes)}
    what = [outcome.what for outcome in outcomes]
    row |= {name: what.count(name) for name in ("first", "second", "mixed", "refused")}
    row["while writing"] = sum(outcome.writing for outcome in outcomes)
    return row | {"between the files": sum(outcome.between for outcome in outcomes)}


def _outcome(folder: Path) -> Outcome:
    writing = (folder / ".saving").exists()
    try:
        loaded = SAE.load_from_disk(folder)
    except Exception:
        return Outcome("refused", False, writing)
    found, cfg = _state(loaded), json.loads((folder / "cfg.json").read_text())
    for name, itda in zip(("first", "second"), _itdas(), strict=True):
        if found == _state(itda):
            return Outcome(name, cfg != found[0], writing)
    return Outcome("mixed", False, writing)


def _itdas() -> list[ITDA]:
    """Two that differ in all that may differ."""
    made = []
    for i, (d, hook) in enumerate([(64, "blocks.1.hook_resid_pre"), (48, "blocks.2.hook_mlp_out")]):
        n, generator = _ATOMS + 100 * i, torch.Generator().manual_seed(i)
        atoms, bias = (torch.randn(size, generator=generator) for size in ((n, d), (d,)))
        provenance = Provenance(torch.arange(n), torch.full((n,), i))
        metadata = {"model_name": f"model-{i}", "hook_name": hook}
        more: Any = {"orthogonal": i == 1, "provenance": provenance, "metadata": metadata}
        made.append(ITDA.from_atoms(normalize(atoms, dim=-1), 4 + i, bias=bias, **more))
    return made


@torch.no_grad()
def _state(itda: ITDA) -> tuple[Any, ...]:
    x = torch.randn(4, itda.cfg.d_in, generator=torch.Generator().manual_seed(0))
    tensors = (itda.W_dec, itda.b_dec, itda.encode(x))
    identities = None if itda.provenance is None else itda.provenance.identities("position")
    return itda.cfg.to_dict(), identities, [tensor.numpy().tobytes() for tensor in tensors]


def _save_again_and_again(folder: Path) -> None:
    torch.set_num_threads(1)
    itdas = _itdas()
    while True:
        for itda in itdas:
            itda.save_model(folder)
            folder.with_name("saved").touch()


def _save_until(folder: Path, step: int) -> None:
    itda, steps = _itdas()[1], itertools.count()

    def stop(event: str, _: object) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod") and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(stop)
    itda.save_model(folder)
    os._exit(0)  # no steps of what comes after
