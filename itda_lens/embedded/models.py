"""The language models that come with the package."""

from pathlib import Path

from sae_lens import HookedSAETransformer

from itda_lens.streams import hooked_model_from_folder

SEEDS = (0, 1, 2)


def path(seed: int = 0) -> Path:
    """The Hugging Face folder of the model of this seed: weights, configuration and tokenizer.

    Raises:
        ValueError: there is no model of this seed.

    Example:
        >>> path(1).name
        'seed1'
    """
    if seed not in SEEDS:
        raise ValueError(f"there are embedded models of the seeds {SEEDS}, got {seed!r}")
    return Path(__file__).parent / "weights" / f"seed{seed}"


def model(seed: int = 0, *, device: str = "cpu") -> HookedSAETransformer:
    """A GPT-2 style model of 6 layers and 0.9 million parameters, with unprocessed weights.

    It was trained on the training split of `dataset()`; the models of other seeds differ in their seed alone.

    Raises:
        ValueError: there is no model of this seed.

    Example:
        >>> model(0).cfg.n_layers
        6
    """
    loaded = hooked_model_from_folder(path(seed), device=device)
    loaded.cfg.model_name = f"itda-embedded-seed{seed}"
    return loaded
