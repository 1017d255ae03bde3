"""Tokens to activations: one forward pass serves every hook."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Bool, Float, Int64
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from torch import Tensor

from itda_lens.streams.models import HookedModel
from itda_lens.streams.tokens import special_token_ids, token_batches


class Batch(NamedTuple):
    """Some rows of the stream."""

    tokens: Int64[Tensor, "b s"]
    mask: Bool[Tensor, "b s"]
    """True where a token may become an atom."""
    activations: dict[str, Float[Tensor, "b s d"]]
    """By hook name; heads are flattened."""


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
    for tokens, mask in batches:
        mask = mask & inside
        if exclude_special_tokens:
            mask &= ~torch.isin(tokens, special)
        yield Batch(tokens, mask, forward(model, tokens, hooks, head_index))


@torch.no_grad()
def forward(
    model: HookedModel, tokens: Int64[Tensor, "b s"], hooks: Mapping[str, str], head_index: int | None = None
) -> dict[str, Float[Tensor, "b s d"]]:
    """The activations at each hook, from one forward pass that stops after the last layer needed."""
    stops = [extract_stop_at_layer_from_tlens_hook_name(name) for name in hooks.values()]
    last = None if None in stops else max(stop for stop in stops if stop is not None)
    _, cache = model.run_with_cache(
        tokens.to(model.cfg.device),
        names_filter=list(hooks.values()),
        stop_at_layer=last,
        prepend_bos=False,
        padding_side="right",  # from the left, HookedTransformer would mask a BOS that is the padding token, too
    )
    return {hook: _flat(cache[name], head_index) for hook, name in hooks.items()}


def _flat(activations: Tensor, head_index: int | None) -> Tensor:
    return activations[:, :, head_index] if head_index is not None else activations.flatten(2)
