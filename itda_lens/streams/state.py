"""What was left on a model by others, looked at before its activations are taken."""

import warnings
from typing import Any


def check_state(model: Any) -> None:
    """Refuse a model that would give other activations than its own, and warn of one that may.

    Raises:
        ValueError: SAEs are attached, so that activations would be reconstructions.

    Example:
        >>> from itda_lens import ITDA, embedded
        >>> import torch
        >>> model = embedded.model()
        >>> itda = ITDA.from_atoms(torch.eye(96), k=8, metadata={"hook_name": "blocks.3.hook_resid_post"})
        >>> with model.saes(itda):
        ...     check_state(model)
        Traceback (most recent call last):
        ValueError: an SAE is attached at blocks.3.hook_resid_post of itda-embedded-seed0, so that ...
    """
    if attached := getattr(model, "acts_to_saes", {}):
        raise ValueError(
            f"an SAE is attached at {', '.join(attached)} of {model.cfg.model_name}, so that its activations would be "
            "reconstructions: call model.reset_saes(), or leave the `with model.saes(...)` block"
        )
    points = getattr(model, "hook_dict", {})
    mend_hooks(model)
    # Those of an open `with model.hooks(...)` have a level, and are meant.
    hooked = [name for name, p in points.items() if any(hook.context_level is None for hook in p.fwd_hooks)]
    if hooked:
        warnings.warn(
            f"the model has forward hooks left at {', '.join(hooked)}: its activations are what these leave. "
            "model.reset_hooks(including_permanent=True) removes them",
            stacklevel=3,
        )


def mend_hooks(model: Any) -> None:
    """Where an SAE was on a bridge, SAELens leaves a hook point that is not found by its name and splits no heads."""
    for name, point in getattr(model, "hook_dict", {}).items():
        if "." in name and "." not in (point.name or ""):
            point.name = name
            block, is_of_attention, _ = name.partition(".attn.")
            if is_of_attention:
                getattr(model.get_submodule(f"{block}.attn"), "_setup_qkv_hook_reshaping", lambda: None)()
