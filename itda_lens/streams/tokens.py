"""Text to rows of tokens: packed as SAELens packs them, or one document a row."""

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Bool, Int64
from sae_lens import ActivationsStore
from sae_lens.util import get_special_token_ids
from torch import Tensor

from itda_lens.streams.datasets import TEXT_COLUMNS, TOKEN_COLUMNS
from itda_lens.streams.models import HookedModel


def token_batches(
    model: HookedModel,
    dataset: Dataset | IterableDataset,
    *,
    context_size: int,
    batch_size: int,
    prepend_bos: bool = True,
    pack: bool = True,
) -> Iterator[tuple[Int64[Tensor, "b s"], Bool[Tensor, "b s"]]]:
    """One pass over a dataset, as batches of token ids and of masks that are False on padding.

    Packed rows are SAELens's own (documents joined by BOS, cut at `context_size`); the last batch may be smaller.
    Unpacked rows are one document each, empty ones too: cut at `context_size`, padded on the right.
    """
    rows = _packed_rows(model, dataset, context_size, prepend_bos) if pack else _documents(model, dataset)
    tokenizer = model.tokenizer
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    bos = getattr(tokenizer, "bos_token_id", None) if prepend_bos and not pack else None
    while batch := list(itertools.islice(rows, batch_size)):
        tokens = torch.full((len(batch), context_size), pad, dtype=torch.int64)
        mask = torch.zeros(len(batch), context_size, dtype=torch.bool)
        for i, row in enumerate(batch):
            if bos is not None and (len(row) == 0 or row[0] != bos):
                row = torch.cat([row.new_tensor([bos]), row])
            length = min(len(row), context_size)
            tokens[i, :length], mask[i, :length] = row[:length], True
        yield tokens, mask


def special_token_ids(model: HookedModel) -> list[int]:
    """The ids of BOS, EOS, padding and the like, as SAELens's evals leave them out."""
    return sorted(get_special_token_ids(model.tokenizer)) if model.tokenizer is not None else []  # type: ignore[arg-type]


def _packed_rows(
    model: HookedModel, dataset: Dataset | IterableDataset, context_size: int, prepend_bos: bool
) -> Iterator[Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dataset is not tokenized")
        store = ActivationsStore.from_config_multi_hook(
            model,  # pyright: ignore[reportArgumentType]  (SAELens takes bridges too)
            dataset=dataset,
            hook_names=["unused"],
            hook_d_ins={"unused": 1},
            context_size=context_size,
            prepend_bos=prepend_bos,
            total_training_tokens=1,
        )
    # get_batch_tokens would begin the dataset anew without a word, or drop the last partial batch.
    return iter(store.iterable_sequences)


def _documents(model: HookedModel, dataset: Dataset | IterableDataset) -> Iterator[Tensor]:
    document: Any
    for document in dataset:
        column = next(name for name in (*TOKEN_COLUMNS, *TEXT_COLUMNS) if name in document)
        content = document[column]
        if isinstance(content, str):
            yield model.to_tokens(content, prepend_bos=False, truncate=False, move_to_device=False)[0].cpu()
        else:
            yield torch.as_tensor(content, dtype=torch.int64)
