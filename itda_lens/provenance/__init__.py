"""Which prompt and which token each atom is."""

from itda_lens.provenance.atoms import IdentityKind, Provenance
from itda_lens.provenance.comparing import same_tokenizer, shared_kind
from itda_lens.provenance.vocabulary import Tokenizer, Vocabulary, tokenizer_digest

__all__ = [
    "IdentityKind",
    "Provenance",
    "Tokenizer",
    "Vocabulary",
    "same_tokenizer",
    "shared_kind",
    "tokenizer_digest",
]
