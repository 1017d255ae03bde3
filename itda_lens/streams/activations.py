"""Tokens to activations: one forward pass serves every hook."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from itda_lens.streams.models import HookedModel
from itda_lens.streams.tokens import special_token_ids, token_batches

_LEVEL = -1
"""Of our own hooks alone: TransformerLens counts its contexts from 0."""


class Batch(NamedTuple):
    """Some rows of the stream."""

    tokens: Int64[Tensor, "b s"]
    mask: Bool[Tensor, "b s"]
    """True where a token may become an atom."""
    activations: dict[str, Float[Tensor, "b s d"]]
    """By hook name; heads are flattened."""
    real: Bool[Tensor, "b s"]
    """True where a token is no padding."""


def activation_batches(
    model: HookedModel,
    dataset: Dataset | IterableDataset,
    hooks: Mapping[str, str],
    *,
    context_size: int,
    batch_size: int,
    prepend_bos: bool = True,
    pack: bool = True,
    exclude_special_tokens: bool = True,
    head_index: int | None = None,
    seqpos_slice: tuple[int | None, ...] = (None,),
) -> Iterator[Batch]:
    """One pass over a dataset.

    Args:
        model: a `HookedTransformer` or `TransformerBridge`.
        dataset: rows with text or tokens.
        hooks: from the names of the result to the model's own names (see `canonical_hooks`).
        context_size: tokens a row.
        batch_size: rows a forward pass.
        prepend_bos: whether each row begins with BOS.
        pack: whether documents are joined and cut (as SAELens does), or one document is one row.
        exclude_special_tokens: mask BOS, EOS and padding.
        head_index: take this attention head alone, of hooks that have heads.
        seqpos_slice: mask positions outside this slice, as SAELens has it.
    """
    special = torch.tensor(special_token_ids(model), dtype=torch.int64)
    inside = torch.zeros(context_size, dtype=torch.bool)
    inside[slice(*seqpos_slice)] = True
    batches = token_batches(
        model, dataset, context_size=context_size, batch_size=batch_size, prepend_bos=prepend_bos, pack=pack
    )
    for tokens, real in batches:
        mask = real & inside
        if exclude_special_tokens:
            mask &= ~torch.isin(tokens, special)
        yield Batch(tokens, mask, forward(model, tokens, hooks, head_index), real)


def forward(
    model: HookedModel, tokens: Int64[Tensor, "b s"], hooks: Mapping[str, str], head_index: int | None = None
) -> dict[str, Float[Tensor, "b s d"]]:
    """The activations at each hook, from one forward pass (see `activations_at`); heads are flattened."""
    found = activations_at(model, tokens, list(hooks.values()))
    return {hook: _flat(found[name], head_index) for hook, name in hooks.items()}


class _AllFound(Exception):
    """Ends a forward pass."""


@torch.no_grad()
def activations_at(model: HookedModel, tokens: Int64[Tensor, "b s"], names: Sequence[str]) -> dict[str, Tensor]:
    """What passes through hook points, by the model's own names; what nothing passes through is left out.

    The forward pass ends where the last of them is found. No token is taken for padding.

    Example:
        >>> from itda_lens import embedded
        >>> name = "blocks.1.attn.hook_z"
        >>> activations_at(embedded.model(), torch.zeros(2, 5, dtype=torch.int64), [name])[name].shape
        torch.Size([2, 5, 4, 24])
    """
    found: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor, *, hook: Any) -> None:
        found[name] = tensor.clone()  # some models go on to change it in place
        if len(found) == len(names):
            raise _AllFound

    points = {name: model.hook_dict[name] for name in names}
    try:
        for name, point in points.items():
            point.add_hook(partial(keep, name), level=_LEVEL)
        # Where the tokenizer pads on the left, a HookedTransformer would mask a leading BOS that is also PAD.
        model(tokens.to(model.cfg.device), prepend_bos=False, padding_side="right")
    except _AllFound:
        pass
    finally:
        for point in points.values():
            point.remove_hooks("fwd", level=_LEVEL)
    return found


def _flat(activations: Tensor, head_index: int | None) -> Tensor:
    return activations[:, :, head_index] if head_index is not None else activations.flatten(2)
