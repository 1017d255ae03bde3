"""Saving an ITDA so that no moment is wrong, and what is checked of one that is loaded.

SAELens reads `cfg.json` and then the weights. Both are written aside and put in place one after the other, the weights
first. Whoever is stopped in between leaves new weights beside the configuration of the old ones. These weights name it
(see `integrity`), so they are loaded with their own configuration, in the dtype of the old one unless told otherwise.

Folders are not exchanged as a whole: a folder may be a mount point, a link or where somebody works, it may hold other
files, and not all systems can exchange two.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import SAE, SAEConfig
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_sae_loaders import get_sae_lens_config_from_disk, handle_config_defaulting
from safetensors.torch import save_file
from torch import Tensor

from itda_lens import integrity
from itda_lens.provenance import Provenance
from itda_lens.pursuit import check_unit_rows, unit_rows

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PROVENANCE_KEY = "provenance"
NOTE_KEY = "note"
_ASIDE = ".saving"


def save(sae: SAE[Any], folder: str | Path) -> tuple[Path, Path]:
    """Save as SAELens does, and replace what was there at once: whatever happens, the folder holds one or the other.

    Returns:
        the paths of the weights and of the configuration.
    """
    folder = Path(folder)
    cfg, state = json.dumps(sae.cfg.to_dict()), sae.state_dict()
    sae.process_state_dict_for_saving(state)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if (replaced := _configuration(folder)) is not None:
            state[NOTE_KEY] = integrity.replacing(state[NOTE_KEY], replaced)
        writers: dict[str, Callable[[Path], object]] = {
            SAE_WEIGHTS_FILENAME: lambda path: save_file(state, path),
            SAE_CFG_FILENAME: lambda path: path.write_text(cfg),
        }
        _replace(folder, writers)
    return folder / SAE_WEIGHTS_FILENAME, folder / SAE_CFG_FILENAME


def pack(state: dict[str, Any], cfg: SAEConfig, provenance: Provenance | None) -> None:
    """Add to the weights what a file holds besides."""
    # Inside the weights, since SAELens's upload keeps no other file and its metadata goes into every eval.
    if provenance is not None:
        state[PROVENANCE_KEY] = provenance.to_bytes()
    state[NOTE_KEY] = integrity.note(cfg, state, state.get(PROVENANCE_KEY))


class Contents(NamedTuple):
    """What a weights file holds besides the weights."""

    provenance: Tensor | None
    """As bytes."""
    note: dict[str, Any] | None
    """None where something else than `save_model` wrote the file."""


def take_out(state: dict[str, Any]) -> Contents:
    """Take out of a file's tensors what is no weight; raises a ValueError where the others are not those of an ITDA."""
    # SAELens has cast every tensor of the file, bytes too.
    provenance, note = (
        None if tensor is None else tensor.cpu().to(torch.uint8).flatten()
        for tensor in (state.pop(PROVENANCE_KEY, None), state.pop(NOTE_KEY, None))
    )
    for name in ("W_dec", "b_dec"):
        if name not in state:
            raise ValueError(f"the weights have no {name}, only {sorted(state)}: this is not an ITDA")
    if foreign := sorted(state.keys() - {"W_dec", "b_dec"}):
        raise ValueError(f"the weights hold {', '.join(foreign)} besides W_dec and b_dec: this is not an ITDA")
    return Contents(provenance, None if note is None else integrity.read(note, state))


def check(state: dict[str, Any], cfg: SAEConfig, contents: Contents) -> Provenance | None:
    """The provenance of weights that are as they were saved, and leave these unit rows in memory of their own.

    Raises:
        ValueError: what was saved is not all there, or is not as it was saved.
    """
    for name, shape in {"W_dec": (cfg.d_sae, cfg.d_in), "b_dec": (cfg.d_in,)}.items():
        if state[name].shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)}, but the configuration (d_sae={cfg.d_sae}, "
                f"d_in={cfg.d_in}) needs {shape}: one of the two files was edited"
            )
    if not state["b_dec"].isfinite().all():
        raise ValueError("b_dec holds NaN or infinite values: the weights file was edited or damaged")
    packed, note = contents
    provenance = None if packed is None else Provenance.from_bytes(packed, len(state["W_dec"]))
    check_atoms(state["W_dec"], provenance)
    if note is not None:
        integrity.check(note, cfg, state, packed)
    # Tensors of a file are mapped from it: whoever writes to that file would change them.
    atoms = unit_rows(state["W_dec"])
    state["W_dec"] = atoms.clone() if atoms is state["W_dec"] else atoms
    state["b_dec"] = state["b_dec"].clone()
    return provenance


def check_atoms(atoms: Tensor, provenance: Provenance | None) -> None:
    """Raise a ValueError unless atoms are finite unit rows, as many as the provenance names."""
    if not atoms.is_floating_point():
        raise ValueError(f"atoms must be floating point, got {atoms.dtype}")
    bad = atoms.isfinite().all(dim=-1).logical_not().nonzero()
    if len(bad):
        raise ValueError(f"atom {int(bad[0])} holds NaN or infinite values ({len(bad)} such atoms of {len(atoms)})")
    check_unit_rows(atoms.float().norm(dim=-1))
    if provenance is not None and len(provenance) != len(atoms):
        raise ValueError(f"the provenance names {len(provenance)} atoms, but the dictionary has {len(atoms)}")


def _configuration(folder: Path) -> SAEConfig | None:
    """What a loader would take the folder's cfg.json for; None where there is none, or none that can be read."""
    if not (folder / SAE_CFG_FILENAME).exists():
        return None
    try:
        return SAEConfig.from_dict(handle_config_defaulting(get_sae_lens_config_from_disk(folder)))
    except (LookupError, TypeError, ValueError, AttributeError):
        return None


def _replace(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write files aside, then put them in place, the first one first."""
    # A folder, since safetensors writes files of its own beside the one it is asked for, and leaves them if killed.
    aside = folder / _ASIDE
    shutil.rmtree(aside, ignore_errors=True)  # whoever left it was killed
    aside.mkdir()
    try:
        for name, write in writers.items():
            write(aside / f"{name}.new")
            if (folder / name).exists():
                shutil.copymode(folder / name, aside / f"{name}.new")
            _to_disk(aside / f"{name}.new")
        for name in writers:
            (aside / f"{name}.new").replace(folder / name)
        _to_disk(folder)
    finally:
        shutil.rmtree(aside)


def _to_disk(path: Path) -> None:
    if os.name == "posix":  # elsewhere, folders have no handles
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Those who save to one folder do so one after the other."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
