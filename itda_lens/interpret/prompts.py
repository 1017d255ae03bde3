"""Prompts in the tokens of a model: run them, and take them from a text."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from itda_lens.provenance import Provenance
from itda_lens.streams import HookedModel, load_text, special_token_ids, token_batches
from itda_lens.streams.activations import forward
from itda_lens.streams.datasets import AnyDataset
from itda_lens.streams.massive import is_massive


class PromptBatch(NamedTuple):
    """Activations at the ends of some prompts."""

    which: Int64[Tensor, " m"]
    """Which prompts."""
    activations: dict[str, Float[Tensor, "m d"]]
    """By hook name."""
    total: dict[str, Float[Tensor, " d"]]
    """The sum over all tokens of these rows, special and massive ones left out, in float64."""
    n_tokens: dict[str, int]
    """How many tokens were summed."""


@torch.no_grad()
def run_prompts(
    model: HookedModel,
    prompts: Provenance,
    hooks: Mapping[str, str],
    *,
    head_index: int | None = None,
    batch_size: int = 32,
    exclude_special_tokens: bool = True,
) -> Iterator[PromptBatch]:
    """Run each row once, the longest first, and give the activations where its prompts end.

    Args:
        model: the model whose tokens the prompts have (see `place`).
        prompts: with tokens.
        hooks: from the names of the result to the model's own names (see `canonical_hooks`).
        head_index: take this attention head alone.
        batch_size: rows in a forward pass.
        exclude_special_tokens: leave BOS, EOS and padding out of the total.

    Raises:
        ValueError: an activation is NaN or infinite; the message names its row and position.
    """
    ends = defaultdict(list)
    for i, row in enumerate(prompts.row.tolist()):
        ends[row].append(i)
    special = torch.tensor(special_token_ids(model) if exclude_special_tokens else [], dtype=torch.int64)
    rows = sorted(ends, key=lambda row: len(prompts.sequences[row]), reverse=True)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        sequences = [prompts.sequences[row] for row in batch]
        tokens = pad_sequence(sequences, batch_first=True)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        counted = (torch.arange(tokens.shape[1]) < lengths[:, None]) & ~torch.isin(tokens, special)
        index = torch.tensor([i for row in batch for i in ends[row]])
        within = torch.tensor([b for b, row in enumerate(batch) for _ in ends[row]])
        activations, total, n_tokens = {}, {}, {}
        for hook, x in forward(model, tokens, hooks, head_index).items():
            at_ends = x[within.to(x.device), prompts.position[index].to(x.device)].float()
            summed = x[counted.to(x.device)].double()
            if len(summed):
                norms = summed.norm(dim=-1)
                summed = summed[~is_massive(norms, norms.median())]
            bad = at_ends.isfinite().all(dim=-1).logical_not().nonzero()
            if len(bad):
                i = int(index[bad[0]])
                raise ValueError(
                    f"the activation of row {int(prompts.row[i])} at position {int(prompts.position[i])} at {hook} of "
                    f"{model.cfg.model_name} holds NaN or infinite values: run the model in a wider dtype"
                )
            activations[hook], total[hook], n_tokens[hook] = at_ends, summed.sum(dim=0), len(summed)
        yield PromptBatch(index, activations, total, n_tokens)


def probe(
    model: HookedModel,
    dataset: AnyDataset | str | Path,
    *,
    tokens: int = 8192,
    context_size: int = 128,
    prepend_bos: bool = True,
    pack: bool = False,
    column: str | None = None,
    text: bool = False,
) -> Provenance:
    """The first tokens of a dataset, special ones left out, as prompts that any model can be asked about.

    Args:
        model: whose tokens.
        dataset: rows with text or tokens.
        tokens: how many (fewer when the dataset ends first).
        context_size: tokens in a row.
        prepend_bos: whether each row begins with BOS.
        pack: join documents and cut them; otherwise one document is one row.
        column: the dataset's column with the text, when it is not called `text`.
        text: keep the text of each prompt too, which models of other tokenizers need.

    Raises:
        ValueError: the dataset has no token.

    Example:
        >>> from itda_lens import embedded
        >>> len(probe(embedded.model(), embedded.dataset("heldout"), tokens=100))
        100
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    special = torch.tensor(special_token_ids(model), dtype=torch.int64)
    sequences: dict[int, Tensor] = {}
    row, position, found = [], [], 0
    stream: Any = load_text(dataset, column=column)
    batches = token_batches(model, stream, context_size=context_size, batch_size=32, prepend_bos=prepend_bos, pack=pack)
    for b, (ids, mask) in enumerate(batches):
        places = (mask & ~torch.isin(ids, special)).nonzero()[: tokens - found]
        row.append(places[:, 0] + 32 * b)
        position.append(places[:, 1])
        sequences |= {32 * b + r: ids[r] for r in places[:, 0].unique().tolist()}
        found += len(places)
        if found >= tokens:
            break
    if found == 0:
        raise ValueError("the dataset has no token but special ones")
    where = torch.cat(row), torch.cat(position)
    if text:
        tokenizer: Any = model.tokenizer
        return Provenance.from_tokens(*where, sequences, tokenizer).select(range(found))
    return Provenance(*where, sequences).select(range(found)).of_tokenizer(model.tokenizer)
