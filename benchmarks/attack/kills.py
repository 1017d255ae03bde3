"""Processes that save one ITDA over another, again and again, and are killed at any moment."""

import json
import multiprocessing
import os
import random
import signal
import tempfile
from pathlib import Path
from typing import Any

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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    moments = random.Random(seed)
    found = {"kills": max(1, round(KILLS * scale)), "first": 0, "second": 0, "mixed": 0, "refused": 0}
    found |= {"killed between the files": 0, "killed while writing": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "itda")
        known = [_state(itda) for itda in _itdas()]
        _itdas()[0].save_model(folder)
        (folder / "README.md").write_text("of another")
        for _ in range(found["kills"]):
            (Path(name) / "saved").unlink(missing_ok=True)
            saver = context.Process(target=_save_again_and_again, args=(folder,))
            saver.start()
            while not (Path(name) / "saved").exists():
                saver.join(0.002)
                assert saver.exitcode is None, "the saver failed"
            saver.join(moments.uniform(0, 0.05))
            assert saver.pid is not None
            os.kill(saver.pid, signal.SIGKILL)
            saver.join()
            found["killed while writing"] += any(path.name.endswith(".saving") for path in folder.iterdir())
            outcome, between = _outcome(folder, known)
            found[outcome] += 1
            found["killed between the files"] += between
        _itdas()[0].save_model(folder)
        left = sorted(path.name for path in folder.iterdir())
    assert left == ["README.md", "cfg.json", "sae_weights.safetensors"], left
    return [found]


def _outcome(folder: Path, known: list[Any]) -> tuple[str, bool]:
    try:
        loaded = SAE.load_from_disk(folder)
    except Exception:
        return "refused", False
    for name, state in zip(("first", "second"), known, strict=True):
        if _state(loaded) == state:
            return name, json.loads((folder / "cfg.json").read_text()) != state[0]
    return "mixed", False


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
