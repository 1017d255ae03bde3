"""Text to rows of tokens: packed as SAELens packs them, or one document a row."""

import itertools
import warnings
from collections.abc import Iterator

import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Bool, Int64
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from sae_lens.util import get_special_token_ids
from torch import Tensor

from itda_lens.streams.columns import find_column
from itda_lens.streams.documents import Document, bos_id, documents, padding_id
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

    Packed rows are SAELens's own (documents joined by BOS and cut at `context_size`, what does not fill the last row
    left out); a text that is shorter than one row is one row, padded. Unpacked rows are one document each, empty ones
    too: cut at `context_size`, padded on the right. Rows of token ids stay rows, packed or not; their `attention_mask`
    is kept, and padding on their left is cut off. Messages are rendered with the tokenizer's chat template.

    Args:
        model: whose tokens.
        dataset: rows with text, token ids or messages (see `load_text`). Rows that lack them count as empty documents,
            and a warning says how many.
        context_size: tokens in a row.
        batch_size: rows in a batch; the last one may have fewer.
        prepend_bos: whether rows begin with BOS (packed rows of token ids stay as they are).
        pack: whether documents are joined and cut.

    Raises:
        ValueError: there is no such column, or no token in it; a row holds something else, or token ids that the model
            does not have; messages, and no chat template.

    Example:
        >>> from itda_lens import embedded
        >>> rows = Dataset.from_dict({"tokens": [[0, 5, 6], [0, 7]]})
        >>> next(token_batches(embedded.model(), rows, context_size=3, batch_size=2))[1].tolist()
        [[True, True, True], [True, True, False]]
    """
    column = find_column(dataset)
    rows = documents(model, dataset, column)
    if not pack:
        bos = bos_id(model) if prepend_bos else None
        rows = (document.begun(bos) for document in rows)
    elif column.kind != "tokens":
        bos = bos_id(model)
        rows = _packed(rows, context_size, bos if prepend_bos else None, bos)
    pad = padding_id(model)
    while batch := list(itertools.islice(rows, batch_size)):
        tokens = torch.full((len(batch), context_size), pad, dtype=torch.int64)
        mask = torch.zeros(len(batch), context_size, dtype=torch.bool)
        for i, row in enumerate(batch):
            length = min(len(row.ids), context_size)
            tokens[i, :length], mask[i, :length] = row.ids[:length], row.mask[:length]
        yield tokens, mask


def special_token_ids(model: HookedModel) -> list[int]:
    """The ids of BOS, EOS, padding and the like, as SAELens's evals leave them out."""
    return sorted(get_special_token_ids(model.tokenizer)) if model.tokenizer is not None else []  # type: ignore[arg-type]


def _packed(
    rows: Iterator[Document], context_size: int, begin: int | None, separator: int | None
) -> Iterator[Document]:
    def pack(sequences: Iterator[Tensor], size: int) -> Iterator[Tensor]:
        return concat_and_batch_sequences(
            sequences, size, begin_batch_token_id=begin, sequence_separator_token_id=separator
        )

    read: list[Tensor] = []
    full = False

    def sequences() -> Iterator[Tensor]:
        for document in rows:
            if not full:
                read.append(document.ids)
            yield document.ids

    for row in pack(sequences(), context_size):
        full = True
        read.clear()
        yield Document.whole(row)
    if not full:  # SAELens leaves out what does not fill a row; here that is all there is.
        sizes = range(context_size - 1, 0, -1)
        row = next(row for size in sizes for row in itertools.islice(pack(iter(read), size), 1))
        warnings.warn(
            f"the text has {len(row)} tokens, fewer than one row of context_size={context_size}: it is one padded row",
            stacklevel=2,
        )
        yield Document.whole(row)
