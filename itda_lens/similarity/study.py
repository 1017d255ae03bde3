"""Layer matching of models that differ by seed: every measure, from one pass over each model."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Int64
from torch import Tensor
from tqdm.auto import tqdm

from itda_lens.provenance import Provenance, tokenizer_digest
from itda_lens.similarity.calibration import Calibration, calibrate_all, calibrate_jaccard
from itda_lens.similarity.declaration import MEASURES, Declaration
from itda_lens.similarity.gathered import Gathered, MatchingConfig
from itda_lens.similarity.jaccard import jaccard
from itda_lens.similarity.linear import debiased_cka_of_moments
from itda_lens.similarity.matching import LayerMatching, Pair
from itda_lens.similarity.moments import LIMIT_GIB, CrossMoments, Held, PairMoments
from itda_lens.similarity.neighbours import described, mean_cosine
from itda_lens.similarity.svcca import svcca_of_moments
from itda_lens.streams import HookedModel, activation_batches, canonical_hooks, load_text
from itda_lens.streams.datasets import AnyDataset
from itda_lens.streams.hooks import hook_widths

Compare: TypeAlias = Callable[[int, int], float]

GRADED = "graded membership"

_VARIANTS = {
    "linear_cka, debiased": MEASURES["linear_cka"]._replace(of_moments=debiased_cka_of_moments, needs=lambda d, e: 4),
    "svcca, 20 directions": MEASURES["svcca"]._replace(of_moments=partial(svcca_of_moments, directions=20)),
}
"""What the table has beside `MEASURES`."""


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

    A measure that needs more tokens than there are at these widths (`svcca` and `linear_regression_r2`: more than
    dimensions) is left out of the table, or of the calibration, which is on the sample. Where second moments of all
    tokens would not fit, linear measures are of the sample. The result's `notes` say so.

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
    widths = [width for name, model in models.items() for width in hook_widths(model, names[name]).values()]
    gathered = Gathered(widths, hooks, config)
    data = load_text(dataset, column=config.column)
    context_size = min(config.context_size, *(model.cfg.n_ctx for model in models.values()))
    streams = [
        activation_batches(model, data, names[name], context_size=context_size, batch_size=config.batch_size)
        for name, model in models.items()
    ]
    with tqdm(total=config.tokens, unit=" tokens", unit_scale=True, disable=not config.progress) as bar:
        for batches in zip(*streams, strict=True):
            gathered.add(batches)
            bar.update(gathered.tokens - bar.n)
            if gathered.tokens >= config.tokens:
                break
    return _matching(gathered, list(models), hooks, config)


def _matching(gathered: Gathered, models: list[str], hooks: Sequence[str], config: MatchingConfig) -> LayerMatching:
    notes: list[str] = []
    if gathered.tokens < config.tokens:
        notes.append(f"the stream had {gathered.tokens:,} tokens of the {config.tokens:,} asked for")
    layers = {model: range(i * len(hooks), (i + 1) * len(hooks)) for i, model in enumerate(models)}
    samples, profiles, (at_threshold, at_size) = gathered.samples(), gathered.profiles, gathered.dictionaries()
    measures = {name: measure.with_seed(config.seed) for name, measure in MEASURES.items()}
    compare = {
        **_by_moments(gathered, samples, measures | _VARIANTS, notes),
        **_by_sample(gathered, samples, measures, notes),
        **_by_anchors(samples, gathered.sampled_atoms([*at_threshold, *at_size])),
        **_by_dictionaries(at_threshold, at_size),
        "mean grade alone": _nearness(profiles.profiles(range(len(samples))).mean(dim=1).tolist()),
    }
    pairs = list(itertools.product(models, models))
    matrices: dict[str, dict[Pair, Tensor]] = {
        name: {pair: torch.empty(len(hooks), len(hooks), dtype=torch.float64) for pair in pairs} for name in compare
    }
    cells = list(itertools.product(pairs, range(len(hooks)), range(len(hooks))))
    for (a, b), i, j in tqdm(cells, desc="comparing", unit=" pairs of layers", disable=not config.progress):
        for name, of in compare.items():  # all of one pair of layers, since they share its moments
            matrices[name][a, b][i, j] = of(layers[a][i], layers[b][j])
    for name, less_mean in ((GRADED, True), (f"{GRADED}, mean not taken off", False)):
        matrices[name] = {(a, b): profiles.similarity(layers[a], layers[b], less_mean=less_mean) for a, b in pairs}
    calibrations: dict[str, dict[Pair, Calibration]] = {}
    graded = gathered.tokens - config.beginning
    block = min(config.context_size, max(1, graded // 20))  # a short stream has at least twenty blocks, too
    known = _possible(measures, gathered, len(samples[0]), "not calibrated", notes) if config.permutations else {}
    for pair in itertools.combinations(models, 2) if config.permutations else ():
        a, b = (layers[model] for model in pair)
        often = {"permutations": config.permutations, "seed": config.seed}
        sides = [samples[i] for i in a], [samples[i] for i in b]
        found = calibrate_all(*sides, list(known), draws_seed=config.seed, progress=config.progress, **often)
        for name, atoms in (("jaccard, equal threshold", at_threshold), ("jaccard, equal size", at_size)):
            sides = [atoms[i] for i in a], [atoms[i] for i in b]
            found[name] = calibrate_jaccard(*sides, gathered.tokens, draws=config.permutations, seed=config.seed)
        found[GRADED] = profiles.calibrate(a, b, block=block, **often)
        for name, calibration in found.items():
            calibrations.setdefault(name, {})[pair] = calibration
    sizes = {model: [len(at_threshold[layer]) for layer in layers[model]] for model in models}
    return LayerMatching(models, list(hooks), gathered.tokens, matrices, calibrations, sizes, notes)


def _possible(
    measures: Mapping[str, Declaration], gathered: Gathered, tokens: int, otherwise: str, notes: list[str]
) -> dict[str, Declaration]:
    """The measures that this many tokens suffice for; of each other one a note."""
    possible: dict[str, Declaration] = {}
    for name, measure in measures.items():
        needed = max(measure.needs(d, e) for d, e in itertools.product(set(gathered.widths), repeat=2))
        if needed <= tokens:
            possible[name] = measure
        else:
            notes.append(
                f"{name} is {otherwise}: it needs {needed:,} tokens at these widths, and has {tokens:,} "
                f"(tokens={gathered.tokens:,}, sample={gathered.config.sample:,})"
            )
    return possible


def _by_moments(
    gathered: Gathered, samples: list[Tensor], measures: Mapping[str, Declaration], notes: list[str]
) -> dict[str, Compare]:
    moments, tokens, held = gathered.moments, gathered.tokens, list[Held]()
    if moments is None:
        tokens, held = len(samples[0]), [Held.of(x) for x in samples]
        notes.append(
            f"linear measures are of the {tokens:,} sampled tokens: moments of all would take "
            f"{CrossMoments.gib(gathered.widths):.1f} GiB, and {LIMIT_GIB} GiB is the limit. Name fewer hooks for more"
        )

    @lru_cache(maxsize=1)
    def pair(i: int, j: int) -> PairMoments:
        return held[i].beside(held[j]) if moments is None else moments.pair(i, j)

    found: dict[str, Compare] = {}
    linear = {name: measure for name, measure in measures.items() if measure.of_moments is not None}
    for name, measure in _possible(linear, gathered, tokens, "left out", notes).items():
        of: Any = measure.of_moments
        found[name] = lambda i, j, of=of: of(pair(i, j))
    return found


def _by_sample(
    gathered: Gathered, samples: list[Tensor], measures: Mapping[str, Declaration], notes: list[str]
) -> dict[str, Compare]:
    found: dict[str, Compare] = {}
    others = {name: measure for name, measure in measures.items() if measure.of_moments is None}
    for name, measure in _possible(others, gathered, len(samples[0]), "left out", notes).items():
        prepare, _, compare = measure.steps
        sides = [prepare(x) for x in samples]
        found[name] = lambda i, j, compare=compare, sides=sides: compare(sides[i], sides[j])
    return found


def _by_anchors(samples: list[Tensor], atoms: Int64[Tensor, " a"]) -> dict[str, Compare]:
    if len(atoms) == 0:
        return {}
    sides = [described(x, atoms) for x in samples]
    return {"relative, ITDA anchors": lambda i, j: mean_cosine(sides[i], sides[j])}


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
    if not 2 <= config.sample <= config.tokens:
        raise ValueError(f"sample={config.sample} must be between 2 and tokens={config.tokens}")
    for name, least in (("permutations", 0), ("seed", 0), ("context_size", 2), ("batch_size", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")
