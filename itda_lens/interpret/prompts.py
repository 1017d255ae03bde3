"""Prompts, found in one model's text, placed in the tokens of another model and run there."""

import bisect
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from itda_lens.provenance import Provenance, tokenizer_digest
from itda_lens.streams import HookedModel, load_text, special_token_ids, token_batches
from itda_lens.streams.activations import forward
from itda_lens.streams.datasets import AnyDataset

BORDER, CONTEXT, DEGENERATE = "border", "context", "degenerate"


class Placed(NamedTuple):
    """Prompts in the tokens of another model."""

    provenance: Provenance
    """Those that could be placed."""
    source: Int64[Tensor, " m"]
    """Which of the given prompts each is."""
    dropped: dict[str, list[int]]
    """The others: no token of the model ends where the prompt ends, or it is longer than the model's context."""


class PromptBatch(NamedTuple):
    """Activations at the ends of some prompts."""

    which: Int64[Tensor, " m"]
    """Which prompts."""
    activations: dict[str, Float[Tensor, "m d"]]
    """By hook name."""
    total: dict[str, Float[Tensor, " d"]]
    """The sum over all tokens of these rows, special ones left out, in float64."""
    n_tokens: int
    """How many tokens were summed."""


def place(prompts: Provenance, model: HookedModel, *, prepend_bos: bool = True) -> Placed:
    """Find prompts in the tokens of a model.

    Where the tokenizer is the same, token sequences stay as they are. Otherwise the text of each row is tokenised
    anew, and a prompt is placed where a token ends exactly where its text ends. (Its text leaves special tokens
    out, so rows of several documents, joined by BOS, are one text then: build with `pack=False` for that.)

    Args:
        prompts: with tokens, and with text for a model of another tokenizer.
        model: where the prompts shall be run.
        prepend_bos: whether rows that are tokenised anew begin with BOS.

    Raises:
        ValueError: the prompts lack tokens or text, their tokens are none of this model, or none could be placed.

    Example:
        >>> from itda_lens import embedded
        >>> prompts = Provenance(torch.tensor([0]), torch.tensor([2]), {0: torch.tensor([0, 5, 6, 7])})
        >>> place(prompts, embedded.model()).provenance.tokens(0)
        [0, 5, 6]
    """
    if prompts.kinds == ("position",):
        raise ValueError(
            "these atoms have neither tokens nor text, so no model can read them: build the dictionary with tokens"
        )
    digest, own = tokenizer_digest(model.tokenizer), prompts.tokenizer_digest
    n_ctx: int = model.cfg.n_ctx
    if prompts.sequences and own in (None, digest):
        _check_vocabulary(prompts, model)
        position, sequences = prompts.position, dict(prompts.sequences)
    else:
        position, sequences = _tokenise_anew(prompts, model, prepend_bos)
    fits = (position >= 0) & (position < n_ctx)
    dropped = {
        BORDER: (position < 0).nonzero().flatten().tolist(),
        CONTEXT: (position >= n_ctx).nonzero().flatten().tolist(),
    }
    source = fits.nonzero().flatten()
    if len(source) == 0:
        raise ValueError(
            f"none of the {len(prompts)} prompts can be placed in {model.cfg.model_name}: {len(dropped[BORDER])} end "
            f"where no token of it does, and {len(dropped[CONTEXT])} are longer than its {n_ctx} positions"
        )
    texts = tuple(prompts.prompts[i] for i in source.tolist()) if prompts.prompts else ()
    placed = Provenance(prompts.row[source], position[source], sequences, texts, digest)
    return Placed(placed.select(range(len(source))), source, dropped)  # select cuts each row after its last prompt


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
        activations, total = {}, {}
        for hook, x in forward(model, tokens, hooks, head_index).items():
            at_ends = x[within.to(x.device), prompts.position[index].to(x.device)].float()
            sums = x[counted.to(x.device)].double().sum(dim=0)
            bad = at_ends.isfinite().all(dim=-1).logical_not().nonzero()
            if len(bad):
                i = int(index[bad[0]])
                raise ValueError(
                    f"the activation of row {int(prompts.row[i])} at position {int(prompts.position[i])} at {hook} of "
                    f"{model.cfg.model_name} holds NaN or infinite values: run the model in a wider dtype"
                )
            activations[hook], total[hook] = at_ends, sums
        yield PromptBatch(index, activations, total, int(counted.sum()))


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
    return Provenance(*where, sequences, (), tokenizer_digest(model.tokenizer)).select(range(found))


def _tokenise_anew(
    prompts: Provenance, model: HookedModel, prepend_bos: bool
) -> tuple[Int64[Tensor, " n"], dict[int, Tensor]]:
    """Positions of the prompts' ends, -1 where no token ends there, and the tokens of each row."""
    tokenizer: Any = model.tokenizer
    if tokenizer is None or not prompts.prompts:
        lacking = "the model has no tokenizer" if tokenizer is None else "these atoms have no text"
        raise ValueError(
            f"the tokens of these atoms belong to another tokenizer than {model.cfg.model_name} has, and {lacking}: "
            "build the dictionary with a tokenizer, or transfer to a model with the same one"
        )

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    by_row = defaultdict(list)
    for i, row in enumerate(prompts.row.tolist()):
        by_row[row].append(i)
    position, sequences = torch.full((len(prompts),), -1), {}
    for row, members in by_row.items():
        longest = max((prompts.text(i) for i in members), key=len)
        ids = model.to_tokens(longest, prepend_bos=prepend_bos, truncate=False, move_to_device=False)[0].cpu()
        sequences[row], listed = ids, ids.tolist()
        for i in members:
            text, token = prompts.text(i), prompts.prompt(i)[1]
            # The text of tokens grows with each: search for the last one at which it is as long as the prompt.
            end = bisect.bisect_right(range(len(ids)), len(text), key=lambda j: len(decode(listed[: j + 1]))) - 1
            # A token that is a part of a character has no text of its own.
            if token.strip("\ufffd") and end >= 0 and decode(listed[: end + 1]) == text:
                position[i] = end
    return position, sequences


def _check_vocabulary(prompts: Provenance, model: HookedModel) -> None:
    largest = max(int(sequence.max()) for sequence in prompts.sequences.values())
    if largest >= model.cfg.d_vocab:
        raise ValueError(
            f"these atoms have the token {largest}, but {model.cfg.model_name} has {model.cfg.d_vocab} tokens: they "
            "belong to another tokenizer, and the dictionary does not say which"
        )
    if prompts.tokenizer_digest is None and model.tokenizer is not None:
        warnings.warn(
            f"this itda does not say which tokenizer its tokens belong to: they are read as those of "
            f"{model.cfg.model_name}",
            stacklevel=3,
        )
