"""What an activation is made of, in prompts."""

from functools import partial
from typing import Any, NamedTuple, cast

from itda_lens.interpret.decompose import decompose
from itda_lens.metadata import prepends_bos
from itda_lens.provenance import same_tokenizer
from itda_lens.sae import ITDA
from itda_lens.streams import HookedModel, canonical_hooks, check_model, tokenize
from itda_lens.streams.activations import forward


class Term(NamedTuple):
    """One atom's part in an activation."""

    coefficient: float
    atom: int
    before: str
    """The atom's prompt up to its token, with special tokens, but for a BOS that it begins with."""
    token: str
    """The atom's token."""


class Explanation(NamedTuple):
    """An activation as a sum of atoms, the largest first."""

    position: int
    token: str
    terms: list[Term]
    relative_error: float
    """`|x - x_hat|^2 / |x - b|^2`."""


def explain(
    itda: ITDA, model: HookedModel, prompt: str, positions: list[int] | None = None, n_terms: int | None = None
) -> list[Explanation]:
    """Decompose the activations of a prompt's tokens.

    Args:
        itda: a dictionary with provenance.
        model: the model that it belongs to.
        prompt: any text, a rendered chat template too; BOS comes first once, unless the metadata says no.
        positions: which tokens of the prompt, counted with BOS; negative from the end; the last one if not given.
        n_terms: how many atoms to name for each; all of them if not given.

    Raises:
        ValueError: `n_terms` is below 1, the prompt is empty or too long, a position is not in it, the dictionary has
            no prompts, or it belongs to another model or to a hook point that the model does not have.

    Example:
        >>> from itda_lens import BuildConfig, build, embedded
        >>> model, hook = embedded.model(), "blocks.2.hook_resid_post"
        >>> config = BuildConfig(k=8, n_atoms=100, tokens=2000, progress=False)
        >>> itda = build(model, embedded.dataset(), hook, config)[hook]
        >>> [explanation] = explain(itda, model, "Return the number of items", n_terms=5)
        >>> explanation.token, len(explanation.terms)
        (' items', 5)
    """
    if n_terms is not None and n_terms < 1:
        raise ValueError(f"n_terms must be at least 1, got {n_terms}")
    if itda.provenance is None or "text" not in itda.provenance.kinds:
        raise ValueError("this dictionary's atoms have no prompts: build it with a tokenizer")
    metadata: Any = itda.cfg.metadata
    if metadata.hook_name is None:
        raise ValueError("the metadata of this dictionary lacks hook_name: set itda.cfg.metadata.hook_name")
    check_model(metadata, model)
    hooks = canonical_hooks(model, [metadata.hook_name])
    try:
        prompt.encode()
    except UnicodeEncodeError as e:
        raise ValueError(
            f"the prompt holds {prompt[e.start]!r}, half of a character, at {e.start}: leave it out"
        ) from e
    tokens = tokenize(model, prompt, prepend_bos=prepends_bos(metadata))[None]
    length = tokens.shape[1]
    if not prompt or length > model.cfg.n_ctx:
        raise ValueError(f"the prompt has {length} tokens, and {metadata.model_name} takes 1 to {model.cfg.n_ctx}")
    places = [-1] if positions is None else positions
    for place in places:
        if not -length <= place < length:
            raise ValueError(f"position {place} is not among the {length} tokens of the prompt")
    x = forward(model, tokens, hooks, metadata.hook_head_index)[metadata.hook_name][0][places]
    codes, error = decompose(itda, x)
    prompt_of = itda.provenance.prompt
    if itda.provenance.sequences and same_tokenizer(itda.provenance, model.tokenizer):
        prompt_of = partial(itda.provenance.shown, tokenizer=cast(Any, model.tokenizer))
    explanations = []
    for i, place in enumerate(places):
        order = codes.values[i].abs().argsort(descending=True)[:n_terms].tolist()
        terms = [
            Term(float(codes.values[i, j]), atom, *prompt_of(atom))
            for j in order
            if codes.values[i, j] != 0 and (atom := int(codes.indices[i, j])) >= 0
        ]
        token = model.to_string(tokens[0, place : place + 1 or None])
        explanations.append(Explanation(place % length, str(token), terms, float(error[i])))
    return explanations
