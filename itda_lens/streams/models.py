"""Language models by name or folder, with hooks."""

import contextlib
import difflib
import io
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import torch
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import get_official_model_name
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES
from transformers import AutoModelForCausalLM, AutoTokenizer

from itda_lens.provenance import tokenizer_digest

HookedModel: TypeAlias = HookedTransformer | TransformerBridge


def is_bridge(model: object) -> TypeGuard[TransformerBridge]:
    """Whether a model is a `TransformerBridge`, and no `HookedTransformer`."""
    return isinstance(model, TransformerBridge)


def load_model(name: str, *, device: str = "cpu") -> HookedSAETransformer | SAETransformerBridge:
    """A model to which SAEs can be attached, with unprocessed weights.

    Args:
        name: a TransformerLens model name, or a local Hugging Face folder. A folder whose architecture
            `HookedTransformer` does not know is loaded as a bridge.
        device: where the weights go.

    Raises:
        ValueError: neither a folder with a `config.json` nor a name that TransformerLens knows.
    """
    if (Path(name) / "config.json").is_file():
        try:
            return hooked_model_from_folder(name, device=device)
        except NotImplementedError:
            return SAETransformerBridge.boot_transformers(name, device=device)
    if Path(name).exists() or name.startswith((".", "/", "~")):
        raise ValueError(f"{name} is no Hugging Face model folder: it has no config.json")
    official_name(name)
    with _silence():
        return HookedSAETransformer.from_pretrained_no_processing(name, device=device)


def hooked_model_from_folder(
    folder: str | os.PathLike[str], *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> HookedSAETransformer:
    """A `HookedSAETransformer` of a local Hugging Face folder, with unprocessed weights."""
    path = str(Path(folder))  # with a slash at its end, TransformerLens would take the model's name for empty
    hf_model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(path)
    with listed(path), _silence():
        model = HookedSAETransformer.from_pretrained_no_processing(
            path, hf_model=hf_model, tokenizer=tokenizer, device=device, dtype=dtype
        )
    assert isinstance(model, HookedSAETransformer)
    return model


@contextlib.contextmanager
def listed(folder: str | os.PathLike[str], alias: str | None = None) -> Iterator[None]:
    """Inside, TransformerLens loads a local Hugging Face folder by its path, and by another name if one is given.

    It reads the configuration of a folder, but only of one that its list of names holds.
    """
    path = str(folder)
    if path in OFFICIAL_MODEL_NAMES:
        yield
        return
    OFFICIAL_MODEL_NAMES.append(path)
    if alias is not None:
        MODEL_ALIASES[path] = [alias]
    try:
        yield
    finally:
        OFFICIAL_MODEL_NAMES.remove(path)
        MODEL_ALIASES.pop(path, None)


def official_name(name: str) -> str:
    """TransformerLens's own name of a model. Raises ValueError, with the nearest names, where it has none."""
    try:
        return get_official_model_name(name)
    except ValueError:
        near = difflib.get_close_matches(name, [*OFFICIAL_MODEL_NAMES, *itertools.chain(*MODEL_ALIASES.values())])
        raise ValueError(
            f"{name!r} is neither a model that TransformerLens knows nor a local Hugging Face folder."
            + (f" Near it: {', '.join(near)}" if near else "")
        ) from None


def model_metadata(model: HookedModel) -> dict[str, Any]:
    """What the metadata of an SAE says of the model that it belongs to."""
    return {
        "model_name": model.cfg.model_name,
        "model_class_name": type(model).__name__,
        "model_normalization": model.cfg.normalization_type,
        "tokenizer_digest": tokenizer_digest(model.tokenizer),
    }


def check_model(metadata: SAEMetadata, model: HookedModel, what: str = "this dictionary") -> None:
    """Raise a ValueError when the metadata of an SAE names another model than this one; no name passes.

    Owner, folder and alias of a name count for nothing: `gpt2-small` is `openai-community/gpt2`.
    """
    check_model_name(metadata, model.cfg.model_name, what)


def check_model_name(metadata: SAEMetadata, given: str, what: str = "this dictionary") -> None:
    """As `check_model`, for a model that is known by name or folder alone."""
    named = metadata.model_name
    if named and given and _plain_name(str(named)) != _plain_name(given):
        raise ValueError(
            f"{what} belongs to the model {named!r}, but was given {given!r}: pass the model that it was built on, "
            "or, where both are names of one model, set metadata.model_name (in code or in its cfg.json)"
        )


def _plain_name(name: str) -> str:
    last = name.rstrip("/").rpartition("/")[2]
    with contextlib.suppress(ValueError):
        last = get_official_model_name(last).rpartition("/")[2]
    return last.lower().removeprefix("itda-embedded-")  # the folders of the embedded models are named by seed alone


def _silence() -> contextlib.redirect_stdout[io.StringIO]:
    # TransformerLens prints the name of what it has loaded.
    return contextlib.redirect_stdout(io.StringIO())
