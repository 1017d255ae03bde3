"""Dictionaries saved by the paper's released code: `atoms.pt`, `atom_indices.pt` and `metadata.yaml`."""

import math
import reprlib
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from itda_lens.provenance import Provenance
from itda_lens.sae import ITDA

_DEFAULT_K = 40
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# The settings are a few lines of a few words.
_YAML_BYTES, _YAML_DEPTH = 1 << 16, 8


def load_paper_artifact(folder: str | Path, *, k: int | None = None) -> ITDA:
    """An ITDA from a folder that the paper's released code has written.

    Its atoms have no bias and are known by document and position, so they compare by `"position"`. The hook
    point is the residual stream after the layer that the metadata names, as in that code.

    Args:
        folder: holds the three files.
        k: L0; the one of the metadata if not given, or 40, that code's default.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: a file does not hold what it should. Nothing in them is ever executed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(torch.eye(4), f"{folder}/atoms.pt")
        ...     torch.save(torch.tensor([[0, 1], [0, 5], [2, 3], [7, 1]]), f"{folder}/atom_indices.pt")
        ...     _ = Path(folder, "metadata.yaml").write_text("{lm_name: gpt2, layer: 3, k: 2}")
        ...     itda = load_paper_artifact(folder)
        >>> itda.cfg.k, itda.cfg.metadata.hook_name, itda.provenance.identities("position")[1]
        (2, 'blocks.3.hook_resid_post', (0, 5))
    """
    folder = Path(folder)
    names = ("atoms.pt", "atom_indices.pt", "metadata.yaml")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}: an artifact of the paper's code has all of {names}"
        )
    settings = _settings(folder / "metadata.yaml")
    chosen = settings.get("k", _DEFAULT_K) if k is None else k
    if not _is_whole(chosen, 1):
        raise ValueError(
            f"k is {reprlib.repr(chosen)}, but must be a whole number of at least 1: load_paper_artifact(folder, k=40)"
        )
    atoms, places = _tensor(folder / "atoms.pt"), _tensor(folder / "atom_indices.pt")
    if atoms.ndim != 2 or atoms.dtype not in _FLOATS:
        raise ValueError(f"atoms.pt holds a tensor of shape {tuple(atoms.shape)} and {atoms.dtype}, not rows of atoms")
    if places.shape != (len(atoms), 2) or places.dtype not in _INTEGERS:
        raise ValueError(
            f"atom_indices.pt holds shape {tuple(places.shape)} and {places.dtype}; "
            f"{len(atoms)} atoms need whole numbers of shape ({len(atoms)}, 2)"
        )
    if len(negative := (places < 0).any(dim=1).nonzero()):
        atom = int(negative[0])
        raise ValueError(
            f"atom_indices.pt has {places[atom].tolist()} for atom {atom}: documents and positions begin at 0"
        )
    layer = settings.get("layer")
    row, position = places.long().unbind(dim=1)
    return ITDA.from_atoms(
        atoms.float(),
        chosen,
        provenance=Provenance(row.clone(), position.clone()),
        metadata={
            "model_name": settings.get("lm_name"),
            "hook_name": None if layer is None else f"blocks.{layer}.hook_resid_post",
            "dataset_path": settings.get("dataset"),
            "context_size": settings.get("seq_len"),
            "prepend_bos": False,
            "exclude_special_tokens": False,
            "itda_build": {"selection": "paper", "loss": "paper", "threshold": settings.get("loss_threshold")},
        },
    )


def _tensor(path: Path) -> Tensor:
    """A dense tensor that takes no more memory than its file."""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as e:
            raise ValueError(f"{path} can't be read as a tensor ({e}): it is not loaded") from e
        if size > path.stat().st_size:
            raise ValueError(f"{path} would become {size:,} bytes, more than it has: PyTorch did not write it")
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever an unpickler makes of a file that is none
        raise ValueError(f"{path} can't be read as a tensor ({str(e).partition(chr(10))[0]}): it is not loaded") from e
    if not isinstance(value, Tensor):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a tensor")
    if value.is_nested or value.layout != torch.strided or value.device.type != "cpu":
        raise ValueError(
            f"{path} holds a tensor on {value.device} in the layout {value.layout}: it must be a dense one"
        )
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{path} holds a tensor of shape {tuple(value.shape)} that repeats fewer values: save a clone")
    return value.detach()


def _settings(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _YAML_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes: settings have at most {_YAML_BYTES:,}")
    try:
        text, depth = path.read_text(encoding="utf8"), 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # before anything is made of it
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _YAML_DEPTH:
                raise ValueError("settings have no aliases and are not nested so deeply")
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError) as e:
        raise ValueError(f"{path} is no YAML that can be read ({e})") from e
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}, not settings by name")
    for name, fits, needed in (
        ("lm_name", lambda value: isinstance(value, str), "a name"),
        ("dataset", lambda value: isinstance(value, str), "a name"),
        ("layer", lambda value: _is_whole(value, 0), "a whole number of at least 0"),
        ("seq_len", lambda value: _is_whole(value, 1), "a whole number of at least 1"),
        ("loss_threshold", _is_number, "a finite number"),
    ):
        if settings.get(name) is not None and not fits(settings[name]):
            raise ValueError(f"{name} in {path} is {reprlib.repr(settings[name])}, but must be {needed}")
    return settings


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
