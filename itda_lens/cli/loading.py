"""From options to models, text and SAEs; what is wrong with them is said before any long work."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from datasets import Dataset, IterableDataset
from sae_lens import SAE

from itda_lens import embedded
from itda_lens.cli.options import ModelOptions, TextOptions
from itda_lens.sae import ITDA
from itda_lens.streams import HookedModel, load_model, load_text, models

T = TypeVar("T")
M = TypeVar("M")

_EMBEDDED_MODEL = re.compile(r"(?:embedded(?::|$)|itda-embedded-seed)(\d*)$")


def check_model(name: str | None) -> None:
    """Raise a ValueError where a name is that of no embedded model."""
    if name is not None and (found := _EMBEDDED_MODEL.match(name)):
        embedded.path(int(found[1] or 0))


def model_width(name: str) -> int:
    """The width of a model's residual stream, before it is loaded; 0 where that can't be known."""
    found = _EMBEDDED_MODEL.match(name)
    return models.model_width(embedded.path(int(found[1] or 0)) if found else name)


def model_named(name: str, options: ModelOptions) -> HookedModel:
    transformers.utils.logging.disable_progress_bar()
    if found := _EMBEDDED_MODEL.match(name):
        model = embedded.model(int(found[1] or 0), device=options.device)
        return model if options.dtype == "float32" else model.to(getattr(torch, options.dtype), print_details=False)
    return load_model(name, device=options.device, dtype=options.dtype)


def model_of(sae: SAE, given: str | None, option: str, options: ModelOptions) -> HookedModel:
    """The model that an SAE belongs to, unless another is given."""
    if given is not None:
        return model_named(given, options)
    name = sae.cfg.metadata.model_name
    if name is None:
        raise ValueError(f"the SAE does not say which model it belongs to: pass {option}")
    if _EMBEDDED_MODEL.match(name):
        return model_named(name, options)
    try:
        transformers.utils.logging.disable_progress_bar()
        return models.load_model_of(sae.cfg.metadata, device=options.device, dtype=options.dtype)
    except ValueError as e:
        raise ValueError(f"the SAE belongs to {name!r}, which can't be loaded by that name: pass {option}. {e}") from e


def text_and(name: str, text: Callable[[], T], models: Callable[[], M]) -> tuple[T, M]:
    """Text and models, the text first, since models take longer; unless it would have to be fetched."""
    here = _is_embedded(name) or Path(name).suffix or name.startswith((".", "/", "~")) or Path(name).exists()
    if here:
        found = text()
        return found, models()
    loaded = models()
    return text(), loaded


def text_named(name: str, options: TextOptions, *, column: str | None = None) -> Dataset | IterableDataset:
    """A dataset whose text is in a column of its usual name."""
    if _is_embedded(name):
        return embedded.dataset(name.partition(":")[2] or "train")  # type: ignore[arg-type]
    chosen = {"config": options.config, "revision": options.revision}
    given: dict[str, Any] = {key: value for key, value in chosen.items() if value is not None}
    return load_text(name, split=options.split, column=column, **given)


def _is_embedded(dataset: str) -> bool:
    return dataset == "embedded" or dataset.startswith("embedded:")


def load_sae(folder: Path, device: str) -> SAE:
    if not (folder / "cfg.json").is_file():
        raise ValueError(f"{folder} holds no SAE: there is no cfg.json")
    try:
        return SAE.load_from_disk(folder, device=device)
    except Exception as e:  # SAELens, safetensors and JSON each have kinds of their own
        raise ValueError(f"{folder} can't be loaded ({type(e).__name__}): {e}") from e


def load_itda(folder: Path, device: str) -> ITDA:
    itda = load_sae(folder, device)
    if not isinstance(itda, ITDA):
        raise ValueError(f"{folder} holds a {itda.cfg.architecture()!r} SAE, whose latents come from no prompt")
    return itda


def load_build(folder: Path) -> dict[str, ITDA]:
    itdas = {path.parent.name: load_sae(path.parent, "cpu") for path in sorted(folder.glob("*/cfg.json"))}
    if not itdas or not all(isinstance(itda, ITDA) for itda in itdas.values()):
        raise ValueError(f"{folder} holds no folders of ITDAs, as itda-lens build --out writes them")
    return {hook: itda for hook, itda in itdas.items() if isinstance(itda, ITDA)}
