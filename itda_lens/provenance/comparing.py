"""By what the atoms of several dictionaries compare."""

import itertools
from collections.abc import Sequence

from itda_lens.provenance.atoms import IdentityKind, Provenance
from itda_lens.provenance.vocabulary import has_added_to, tokenizer_digest


def same_tokenizer(prompts: Provenance, other: object) -> bool:
    """Whether the token ids of some prompts mean the same to a tokenizer, or in other prompts.

    A tokenizer to which tokens were added is the same for prompts that have none of these. Prompts that don't say which
    tokenizer they belong to are taken for those of any tokenizer.

    Args:
        prompts: with tokens.
        other: a tokenizer, or a `Provenance`.

    Example:
        >>> import torch
        >>> from transformers import AutoTokenizer
        >>> from itda_lens import embedded
        >>> tokenizer, more = (AutoTokenizer.from_pretrained(embedded.path()) for _ in range(2))
        >>> more.add_tokens(["<think>"])
        1
        >>> here = torch.zeros(1, dtype=torch.int64)
        >>> prompts = Provenance.from_tokens(here, here + 1, {0: torch.tensor([0, 5])}, tokenizer)
        >>> same_tokenizer(prompts, more)
        True
        >>> same_tokenizer(Provenance.from_tokens(here, here, {0: torch.tensor([2048])}, more), tokenizer)
        False
    """
    own = prompts.vocabulary
    if isinstance(other, Provenance):
        if prompts.tokenizer_digest == other.tokenizer_digest:
            return True
        return own is not None and other.vocabulary is not None and own.agrees(other.vocabulary)
    if prompts.tokenizer_digest in (None, tokenizer_digest(other)):
        return True
    return has_added_to(prompts.tokenizer_digest, other) if own is None else own.is_of(other)


def shared_kind(provenances: Sequence[Provenance]) -> IdentityKind:
    """By what atoms compare: token ids under one tokenizer, else text, else their positions.

    Raises:
        ValueError: there are token ids of different tokenizers alone.
    """
    by_tokens = all(provenance.sequences for provenance in provenances)
    if by_tokens and all(same_tokenizer(a, b) for a, b in itertools.combinations(provenances, 2)):
        return "tokens"
    if all(provenance.prompts for provenance in provenances):
        return "text"
    if by_tokens:
        raise ValueError(
            "the dictionaries hold token ids of different tokenizers, and not all of them texts: build them with their "
            "tokenizers, so that atoms compare by text"
        )
    return "position"
