"""Layer matching of models that differ by seed: every measure, from one pass over each model."""

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from itda_lens.building import DictionaryBuilder
from itda_lens.provenance import Provenance, tokenizer_digest
from itda_lens.similarity.calibration import Calibration, calibrate_all, calibrate_jaccard
from itda_lens.similarity.declaration import MEASURES
from itda_lens.similarity.jaccard import jaccard, provenance_of
from itda_lens.similarity.layers import layer_similarity
from itda_lens.similarity.linear import debiased_cka_of_moments
from itda_lens.similarity.matching import LayerMatching, Pair
from itda_lens.similarity.membership import MembershipProfiles
from itda_lens.similarity.moments import CrossMoments, PairMoments
from itda_lens.similarity.neighbours import described, mean_cosine, random_anchors
from itda_lens.similarity.svcca import svcca_of_moments
from itda_lens.streams import Batch, HookedModel, activation_batches, canonical_hooks, load_text
from itda_lens.streams.datasets import AnyDataset

Compare: TypeAlias = Callable[[int, int], float]

GRADED = "graded membership"
_ANCHORS = 300


@dataclass
class MatchingConfig:
    """How layers are matched."""

    tokens: int = 100_000
    """How many tokens of the stream are used."""
    sample: int = 4096
    """A fixed sample of them, for neighbours, anchors and permutations."""
    n_atoms: int = 1000
    """The size of dictionaries that are compared at equal size."""
    threshold: float = 0.2
    """The loss above which a token becomes an atom, for dictionaries that are compared at equal threshold."""
    k: int = 8
    """L0."""
    dictionaries: int = 24
    """Graded membership is a mean over this many small dictionaries."""
    small_atoms: int = 100
    """Atoms of each of those."""
    beginning: int = 10_000
    """Their atoms are drawn from this many tokens at the beginning."""
    permutations: int = 100
    """How many permutations similarities are calibrated against; 0 for none."""
    context_size: int = 128
    """Tokens in a row."""
    batch_size: int = 32
    """Rows in a forward pass."""
    column: str | None = None
    """The dataset's column with the text, when it is not called text."""
    seed: int = 0
    """Of the sample, of anchors, prompts and permutations."""


def match_layers(
    models: Mapping[str, HookedModel],
    dataset: AnyDataset | str | Path,
    hooks: Sequence[str] | None = None,
    config: MatchingConfig | None = None,
) -> LayerMatching:
    """Match every layer of every model with every layer of every other, by all measures at once.

    All models read the same tokens side by side, once. Second moments, dictionaries and grades grow with the stream;
    activations are kept of a fixed sample alone. Beside the measures of `MEASURES`:

    - `relative, ITDA anchors`: the anchors are the sampled tokens that are an atom of any dictionary.
    - `jaccard, equal threshold` and `jaccard, equal size`.
    - `size alone`: a control that does not look at content: layers are alike whose dictionaries are of like size. At
      equal size it is a draw, and scores `1 / layers`.
    - `graded membership`: see `MembershipProfiles`; and its control `mean grade alone`.

    Args:
        models: two or more, by name, with one tokenizer and the same number of layers.
        dataset: as for `build`.
        hooks: hook points that all models have; the residual stream after each layer if not given.
        config: sizes.

    Raises:
        ValueError: a single model or layer, models of different tokenizers or depth, an unknown hook; all before any
            long work. Or a stream that is too short.

    Example:
        >>> from itda_lens import embedded
        >>> models = {f"seed {seed}": embedded.model(seed) for seed in (0, 1)}
        >>> config = MatchingConfig(tokens=2000, sample=500, n_atoms=200, dictionaries=2, beginning=400, permutations=0)
        >>> found = match_layers(models, embedded.dataset("heldout"), config=config)
        >>> round(found.table().loc["size alone, equal size", "accuracy"].item(), 3)
        0.167
    """
    config = config or MatchingConfig()
    if hooks is None:
        depths = {name: model.cfg.n_layers for name, model in models.items()}
        if len(set(depths.values())) > 1:
            raise ValueError(f"the models have {depths} layers: matching needs as many in each. Or name the hooks")
        hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(next(iter(depths.values()), 0))]
    _check(models, hooks, config)
    names = {name: canonical_hooks(model, hooks) for name, model in models.items()}
    seen = _Seen(models, hooks, config)
    for batches in zip(*(_batches(models[name], dataset, names[name], config) for name in models), strict=True):
        seen.add(batches)
        if seen.tokens >= config.tokens:
            break
    return seen.matching()


class _Seen:
    """Everything that is kept of the stream."""

    def __init__(self, models: Mapping[str, HookedModel], hooks: Sequence[str], config: MatchingConfig):
        self.models, self.hooks, self.config, self.tokens = list(models), list(hooks), config, 0
        generator = torch.Generator().manual_seed(config.seed)
        self._sampled = torch.zeros(config.tokens, dtype=torch.bool)
        self._sampled[torch.randperm(config.tokens, generator=generator)[: config.sample]] = True
        count = len(models) * len(hooks)
        self._samples: list[list[Tensor]] = [[] for _ in range(count)]
        self._places: list[Tensor] = []
        self._rows = 0
        self._profiles = MembershipProfiles(
            count,
            dictionaries=config.dictionaries,
            atoms=config.small_atoms,
            k=config.k,
            beginning=config.beginning,
            seed=config.seed,
        )
        self._moments: CrossMoments | None = None
        self._builders: list[tuple[DictionaryBuilder, DictionaryBuilder]] = []

    def add(self, batches: Sequence[Batch]) -> None:
        first = batches[0]
        if not all(torch.equal(first.tokens, other.tokens) for other in batches):
            raise ValueError("the models do not read the same tokens: give them one tokenizer and context")
        mask = _first(first.mask, self.config.tokens - self.tokens)
        layers = [batch.activations[hook] for batch in batches for hook in self.hooks]
        flat = [x[mask].float() for x in layers]
        if self._moments is None:
            widths = [x.shape[1] for x in flat]
            self._moments = CrossMoments(widths)
            self._builders = [self._builders_of(width) for width in widths]
        self._moments.update(flat)
        self._profiles.update(flat)
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

    def matching(self) -> LayerMatching:
        notes: list[str] = []
        if self.tokens < self.config.tokens:
            notes.append(f"the stream had {self.tokens:,} tokens of the {self.config.tokens:,} asked for")
        samples = [torch.cat(kept) for kept in self._samples]
        at_threshold, at_size = ([provenance_of(b[i].to_itda()) for b in self._builders] for i in (0, 1))
        compare = {
            **self._by_moments(),
            **self._by_sample(samples, [*at_threshold, *at_size]),
            **self._by_dictionaries(at_threshold, at_size),
        }
        matrices: dict[str, dict[Pair, Tensor]] = {}
        for a, b in itertools.product(self.models, repeat=2):
            rows, columns = self._layers(a), self._layers(b)
            for name, of in compare.items():
                matrices.setdefault(name, {})[a, b] = layer_similarity(rows, columns, of)
            matrices.setdefault(GRADED, {})[a, b] = self._profiles.similarity(rows, columns)
            plain = self._profiles.similarity(rows, columns, less_mean=False)
            matrices.setdefault(f"{GRADED}, mean not taken off", {})[a, b] = plain
        sizes = {name: [len(at_threshold[layer]) for layer in self._layers(name)] for name in self.models}
        calibrations = self._calibrations(samples, at_threshold, at_size) if self.config.permutations else {}
        return LayerMatching(self.models, self.hooks, self.tokens, matrices, calibrations, sizes, notes)

    def _by_moments(self) -> dict[str, Compare]:
        assert self._moments is not None
        moments = self._moments
        measures: dict[str, Callable[[PairMoments], float]] = {
            name: measure.of_moments for name, measure in MEASURES.items() if measure.of_moments is not None
        }
        measures["linear_cka, debiased"] = debiased_cka_of_moments
        measures["svcca, 20 directions"] = partial(svcca_of_moments, directions=20)
        return {name: lambda i, j, of=of: of(moments.pair(i, j)) for name, of in measures.items()}

    def _by_sample(self, samples: list[Tensor], dictionaries: list[Provenance]) -> dict[str, Compare]:
        steps = MEASURES["mutual_knn"].in_steps
        assert steps is not None
        neighbours = [steps.prepare(x) for x in samples]
        found: dict[str, Compare] = {"mutual_knn": lambda i, j: steps.compare(neighbours[i], neighbours[j])}
        tokens = len(samples[0])
        anchors = {
            "relative": random_anchors(tokens, min(_ANCHORS, tokens), self.config.seed),
            "relative, ITDA anchors": self._sampled_atoms(dictionaries),
        }
        for name, chosen in anchors.items():
            if len(chosen):
                sides = [described(x, chosen) for x in samples]
                found[name] = lambda i, j, sides=sides: mean_cosine(sides[i], sides[j])
        return found

    def _by_dictionaries(self, at_threshold: list[Provenance], at_size: list[Provenance]) -> dict[str, Compare]:
        grades = self._profiles.profiles(range(len(at_size))).mean(dim=1).tolist()
        return {
            "jaccard, equal threshold": lambda i, j: jaccard(at_threshold[i], at_threshold[j]),
            "jaccard, equal size": lambda i, j: jaccard(at_size[i], at_size[j]),
            "size alone, equal threshold": lambda i, j: -abs(len(at_threshold[i]) - len(at_threshold[j])),
            "size alone, equal size": lambda i, j: -abs(len(at_size[i]) - len(at_size[j])),
            "mean grade alone": lambda i, j: -abs(grades[i] - grades[j]),
        }

    def _calibrations(
        self, samples: list[Tensor], at_threshold: list[Provenance], at_size: list[Provenance]
    ) -> dict[str, dict[Pair, Calibration]]:
        found: dict[str, dict[Pair, Calibration]] = {}
        often = {"permutations": self.config.permutations, "seed": self.config.seed}
        names = [name for name, m in MEASURES.items() if m.of_moments is not None or m.in_steps is not None]
        for pair in itertools.combinations(self.models, 2):
            a, b = (self._layers(model) for model in pair)
            sides = [samples[i] for i in a], [samples[i] for i in b]
            for name, calibration in calibrate_all(*sides, names, **often).items():
                found.setdefault(name, {})[pair] = calibration
            for name, atoms in (("jaccard, equal threshold", at_threshold), ("jaccard, equal size", at_size)):
                sets = [atoms[i] for i in a], [atoms[i] for i in b]
                draws, seed = self.config.permutations, self.config.seed
                found.setdefault(name, {})[pair] = calibrate_jaccard(*sets, self.tokens, draws=draws, seed=seed)
            found.setdefault(GRADED, {})[pair] = self._profiles.calibrate(a, b, **often)
        return found

    def _layers(self, model: str) -> range:
        first = self.models.index(model) * len(self.hooks)
        return range(first, first + len(self.hooks))

    def _sampled_atoms(self, dictionaries: list[Provenance]) -> Int64[Tensor, " a"]:
        """Which of the sampled tokens are an atom of any dictionary."""
        atoms = set[Hashable]().union(*(dictionary.identity_set("position") for dictionary in dictionaries))
        places = map(tuple, torch.cat(self._places).tolist())
        return torch.tensor([place in atoms for place in places]).nonzero()[:, 0]

    def _builders_of(self, width: int) -> tuple[DictionaryBuilder, DictionaryBuilder]:
        config = self.config
        return (
            DictionaryBuilder(width, config.k, threshold=config.threshold),
            DictionaryBuilder(width, config.k, n_atoms=config.n_atoms, tokens=config.tokens),
        )


def _check(models: Mapping[str, HookedModel], hooks: Sequence[str], config: MatchingConfig) -> None:
    if len(models) < 2:
        raise ValueError(f"layers are matched between models, and there is {len(models)}: give at least two")
    if len(hooks) < 2:
        raise ValueError("a single layer can only match itself: name at least two hooks")
    digests = {name: tokenizer_digest(model.tokenizer) for name, model in models.items()}
    if len(set(digests.values())) > 1:
        raise ValueError(
            f"the models have different tokenizers ({digests}), so their activations are not of the same tokens. Build "
            "a dictionary of each with BuildConfig(pack=False), and compare these by jaccard, which goes by text"
        )
    if config.tokens <= config.beginning:
        raise ValueError(
            f"tokens={config.tokens} must be above beginning={config.beginning}: only later tokens are graded"
        )
    if not 0 < config.sample <= config.tokens:
        raise ValueError(f"sample={config.sample} must be between 1 and tokens={config.tokens}")


def _batches(
    model: HookedModel, dataset: AnyDataset | str | Path, hooks: dict[str, str], config: MatchingConfig
) -> Iterator[Batch]:
    return activation_batches(
        model,
        load_text(dataset, column=config.column),
        hooks,
        context_size=min(config.context_size, model.cfg.n_ctx),
        batch_size=config.batch_size,
    )


def _first(mask: Bool[Tensor, "b s"], tokens: int) -> Bool[Tensor, "b s"]:
    """The mask with its first tokens alone."""
    return mask & (mask.flatten().cumsum(0) <= tokens).view_as(mask)
