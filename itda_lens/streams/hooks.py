"""Hook points of a model, checked before any work."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from itda_lens.streams.activations import activations_at
from itda_lens.streams.models import HookedModel, is_bridge
from itda_lens.streams.state import check_state

PROBE = 3

_LAYERS = r"(?P<layers>\*|(?P<first>\d+)(?:-(?P<last>\d+))?)"
_AT_LAYERS = re.compile(rf"blocks\.{_LAYERS}\.(?P<rest>.+)")
_AFTER_LAYERS = re.compile(rf"(?:(?:\w+\.)*(?:layers|h|blocks?)\.)?{_LAYERS}")
"""A layer's number, or a decoder block by its name in Hugging Face's model."""

_BRIDGE_TO_HOOKED = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "attn.q.hook_out": "attn.hook_q",
    "attn.k.hook_out": "attn.hook_k",
    "attn.v.hook_out": "attn.hook_v",
    "attn.o.hook_in": "attn.hook_z",
    "attn.hook_attn_in": "hook_attn_in",
    "attn.hook_q_input": "hook_q_input",
    "attn.hook_k_input": "hook_k_input",
    "attn.hook_v_input": "hook_v_input",
    "mlp.out.hook_in": "mlp.hook_post",
}
"""Within a block, wherever its norms are and whatever its MLP."""


def expand_hooks(model: HookedModel, hooks: str | Sequence[str]) -> list[str]:
    """Hook names with their patterns written out: one name for each hook point.

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`.
        hooks: one or more, each of which may be several with commas between them: a hook point;
            `blocks.*.hook_resid_post`, every layer that has it; `blocks.0-5.hook_resid_post`, where both ends count;
            a layer `12` or layers `0-5`, or `model.layers.12` as Hugging Face names it: the residual stream after it.

    Raises:
        ValueError: the model has no such layer.

    Example:
        >>> from itda_lens import embedded
        >>> expand_hooks(embedded.model(), "blocks.0-1.hook_mlp_out, model.layers.3")
        ['blocks.0.hook_mlp_out', 'blocks.1.hook_mlp_out', 'blocks.3.hook_resid_post']
    """
    given = [hooks] if isinstance(hooks, str) else hooks
    return [name for entry in given for hook in entry.split(",") for name in _expanded(model, hook.strip())]


def canonical_hooks(model: HookedModel, hook_names: Sequence[str]) -> dict[str, str]:
    """Each hook name with the name under which the model itself holds it.

    They differ for the names of the other kind of model (`blocks.3.hook_out` of a bridge is
    `blocks.3.hook_resid_post` of a `HookedTransformer`), and for a layer's number or its name in Hugging Face's model.

    Raises:
        ValueError: no name is given, one is given twice, the model has no such hook (with the nearest names), or an
            SAE is attached to it (see `check_state`).

    Example:
        >>> from itda_lens import embedded
        >>> canonical_hooks(embedded.model(), ["blocks.3.attn.o.hook_in", "model.layers.3"])
        {'blocks.3.attn.o.hook_in': 'blocks.3.attn.hook_z', 'model.layers.3': 'blocks.3.hook_resid_post'}
    """
    if not hook_names:
        raise ValueError("hook_names is empty: name at least one hook point, such as 'blocks.0.hook_resid_post'")
    check_state(model)
    known = _known(model)
    names: dict[str, str] = {}
    for hook in hook_names:
        expanded = _expanded(model, hook)
        if len(expanded) > 1:
            raise ValueError(f"{hook!r} stands for {len(expanded)} hook points, but one is needed here")
        if expanded[0] not in known:
            near = difflib.get_close_matches(hook, sorted(known), n=3, cutoff=0.5)
            raise ValueError(
                f"{model.cfg.model_name} has no hook point {hook!r}. "
                + (f"Near it: {', '.join(near)}" if near else "model.hook_dict lists what it has")
            )
        name = known[expanded[0]]
        if hook in names or name in names.values():
            raise ValueError(f"the hook point {hook!r} is named twice")
        names[hook] = name
    return names


def _expanded(model: HookedModel, hook: str) -> list[str]:
    match = _AFTER_LAYERS.fullmatch(hook) or _AT_LAYERS.fullmatch(hook)
    if match is None:
        return [hook]
    after = "hook_out" if is_bridge(model) else "hook_resid_post"
    rest = match.groupdict().get("rest", after)
    depth = model.cfg.n_layers
    if match["layers"] == "*":
        names = [f"blocks.{i}.{rest}" for i in range(depth)]
        return [name for name in names if name in _known(model)] or [hook]
    layers = range(int(match["first"]), int(match["last"] or match["first"]) + 1)
    if not layers or layers[-1] >= depth:
        last = f"blocks.{depth - 1}.{rest}"
        raise ValueError(
            f"{model.cfg.model_name} has no hook point {hook!r}, since it has {depth} layers: 0 to {depth - 1}."
            + (f" Near it: {last}" if last in _known(model) else "")
        )
    return [f"blocks.{i}.{rest}" for i in layers]


def _known(model: HookedModel) -> dict[str, str]:
    """Every name that is understood, with the model's own name of that hook point."""
    own = {name: name for name in model.hook_dict}
    if is_bridge(model):
        aliases = {**model.hook_aliases, **model._collect_hook_aliases_from_registry()}
        choices = {alias: [name] if isinstance(name, str) else name for alias, name in aliases.items()}
    else:
        choices = {alias: [name] for alias, name in _names_on_a_bridge(model.cfg).items()}
    return {alias: name for alias, names in choices.items() for name in names[::-1] if name in own} | own


def _names_on_a_bridge(cfg: Any) -> dict[str, str]:
    """From the names that a bridge of the same model has to those of a `HookedTransformer`."""
    block = dict(_BRIDGE_TO_HOOKED)
    if cfg.original_architecture in ("Olmo2ForCausalLM", "Olmo3ForCausalLM"):
        block |= {"ln1.hook_out": "hook_attn_out", "ln2.hook_out": "hook_mlp_out"}
    else:
        attn, mlp = ("ln1_post", "ln2_post") if cfg.use_normalization_before_and_after else ("attn", "mlp")
        block |= {
            f"{attn}.hook_out": "hook_attn_out",
            f"{mlp}.hook_out": "hook_mlp_out",
            "ln2.hook_in": "hook_resid_mid",
        }
    gated = {"mlp.gate.hook_out": "mlp.hook_pre", "mlp.in.hook_out": "mlp.hook_pre_linear"}
    block |= gated if cfg.gated_mlp else {"mlp.in.hook_out": "mlp.hook_pre"}
    return {"embed.hook_out": "hook_embed", "pos_embed.hook_out": "hook_pos_embed"} | {
        f"blocks.{i}.{theirs}": f"blocks.{i}.{ours}" for i in range(cfg.n_layers) for theirs, ours in block.items()
    }


def activation_shapes(model: HookedModel, hooks: Iterable[str]) -> dict[str, torch.Size]:
    """The shape of the activations at each hook (the model's own names) for one row of `PROBE` tokens.

    Raises:
        ValueError: nothing passes through one of the hooks.
    """
    names = list(hooks)
    found = activations_at(model, torch.zeros(1, PROBE, dtype=torch.int64), names)
    for name in names:
        if name not in found:
            raise ValueError(
                f"{model.cfg.model_name} has the hook point {name!r}, but nothing passes through it: TransformerLens "
                "leaves some off until asked (hook_mlp_in until model.set_use_hook_mlp_in(True)), and others unused"
            )
    return {name: found[name].shape for name in names}


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
            heads = f"has {rest[0]}" if len(rest) > 1 else "has none"
            raise ValueError(
                f"hook_head_index {head_index} does not fit {hook!r}: the hook must have that head, and it {heads}"
            )
        widths[hook] = math.prod(rest if head_index is None else rest[1:])
    return widths
