"""Everything that layer matching keeps of the stream, in one pass over each model."""

from collections.abc import Hashable, Iterable, Sequence

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from itda_lens.building import DictionaryBuilder
from itda_lens.provenance import Provenance
from itda_lens.settings import MatchingConfig
from itda_lens.similarity.jaccard import provenance_of
from itda_lens.similarity.membership import MembershipProfiles
from itda_lens.similarity.moments import LIMIT_GIB, CrossMoments
from itda_lens.streams import Batch


class Gathered:
    """What is kept. Layers are numbered model by model.

    Args:
        widths: of each layer.
        hooks: in each model.
        config: sizes.

    Raises:
        ValueError: sizes that don't fit together.
    """

    def __init__(self, widths: Sequence[int], hooks: Sequence[str], config: MatchingConfig):
        self.config, self.tokens = config, 0
        self._hooks, self._rows = list(hooks), 0
        generator = torch.Generator().manual_seed(config.seed)
        self._sampled = torch.zeros(config.tokens, dtype=torch.bool)
        self._sampled[torch.randperm(config.tokens, generator=generator)[: config.sample]] = True
        self.widths = list(widths)
        self._samples: list[list[Tensor]] = [[] for _ in widths]
        self._places: list[Tensor] = []
        self.profiles = MembershipProfiles(
            len(widths),
            dictionaries=config.dictionaries,
            atoms=config.small_atoms,
            k=config.k,
            beginning=config.beginning,
            seed=config.seed,
        )
        self.moments = CrossMoments(widths) if CrossMoments.gib(widths) <= LIMIT_GIB else None
        """Of all tokens; None where they would not fit."""
        self._builders = [self._builders_of(width) for width in widths]

    def add(self, batches: Sequence[Batch]) -> None:
        """The next batch of each model, of the same tokens.

        Raises:
            ValueError: they are not.
        """
        first = batches[0]
        if not all(torch.equal(first.tokens, other.tokens) for other in batches):
            raise ValueError("the models do not read the same tokens: give them one tokenizer and context")
        mask = _first(first.mask, self.config.tokens - self.tokens)
        layers = [batch.activations[hook] for batch in batches for hook in self._hooks]
        flat = [x[mask].float() for x in layers]
        if self.moments is not None:
            self.moments.update(flat)
        self.profiles.update(flat)
        for x, builders in zip(layers, self._builders, strict=True):
            for builder in builders:
                builder.update(x, mask=mask)
        here = self._sampled[self.tokens : self.tokens + len(flat[0])]
        for kept, x in zip(self._samples, flat, strict=True):
            kept.append(x[here])
        row, position = mask.nonzero()[here].T
        self._places.append(torch.stack([row + self._rows, position], dim=1))
        self._rows += len(mask)
        self.tokens += len(flat[0])

    def samples(self) -> list[Tensor]:
        """The activations of the sampled tokens, of each layer."""
        return [torch.cat(kept) for kept in self._samples]

    def dictionaries(self) -> tuple[list[Provenance], list[Provenance]]:
        """Of each layer: at equal threshold, and at equal size."""
        at_threshold, at_size = ([provenance_of(b[i].to_itda()) for b in self._builders] for i in (0, 1))
        return at_threshold, at_size

    def sampled_atoms(self, dictionaries: Iterable[Provenance]) -> Int64[Tensor, " a"]:
        """Which of the sampled tokens are an atom of any of the dictionaries."""
        atoms = set[Hashable]().union(*(dictionary.identity_set("position") for dictionary in dictionaries))
        places = map(tuple, torch.cat(self._places).tolist())
        return torch.tensor([place in atoms for place in places]).nonzero()[:, 0]

    def _builders_of(self, width: int) -> tuple[DictionaryBuilder, DictionaryBuilder]:
        config = self.config
        return (
            DictionaryBuilder(width, config.k, threshold=config.threshold),
            DictionaryBuilder(width, config.k, n_atoms=config.n_atoms, tokens=config.tokens),
        )


def _first(mask: Bool[Tensor, "b s"], tokens: int) -> Bool[Tensor, "b s"]:
    """The mask with its first tokens alone."""
    return mask & (mask.flatten().cumsum(0) <= tokens).view_as(mask)
