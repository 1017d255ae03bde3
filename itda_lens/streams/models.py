"""Language models by name or folder, with hooks."""

import contextlib
import difflib
import io
import itertools
import os
from pathlib import Path
from typing import TypeAlias

import torch
from sae_lens import HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import get_official_model_name
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES
from transformers import AutoModelForCausalLM, AutoTokenizer

HookedModel: TypeAlias = HookedTransformer | TransformerBridge


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
    try:
        get_official_model_name(name)
    except ValueError:
        near = difflib.get_close_matches(name, [*OFFICIAL_MODEL_NAMES, *itertools.chain(*MODEL_ALIASES.values())])
        raise ValueError(
            f"{name!r} is neither a model that TransformerLens knows nor a local Hugging Face folder."
            + (f" Near it: {', '.join(near)}" if near else "")
        ) from None
    with _silence():
        return HookedSAETransformer.from_pretrained_no_processing(name, device=device)


def hooked_model_from_folder(
    folder: str | os.PathLike[str], *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> HookedSAETransformer:
    """A `HookedSAETransformer` of a local Hugging Face folder, with unprocessed weights."""
    path = str(folder)
    hf_model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(path)
    # TransformerLens reads the configuration of a folder, but only of one that its list of names holds.
    listed = path in OFFICIAL_MODEL_NAMES
    if not listed:
        OFFICIAL_MODEL_NAMES.append(path)
    try:
        with _silence():
            model = HookedSAETransformer.from_pretrained_no_processing(
                path, hf_model=hf_model, tokenizer=tokenizer, device=device, dtype=dtype
            )
    finally:
        if not listed:
            OFFICIAL_MODEL_NAMES.remove(path)
    assert isinstance(model, HookedSAETransformer)
    return model


def _silence() -> contextlib.redirect_stdout[io.StringIO]:
    # TransformerLens prints the name of what it has loaded.
    return contextlib.redirect_stdout(io.StringIO())
