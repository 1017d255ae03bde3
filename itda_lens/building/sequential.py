"""Exactly sequential selection: each token is judged once, in order, against every atom chosen before it."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from itda_lens.building.paths import mark_changed
from itda_lens.building.state import BuildState
from itda_lens.pursuit import SparseCodes, in_threads, inner_products

BLOCK_TOKENS = 1024
RETRY_TOKENS = 16


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
    dictionary, threshold = state.dictionary, state.sizing.threshold
    products = _Products(x - state.bias, dictionary.atoms)

    def encode(tokens: slice) -> tuple[SparseCodes, Tensor]:
        products.fill(tokens)
        return state.encode(x[tokens], products.of(tokens))

    parts = in_threads(encode, x)
    codes = SparseCodes(*map(torch.cat, zip(*(codes for codes, _ in parts), strict=True)))
    losses = torch.cat([losses for _, losses in parts])
    stale = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    start = 0
    while True:
        waiting = ((losses[start:] > threshold) | stale[start:]).nonzero()
        if len(waiting) == 0:
            break
        start += int(waiting[0])
        if stale[start]:
            again = start + stale[start:].nonzero()[:RETRY_TOKENS, 0]
            (codes.values[again], codes.indices[again]), losses[again] = state.encode(x[again], products.of(again))
            stale[again] = False
            continue
        with_older = products.add(start)
        dictionary.add(products.atom(start), with_older, int(row[start]), int(position[start]), float(losses[start]))
        state.tally.added += 1
        start += 1
        if state.sizing.is_full(dictionary.n):
            losses = losses[:start]
            break
        later = slice(start, None)
        path = SparseCodes(codes.values[later], codes.indices[later])
        mark_changed(stale[later], products.newest(later), with_older, path, losses[later] <= threshold)
    state.tally.count(losses)


class _Products:
    """The inner products of a block's tokens with the atoms before it (once filled) and with those that it adds."""

    def __init__(self, centered: Float[Tensor, "b d"], atoms: Float[Tensor, "n d"]):
        self._centered, self._lengths = centered, centered.norm(dim=-1)
        self._atoms, self._older = atoms, centered.new_empty(len(centered), len(atoms))
        self._added = centered.new_empty(len(centered), len(centered))
        self._count = 0

    def fill(self, tokens: slice) -> None:
        self._older[tokens] = inner_products(self._centered[tokens], self._atoms)

    def of(self, tokens: slice | Int64[Tensor, " m"]) -> Float[Tensor, "m n"]:
        return torch.cat([self._older[tokens], self._added[: self._count, tokens].T], dim=-1)

    def atom(self, token: int) -> Float[Tensor, " d"]:
        return self._centered[token] / self._lengths[token]

    def add(self, token: int) -> Float[Tensor, " n"]:
        """Take a token among the atoms; returns its products with the older ones, known but for its length."""
        with_older = torch.cat([self._older[token], self._added[: self._count, token]]) / self._lengths[token]
        self._added[self._count] = self._centered @ self.atom(token)
        self._count += 1
        return with_older

    def newest(self, tokens: slice) -> Float[Tensor, " m"]:
        """Products with the atom added last."""
        return self._added[self._count - 1, tokens]
