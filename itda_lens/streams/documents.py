"""Rows of a dataset to token ids, each with a mask of what is text."""

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Bool, Int64
from jinja2 import TemplateError
from sae_lens.tokenization_and_batching import tokenize_with_chat_template
from sae_lens.util import get_special_token_ids
from torch import Tensor

from itda_lens.streams.columns import MASK_COLUMN, Column, describe, is_empty, is_missing, kind_of, token_ids
from itda_lens.streams.models import HookedModel


class Document(NamedTuple):
    """The tokens of one row of a dataset."""

    ids: Int64[Tensor, " s"]
    mask: Bool[Tensor, " s"]
    """False on padding, and wherever the dataset's `attention_mask` is 0."""

    @staticmethod
    def whole(ids: Int64[Tensor, " s"]) -> "Document":
        """One without padding."""
        return Document(ids, torch.ones(len(ids), dtype=torch.bool))

    def begun(self, bos: int | None) -> "Document":
        """With BOS in front, unless it is there already."""
        if bos is None or (len(self.ids) and self.ids[0] == bos):
            return self
        return Document(
            torch.cat([self.ids.new_tensor([bos]), self.ids]), torch.cat([self.mask.new_ones(1), self.mask])
        )


def documents(model: HookedModel, dataset: Dataset | IterableDataset, column: Column) -> Iterator[Document]:
    """One document for each row of a dataset; an empty one for each that has nothing in the column.

    Raises:
        ValueError: a row holds something else than the column is for, or ids that the model does not have; or no row
            has a token.
    """
    n, missing, n_tokens = 0, 0, 0
    row: Any
    try:
        for n, row in enumerate(dataset, 1):
            missing += is_empty(row.get(column.name))
            try:
                document = _read(model, row, column)
            except ValueError as e:
                raise ValueError(f"row {n - 1} of the dataset: {e}") from e
            n_tokens += int(document.mask.sum())
            yield document
    finally:
        if missing:
            warnings.warn(
                f"{missing} of {n} rows have nothing in the column {column.name!r}, and are skipped", stacklevel=2
            )
    if n_tokens == 0:
        raise ValueError(f"none of the {n} rows has a token in the column {column.name!r}: give more text")


def tokenize(model: HookedModel, text: str, *, prepend_bos: bool) -> Int64[Tensor, " s"]:
    """The token ids of a text, as in a row of the stream: BOS comes first once, also where the text begins with it.

    Example:
        >>> from itda_lens import embedded
        >>> model = embedded.model()
        >>> bos = model.tokenizer.bos_token
        >>> tokenize(model, "Return", prepend_bos=True).equal(tokenize(model, bos + "Return", prepend_bos=True))
        True
    """
    return Document.whole(_tokens(model, text)).begun(bos_id(model) if prepend_bos else None).ids


def bos_id(model: HookedModel) -> int | None:
    """The id of BOS, None where the tokenizer has none; a ValueError where it has no place in the model's embedding."""
    bos = getattr(model.tokenizer, "bos_token_id", None)
    if bos is not None and bos >= len(model.W_E):
        raise ValueError(
            f"BOS has the id {bos}, and {model.cfg.model_name} has the ids 0 to {len(model.W_E) - 1}: set "
            "model.tokenizer.bos_token to a token that it has, or to None"
        )
    return bos


def padding_id(model: HookedModel) -> int:
    """An id for places that are masked: the tokenizer's own where the model's embedding has it."""
    pad = getattr(model.tokenizer, "pad_token_id", None)
    return pad if pad is not None and pad < len(model.W_E) else 0


def _read(model: HookedModel, row: Any, column: Column) -> Document:
    value = row.get(column.name)
    if is_empty(value):
        return Document.whole(torch.empty(0, dtype=torch.int64))
    if column.kind == "tokens":
        ids = token_ids(value)
        if ids is not None:
            return _masked(model, ids, row.get(MASK_COLUMN))
    elif kind_of(value) == column.kind:
        return _masked(model, _tokens(model, value) if column.kind == "text" else _chat(model, value), None)
    raise ValueError(f"the column {column.name!r} holds {describe(value)} here, and {column.kind} elsewhere")


def _masked(model: HookedModel, ids: Tensor, mask: Any) -> Document:
    try:
        keep = torch.ones(len(ids), dtype=torch.bool) if is_missing(mask) else torch.as_tensor(mask) != 0
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{MASK_COLUMN!r} holds {describe(mask)}, not one number for each token id") from None
    if keep.shape != ids.shape:
        raise ValueError(f"{MASK_COLUMN!r} has {tuple(keep.shape)} values for {len(ids)} token ids")
    outside = (ids < 0) | (ids >= len(model.W_E))
    if (bad := (outside & keep).nonzero()).numel():
        raise ValueError(
            f"the token id {int(ids[bad[0]])} at position {int(bad[0])}, and {model.cfg.model_name} has the ids 0 to "
            f"{len(model.W_E) - 1}: its own tokenizer must make them, and what is no token must have a 0 in the column "
            f"{MASK_COLUMN!r}"
        )
    if keep.all():
        return Document(ids, keep)
    special = torch.tensor(get_special_token_ids(model.tokenizer) if model.tokenizer is not None else [])
    # Nothing may follow padding on the left: the model would take it for the beginning of the text.
    padding = ~keep & (outside | torch.isin(ids, special))
    start = int(padding.long().cumprod(0).sum())
    return Document(ids.masked_fill(outside, padding_id(model))[start:], keep[start:])


def _tokens(model: HookedModel, text: str) -> Tensor:
    # Tokenizers take no lone surrogates (halves of characters); pairs of them are characters.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return model.to_tokens(text, prepend_bos=False, truncate=False, move_to_device=False)[0].cpu().to(torch.int64)


def _chat(model: HookedModel, messages: Any) -> Tensor:
    tokenizer: Any = model.tokenizer
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"messages need a chat template, and the tokenizer of {model.cfg.model_name} has none: set "
            "model.tokenizer.chat_template, or give text"
        )
    try:
        return tokenize_with_chat_template(messages, tokenizer)
    except TemplateError as e:
        raise ValueError(f"the chat template does not take these messages: {e}") from e
