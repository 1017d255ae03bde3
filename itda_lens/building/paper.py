"""The paper's selection as its released code does it, which differs from its printed Algorithm 1."""

import torch
from torch import Tensor

from itda_lens.building.state import BuildState, Tokens, Units
from itda_lens.pursuit import lengths, matching_pursuit, near_one


def judge_batch(state: BuildState, tokens: Tokens) -> None:
    """Seed with the batch's most frequent activations, then add all of its tokens above the threshold at once.

    Near-duplicates inside a batch are all added, and the result depends on its size. While there are fewer
    atoms than dimensions, the batch's distinct activations come first, those that are held already among them.
    """
    x, dictionary = tokens.x, state.dictionary
    d_in = x.shape[1]
    if dictionary.n < d_in and len(x):
        distinct, inverse, counts = torch.unique(x, dim=0, return_inverse=True, return_counts=True)
        # The sort is not stable, so exact ties are broken as in the released code only by the same call.
        order = torch.sort(counts, descending=True).indices[: d_in - dictionary.n]
        places = torch.arange(len(x), device=x.device)
        first = places.new_full((len(distinct),), len(x)).scatter_reduce(0, inverse, places, "amin")
        _add(state, first[order], tokens, x.new_full((len(x),), float("inf")))
    if len(x) == 0 or state.done:
        return
    units = Units.of(x, state.bias)
    losses = state.losses(units, matching_pursuit(units.x, dictionary.atoms, state.k))
    _add(state, (losses > state.sizing.threshold).nonzero()[:, 0], tokens, losses)
    state.tally.count(losses)


def _add(state: BuildState, chosen: Tensor, tokens: Tokens, losses: Tensor) -> None:
    chosen = chosen[lengths(tokens.x[chosen]) > 0]
    if state.sizing.n_atoms is not None:
        chosen = chosen[: state.sizing.n_atoms - state.dictionary.n]
    atoms, places = torch.nn.functional.normalize(near_one(tokens.x[chosen])[0], dim=-1), chosen.cpu()
    state.dictionary.extend(atoms, tokens.row[places], tokens.position[places], losses[chosen].double().cpu())
    state.tally.added += len(chosen)
