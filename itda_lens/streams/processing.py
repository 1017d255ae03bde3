"""Whether TransformerLens has processed a model's weights, which moves activations and leaves logits as they were."""

import warnings
from typing import Any

from sae_lens.saes.sae import SAEMetadata


def normalization_type(model: Any) -> str | None:
    """As TransformerLens calls it: `LN`, `RMS`, ..., and `LNPre`, `RMSPre` where weights were processed.

    Example:
        >>> from itda_lens import embedded
        >>> normalization_type(embedded.model())
        'LN'
    """
    kind = getattr(model.cfg, "normalization_type", None)
    folded = getattr(model, "_weights_processed", False)  # a bridge's configuration does not say so
    return f"{kind.removesuffix('Pre')}Pre" if kind and folded else kind


def check_processing(metadata: SAEMetadata, model: Any, what: str = "this dictionary") -> None:
    """Warn where an SAE was built on processed weights and the model's are not, or the other way round."""
    built_on, given = metadata.model_normalization, normalization_type(model)
    if not built_on or not given or built_on.endswith("Pre") == given.endswith("Pre"):
        return
    names = {True: "processed", False: "unprocessed"}
    load = {True: "HookedTransformer.from_pretrained", False: "load_model"}
    processed = built_on.endswith("Pre")
    warnings.warn(
        f"{what} was built on {names[processed]} weights ({built_on}), and those of this model are "
        f"{names[not processed]} ({given}): folding and centering move activations, so it will do worse than it can. "
        f"Load the model with {load[processed]}",
        stacklevel=4,
    )
