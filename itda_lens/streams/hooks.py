"""Hook points of a model, checked before any work."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from transformer_lens.model_bridge import TransformerBridge

from itda_lens.streams.models import HookedModel

PROBE = 3


def canonical_hooks(model: HookedModel, hook_names: Sequence[str]) -> dict[str, str]:
    """Each hook name with the name under which the model itself holds it (they differ for a bridge's aliases).

    Raises:
        ValueError: no name is given, one is given twice, or the model has no such hook (with the nearest names).
    """
    if not hook_names:
        raise ValueError("hook_names is empty: name at least one hook point, such as 'blocks.0.hook_resid_post'")
    aliases: dict[str, str] = {}
    if isinstance(model, TransformerBridge):
        found = {**model.hook_aliases, **model._collect_hook_aliases_from_registry()}
        aliases = {alias: name for alias, name in found.items() if isinstance(name, str)}
    known = {*model.hook_dict, *aliases}
    names: dict[str, str] = {}
    for hook in hook_names:
        if hook not in known:
            near = difflib.get_close_matches(hook, sorted(known), n=3, cutoff=0.5)
            raise ValueError(
                f"{model.cfg.model_name} has no hook point {hook!r}. "
                + (f"Near it: {', '.join(near)}" if near else "model.hook_dict lists what it has")
            )
        if hook in names or aliases.get(hook, hook) in names.values():
            raise ValueError(f"the hook point {hook!r} is named twice")
        names[hook] = aliases.get(hook, hook)
    return names


@torch.no_grad()
def activation_shapes(model: HookedModel, hooks: Iterable[str]) -> dict[str, torch.Size]:
    """The shape of the activations at each hook (the model's own names) for one row of `PROBE` tokens.

    Raises:
        ValueError: nothing passes through one of the hooks.
    """
    names = list(hooks)
    _, cache = model.run_with_cache(
        torch.zeros(1, PROBE, dtype=torch.int64, device=model.cfg.device), names_filter=names, prepend_bos=False
    )
    for name in names:
        if name not in cache:
            raise ValueError(
                f"{model.cfg.model_name} has the hook point {name!r}, but nothing passes through it: TransformerLens "
                "leaves some off until asked (hook_mlp_in until model.set_use_hook_mlp_in(True)), and others unused"
            )
    return {name: cache[name].shape for name in names}


def hook_widths(model: HookedModel, hooks: Mapping[str, str], head_index: int | None = None) -> dict[str, int]:
    """The width of the vector that each hook has for each token, of one head alone if `head_index` is given.

    Args:
        model: the model.
        hooks: from the names of the result to the model's own names (see `canonical_hooks`).
        head_index: an attention head.

    Raises:
        ValueError: a hook has no vector for each token, or not this head.
    """
    shapes = activation_shapes(model, hooks.values())
    widths: dict[str, int] = {}
    for hook, name in hooks.items():
        rows_and_positions, rest = shapes[name][:2], shapes[name][2:]
        if rows_and_positions != (1, PROBE) or not rest:
            raise ValueError(
                f"{hook!r} has no vector for each token: its shape is {list(shapes[name])} for one row of {PROBE} "
                "tokens, where [row, position, ...] is needed"
            )
        if head_index is not None and (len(rest) == 1 or not -rest[0] <= head_index < rest[0]):
            raise ValueError(
                f"hook_head_index {head_index} does not fit {hook!r}: the hook must have heads, "
                f"and {model.cfg.model_name} has {model.cfg.n_heads} of them"
            )
        widths[hook] = math.prod(rest if head_index is None else rest[1:])
    return widths
