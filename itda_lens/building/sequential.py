"""Exactly sequential selection: each token is judged once, in order, against every atom chosen before it."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from itda_lens.building.kernel import judge_block
from itda_lens.building.paths import mark_changed
from itda_lens.building.state import ROOM, BuildState, Tokens, Units
from itda_lens.pursuit import SparseCodes, gram_fits, in_threads, inner_products
from itda_lens.pursuit.kernel import pursue_rows

BLOCK_TOKENS = 1024
COMPILED_TOKENS = 512
"""Fewer than above: the compiled loop costs less for each call, and more for each atom that a block adds."""
RETRY_TOKENS = 16


def judge_in_order(state: BuildState, tokens: Tokens) -> None:
    """Judge tokens in order and add the atoms that they become to the state, until it is done."""
    start, ordinary = 0, (~tokens.massive).cumsum(0)
    while start < len(tokens.x) and not state.done:
        before = int(ordinary[start - 1]) if start else 0
        due = before + state.sizing.tokens_to_next_step(state.tally.tokens)
        compiled = _is_compiled(state)
        size = COMPILED_TOKENS if compiled else BLOCK_TOKENS
        stop = min(start + size, int(torch.searchsorted(ordinary, due)) + 1, len(tokens.x))
        block = tokens.part(slice(start, stop))
        losses = _judge_compiled(state, block) if compiled else _judge_block(state, block)
        state.tally.count(losses[~block.massive[: len(losses)]])
        if int(ordinary[stop - 1]) > before:
            keep = state.sizing.step(state.tally.tokens, state.dictionary.admission)
            if keep is not None:
                state.tally.dropped += state.dictionary.n - len(keep)
                state.dictionary.keep(keep)
        start = stop


def _is_compiled(state: BuildState) -> bool:
    """Whether the compiled loop can do it: for a loss that pursuit itself knows, with a whole Gram matrix on a CPU."""
    room = state.dictionary.n + COMPILED_TOKENS
    return state.loss.falls_with_steps and state.bias.device.type == "cpu" and gram_fits(room, state.bias.device)


def _judge_compiled(state: BuildState, tokens: Tokens) -> Float[Tensor, " b"]:
    """As `_judge_block`, by the compiled loop: all products first, then one token after the other."""
    dictionary, n, k = state.dictionary, state.dictionary.n, state.k
    units = Units.of(tokens.x, state.bias)
    centered = units.centered
    lengths = centered.norm(dim=-1)
    energy = lengths.double().square()
    usual = (state.scale / units.unit) ** 2
    limit = torch.where(tokens.massive, usual, max(state.sizing.threshold, state.floor) * energy)
    limit.masked_fill_((tokens.x == 0).all(dim=-1), torch.inf)
    left, floor = energy.clone(), limit * ROOM**2
    values, indices = centered.new_zeros(len(centered), k), torch.zeros(len(centered), k, dtype=torch.int64)
    older, gram = centered.new_empty(len(centered), n), dictionary.gram_with_room(len(centered))
    assert gram is not None

    def encode(part: slice) -> None:
        older[part] = inner_products(centered[part], dictionary.atoms)
        if n:
            arrays = (older[part], gram, values[part], indices[part], left[part], floor[part])
            pursue_rows(*(array.numpy() for array in arrays), False)

    in_threads(encode, centered)
    cross = inner_products(centered, centered)
    added = torch.empty(min(len(centered), state.sizing.room(n)), dtype=torch.int64)
    arrays = (older, cross, lengths, limit, floor, values, indices, left, gram)
    judged, count = judge_block(*(array.numpy() for array in arrays), n, added.numpy())
    losses = (left[:judged] / energy[:judged]).clamp(0, 1).where(limit[:judged].isfinite() & (energy[:judged] > 0), 0)
    chosen = added[:count]
    sink = tokens.massive[chosen]
    dictionary.entered(
        centered[chosen] / lengths[chosen, None],
        tokens.row[chosen],
        tokens.position[chosen],
        losses[chosen].masked_fill(sink, torch.inf),
        sink,
    )
    state.tally.added += count
    return losses.float()


def _judge_block(state: BuildState, tokens: Tokens) -> Float[Tensor, " b"]:
    """Encode a block at once; after a new atom, encode again only the tokens whose path it would have changed.

    Returns the losses of the tokens that were judged: all of them, or the first ones where the dictionary is full.
    """
    x, massive, dictionary, threshold = tokens.x, tokens.massive, state.dictionary, state.sizing.threshold
    units = Units.of(x, state.bias)
    products = _Products(units.centered, dictionary.atoms)

    def encode(part: slice) -> tuple[SparseCodes, Tensor]:
        products.fill(part)
        return state.encode(units.part(part), products.of(part), massive[part])

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
            found, losses[again] = state.encode(units.part(again), products.of(again), massive[again])
            codes.values[again], codes.indices[again] = found
            stale[again] = False
            continue
        with_older = products.add(start)
        place = int(tokens.row[start]), int(tokens.position[start])
        dictionary.add(products.atom(start), with_older, *place, float(losses[start]), bool(massive[start]))
        state.tally.added += 1
        start += 1
        if state.sizing.is_full(dictionary.n):
            return losses[:start]
        later = slice(start, None)
        path = SparseCodes(codes.values[later], codes.indices[later])
        mark_changed(stale[later], products.newest(later), with_older, path, losses[later] <= threshold)
    return losses


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
