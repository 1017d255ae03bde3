"""Exactly sequential selection: each token is judged once, in order, against every atom chosen before it."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from itda_lens.building.state import BuildState
from itda_lens.pursuit import SparseCodes

BLOCK_TOKENS = 256
RETRY_TOKENS = 8


def judge_in_order(
    state: BuildState, x: Float[Tensor, "b d"], row: Int64[Tensor, " b"], position: Int64[Tensor, " b"]
) -> None:
    """Judge raw activations in order and add the atoms that they become to the state, until it is done."""
    start = 0
    while start < len(x) and not state.done:
        stop = start + min(BLOCK_TOKENS, state.sizing.tokens_to_next_step(state.tally.tokens))
        _judge_block(state, x[start:stop], row[start:stop], position[start:stop])
        keep = state.sizing.step(state.tally.tokens, state.dictionary.admission)
        if keep is not None:
            state.tally.dropped += state.dictionary.n - len(keep)
            state.dictionary.keep(keep)
        start = stop


def _judge_block(state: BuildState, x: Tensor, row: Tensor, position: Tensor) -> None:
    """Encode a block at once; after a new atom, encode again only the tokens whose path it would have changed."""
    dictionary, k, threshold = state.dictionary, state.k, state.sizing.threshold
    centered = x - state.bias
    codes = dictionary.pursue(centered, k)
    losses = state.losses(x, codes)
    stale = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    start = 0
    while True:
        waiting = ((losses[start:] > threshold) | stale[start:]).nonzero()
        if len(waiting) == 0:
            break
        start += int(waiting[0])
        if stale[start]:
            again = start + stale[start:].nonzero()[:RETRY_TOKENS, 0]
            codes.values[again], codes.indices[again] = dictionary.pursue(centered[again], k)
            losses[again] = state.losses(x[again], SparseCodes(codes.values[again], codes.indices[again]))
            stale[again] = False
            continue
        atom = torch.nn.functional.normalize(centered[start], dim=0)
        products = dictionary.add(atom, int(row[start]), int(position[start]), float(losses[start]))
        state.tally.added += 1
        start += 1
        if state.sizing.is_full(dictionary.n):
            losses = losses[:start]
            break
        later = slice(start, None)
        stale[later] |= _would_win(centered[later] @ atom, products, codes.values[later], codes.indices[later])
    state.tally.count(losses)


def _would_win(
    product: Float[Tensor, " b"],
    products: Float[Tensor, " n"],
    values: Float[Tensor, "b k"],
    indices: Int64[Tensor, "b k"],
) -> Bool[Tensor, " b"]:
    """Tokens at some step of whose recorded path a new atom would have been chosen.

    Args:
        product: inner product of each token with the new atom.
        products: inner products of the older atoms with the new one.
        values: coefficients along the recorded paths.
        indices: atoms along the recorded paths.
    """
    if len(products) == 0:
        return product != 0
    taken = (values * products[indices]).cumsum(dim=-1)
    along = product[:, None] - torch.nn.functional.pad(taken, (1, -1))
    return (along.abs() > values.abs()).any(dim=-1)
