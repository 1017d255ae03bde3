"""Layer matching of models that differ by seed: every measure, from one pass over each model."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

from jaxtyping import Int64
from torch import Tensor

from itda_lens.provenance import Provenance, tokenizer_digest
from itda_lens.similarity.calibration import Calibration, calibrate_all, calibrate_jaccard
from itda_lens.similarity.declaration import MEASURES
from itda_lens.similarity.gathered import Gathered, MatchingConfig
from itda_lens.similarity.jaccard import jaccard
from itda_lens.similarity.layers import layer_similarity
from itda_lens.similarity.linear import debiased_cka_of_moments
from itda_lens.similarity.matching import LayerMatching, Pair
from itda_lens.similarity.moments import PairMoments
from itda_lens.similarity.neighbours import ANCHORS, described, mean_cosine, random_anchors
from itda_lens.similarity.svcca import svcca_of_moments
from itda_lens.streams import Batch, HookedModel, activation_batches, canonical_hooks, load_text
from itda_lens.streams.datasets import AnyDataset

Compare: TypeAlias = Callable[[int, int], float]

GRADED = "graded membership"


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
    gathered = Gathered(len(models), hooks, config)
    for batches in zip(*(_batches(models[name], dataset, names[name], config) for name in models), strict=True):
        gathered.add(batches)
        if gathered.tokens >= config.tokens:
            break
    return _matching(gathered, list(models), hooks, config)


def _matching(gathered: Gathered, models: list[str], hooks: Sequence[str], config: MatchingConfig) -> LayerMatching:
    notes: list[str] = []
    if gathered.tokens < config.tokens:
        notes.append(f"the stream had {gathered.tokens:,} tokens of the {config.tokens:,} asked for")
    layers = {model: range(i * len(hooks), (i + 1) * len(hooks)) for i, model in enumerate(models)}
    samples, profiles, (at_threshold, at_size) = gathered.samples(), gathered.profiles, gathered.dictionaries()
    compare = {
        **_by_moments(gathered),
        **_by_sample(samples, gathered.sampled_atoms([*at_threshold, *at_size]), config),
        **_by_dictionaries(at_threshold, at_size),
        "mean grade alone": _nearness(profiles.profiles(range(len(samples))).mean(dim=1).tolist()),
    }
    matrices: dict[str, dict[Pair, Tensor]] = {}
    for a, b in itertools.product(models, repeat=2):
        rows, columns = layers[a], layers[b]
        for name, of in compare.items():
            matrices.setdefault(name, {})[a, b] = layer_similarity(rows, columns, of)
        for name, less_mean in ((GRADED, True), (f"{GRADED}, mean not taken off", False)):
            matrices.setdefault(name, {})[a, b] = profiles.similarity(rows, columns, less_mean=less_mean)
    calibrations: dict[str, dict[Pair, Calibration]] = {}
    graded = gathered.tokens - config.beginning
    block = min(config.context_size, max(1, graded // 20))  # a short stream has at least twenty blocks, too
    for pair in itertools.combinations(models, 2) if config.permutations else ():
        a, b = (layers[model] for model in pair)
        often = {"permutations": config.permutations, "seed": config.seed}
        found = calibrate_all([samples[i] for i in a], [samples[i] for i in b], list(MEASURES), **often)
        for name, atoms in (("jaccard, equal threshold", at_threshold), ("jaccard, equal size", at_size)):
            sides = [atoms[i] for i in a], [atoms[i] for i in b]
            found[name] = calibrate_jaccard(*sides, gathered.tokens, draws=config.permutations, seed=config.seed)
        found[GRADED] = profiles.calibrate(a, b, block=block, **often)
        for name, calibration in found.items():
            calibrations.setdefault(name, {})[pair] = calibration
    sizes = {model: [len(at_threshold[layer]) for layer in layers[model]] for model in models}
    return LayerMatching(models, list(hooks), gathered.tokens, matrices, calibrations, sizes, notes)


def _by_moments(gathered: Gathered) -> dict[str, Compare]:
    moments = gathered.moments
    measures: dict[str, Callable[[PairMoments], float]] = {
        name: measure.of_moments for name, measure in MEASURES.items() if measure.of_moments is not None
    }
    measures["linear_cka, debiased"] = debiased_cka_of_moments
    measures["svcca, 20 directions"] = partial(svcca_of_moments, directions=20)
    return {name: lambda i, j, of=of: of(moments.pair(i, j)) for name, of in measures.items()}


def _by_sample(samples: list[Tensor], atoms: Int64[Tensor, " a"], config: MatchingConfig) -> dict[str, Compare]:
    steps = MEASURES["mutual_knn"].in_steps
    assert steps is not None
    neighbours = [steps.prepare(x) for x in samples]
    found: dict[str, Compare] = {"mutual_knn": lambda i, j: steps.compare(neighbours[i], neighbours[j])}
    tokens = len(samples[0])
    anchors = {
        "relative": random_anchors(tokens, min(ANCHORS, tokens), config.seed),
        "relative, ITDA anchors": atoms,
    }
    for name, chosen in anchors.items():
        if len(chosen):
            sides = [described(x, chosen) for x in samples]
            found[name] = lambda i, j, sides=sides: mean_cosine(sides[i], sides[j])
    return found


def _by_dictionaries(at_threshold: list[Provenance], at_size: list[Provenance]) -> dict[str, Compare]:
    return {
        "jaccard, equal threshold": lambda i, j: jaccard(at_threshold[i], at_threshold[j]),
        "jaccard, equal size": lambda i, j: jaccard(at_size[i], at_size[j]),
        "size alone, equal threshold": _nearness(list(map(len, at_threshold))),
        "size alone, equal size": _nearness(list(map(len, at_size))),
    }


def _nearness(numbers: Sequence[float] | Sequence[int]) -> Compare:
    """A control: layers are alike whose numbers are."""
    return lambda i, j: -abs(numbers[i] - numbers[j])


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
