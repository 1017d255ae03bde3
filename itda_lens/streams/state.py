"""What was left on a model by others, looked at before its activations are taken."""

import warnings

from itda_lens.streams.models import HookedModel, is_bridge


def check_state(model: HookedModel) -> None:
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
    points = model.hook_dict
    if is_bridge(model):
        for name, point in points.items():
            if "." in name and "." not in (point.name or ""):
                point.name = name  # SAELens puts a point without its path where an SAE was, and no hook finds it
    if hooked := [name for name, point in points.items() if point.fwd_hooks]:
        warnings.warn(
            f"{model.cfg.model_name} has forward hooks at {', '.join(hooked)}: its activations are those that these "
            "hooks leave. model.reset_hooks(including_permanent=True) removes them",
            stacklevel=3,
        )
