"""Dictionaries saved by the paper's released code: `atoms.pt`, `atom_indices.pt` and `metadata.yaml`."""

import pickle
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from itda_lens.provenance import Provenance
from itda_lens.sae import ITDA

_DEFAULT_K = 40


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
    atoms, places = _tensor(folder / "atoms.pt"), _tensor(folder / "atom_indices.pt")
    if atoms.ndim != 2 or not atoms.is_floating_point():
        raise ValueError(f"atoms.pt holds a tensor of shape {tuple(atoms.shape)} and {atoms.dtype}, not rows of atoms")
    if places.shape != (len(atoms), 2) or places.is_floating_point():
        raise ValueError(
            f"atom_indices.pt holds shape {tuple(places.shape)} and {places.dtype}; "
            f"{len(atoms)} atoms need whole numbers of shape ({len(atoms)}, 2)"
        )
    settings = _settings(folder / "metadata.yaml")
    layer = settings.get("layer")
    row, position = places.long().unbind(dim=1)
    return ITDA.from_atoms(
        atoms.float(),
        _DEFAULT_K if k is None and "k" not in settings else int(settings["k"] if k is None else k),
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
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as e:
        raise ValueError(f"{path} can't be read as a tensor ({str(e).splitlines()[0]}): it is not loaded") from e
    if not isinstance(value, Tensor):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a tensor")
    return value


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf8"))
    except yaml.YAMLError as e:
        raise ValueError(f"{path} is no YAML ({e})") from e
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}, not settings by name")
    return settings
