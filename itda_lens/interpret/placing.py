"""Prompts of one model, found in the tokens of another."""

import bisect
import warnings
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from itda_lens.provenance import Provenance, same_tokenizer
from itda_lens.streams import HookedModel, tokenize

BORDER, CONTEXT, DEGENERATE = "border", "context", "degenerate"


class Placed(NamedTuple):
    """Prompts in the tokens of another model."""

    provenance: Provenance
    """Those that could be placed."""
    source: Int64[Tensor, " m"]
    """Which of the given prompts each is."""
    dropped: dict[str, list[int]]
    """The others: no token of the model ends where the prompt ends, or it is longer than the model's context."""


def place(prompts: Provenance, model: HookedModel, *, prepend_bos: bool = True) -> Placed:
    """Find prompts in the tokens of a model.

    Where the tokenizer is the same (or only one of the two has tokens more, and the prompts none of these), token
    sequences stay as they are. Otherwise the text of each row is tokenised
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
        >>> model = embedded.model()
        >>> prompts = Provenance(torch.tensor([0]), torch.tensor([2]), {0: torch.tensor([0, 5, 6, 7])})
        >>> prompts = prompts.of_tokenizer(model.tokenizer)
        >>> place(prompts, model).provenance.tokens(0)
        [0, 5, 6]
    """
    if prompts.kinds == ("position",):
        raise ValueError(
            "these atoms have neither tokens nor text, so no model can read them: build the dictionary with tokens"
        )
    n_ctx: int = model.cfg.n_ctx
    if prompts.sequences and same_tokenizer(prompts, model.tokenizer):
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
    placed = Provenance(prompts.row[source], position[source], sequences, texts).select(range(len(source)))
    return Placed(placed.of_tokenizer(model.tokenizer), source, dropped)  # select cuts each row after its last prompt


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
        ids = tokenize(model, longest, prepend_bos=prepend_bos)
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
