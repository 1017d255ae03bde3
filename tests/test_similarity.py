"""Measures keep what they declare, and agree with references written another way."""

import itertools
import time
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from sklearn.cross_decomposition import CCA
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from sklearn.neighbors import NearestNeighbors

from itda_lens import ITDA, Provenance
from itda_lens.similarity import (
    MEASURES,
    CrossMoments,
    jaccard,
    layer_matching_accuracy,
    layer_similarity,
    less_layer_mean,
    linear_cka,
    linear_regression_r2,
    matching_interval,
    mutual_knn,
    procrustes,
    relative,
    svcca,
)

TOKENS = 400


def correlated(tokens: int = TOKENS, widths: tuple[int, int] = (6, 9), seed: int = 0) -> list[torch.Tensor]:
    """Two representations of one latent cause, of unequal variances and with a mean."""
    g = torch.Generator().manual_seed(seed)
    cause = torch.randn(tokens, 4, generator=g, dtype=torch.float64)
    found = []
    for width in widths:
        x = cause @ torch.randn(4, width, generator=g, dtype=torch.float64)
        x += torch.randn(tokens, width, generator=g, dtype=torch.float64)
        found.append(x * torch.linspace(0.5, 2, width) + torch.randn(width, generator=g))
    return found


def transformed(x: torch.Tensor, transform: str, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    square = torch.randn(x.shape[1], x.shape[1], generator=g, dtype=torch.float64)
    if transform == "orthogonal":
        return x @ torch.linalg.qr(square).Q
    if transform == "isotropic scaling":
        return 3.7 * x
    if transform == "invertible linear":
        return x @ square
    if transform == "shift":
        return x + 2 * torch.randn(x.shape[1], generator=g, dtype=torch.float64)
    assert transform == "token permutation"
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(99))]


@pytest.mark.parametrize(
    ("name", "transform"), [(name, transform) for name, m in MEASURES.items() for transform in m.invariant]
)
def test_measures_keep_their_invariances_and_no_others(name, transform):
    measure, (x, y) = MEASURES[name], correlated()
    options = {"anchors": 50} if name == "relative" else {}
    before = measure.compare(x, y, **options)
    new_x, new_y = transformed(x, transform, 1), transformed(y, transform, 2)
    if transform == "token permutation":
        moved = {"both": measure.compare(new_x, new_y, **options)}
        broken = measure.compare(new_x, y, **options)
        assert broken < before - 0.05, "tokens out of step must look less alike"
    else:
        moved = {"first": measure.compare(new_x, y, **options), "both": measure.compare(new_x, new_y, **options)}
    kept = [side for side, value in moved.items() if value == pytest.approx(before, abs=1e-6)]
    assert kept == {"both": list(moved), "first": ["first"], "neither": []}[measure.invariant[transform]]


@pytest.mark.parametrize("name", MEASURES)
def test_measures_have_the_range_and_symmetry_that_they_declare(name):
    measure = MEASURES[name]
    for seed in range(3):
        x, y = correlated(seed=seed)
        value, swapped = measure.compare(x, y), measure.compare(y, x)
        assert measure.range[0] <= value <= measure.range[1]
        assert (value == pytest.approx(swapped, abs=1e-9)) == measure.symmetric
        assert measure.compare(x, x) == pytest.approx(measure.range[1])
        unrelated = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert measure.compare(unrelated, y) < value


@pytest.mark.parametrize("name", [name for name, m in MEASURES.items() if m.of_moments])
def test_measures_from_a_stream_are_the_measures_of_the_whole(name):
    x, y = correlated()
    moments = CrossMoments([6, 9, 6])
    for part in torch.arange(TOKENS).split(77):
        moments.update([x[part], y[part], 1000 + 0.1 * x[part]])
    streamed = MEASURES[name].of_moments
    assert streamed(moments.pair(0, 1)) == pytest.approx(MEASURES[name].compare(x, y), abs=1e-9)
    assert streamed(moments.pair(1, 0)) == pytest.approx(MEASURES[name].compare(y, x), abs=1e-9)
    assert streamed(moments.pair(2, 0)) == pytest.approx(1, abs=1e-6)


def test_linear_cka_is_the_correlation_of_gram_matrices():
    for tokens, widths in ((40, (6, 9)), (12, (20, 30))):
        x, y = (a.numpy() for a in correlated(tokens, widths))
        centering = np.eye(tokens) - 1 / tokens
        k, q = ((centering @ a @ a.T @ centering).ravel() for a in (x, y))
        expected = k @ q / np.sqrt((k @ k) * (q @ q))
        assert linear_cka(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected)


@pytest.mark.parametrize("widths", [(3, 2), (12, 15)])
def test_debiased_cka_is_a_u_statistic(widths):
    """Song et al. 2012, theorem 2: an average over all four different tokens."""
    x, y = (a.numpy() for a in correlated(9, widths))

    def hsic(a, b):
        k, q, total = a @ a.T, b @ b.T, []
        for i, j, s, t in itertools.permutations(range(9), 4):
            total.append(k[i, j] * (q[i, j] + q[s, t] - 2 * q[i, s]))
        return np.mean(total)

    expected = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    assert linear_cka(torch.tensor(x), torch.tensor(y), debiased=True) == pytest.approx(expected)


def test_debiased_cka_of_unrelated_representations_is_near_zero():
    g = torch.Generator().manual_seed(0)
    biased, debiased = [], []
    for _ in range(20):
        x, y = torch.randn(60, 40, generator=g), torch.randn(60, 40, generator=g)
        biased.append(linear_cka(x, y))
        debiased.append(linear_cka(x, y, debiased=True))
    assert min(biased) > 0.3
    assert abs(np.mean(debiased)) < 0.05


def test_procrustes_is_what_scipys_rotation_reaches():
    x, y = (a - a.mean(0) for a in (side.numpy() for side in correlated(widths=(7, 7))))
    rotation, _ = scipy.linalg.orthogonal_procrustes(x, y)
    expected = np.vdot(x @ rotation, y) / np.linalg.norm(x) / np.linalg.norm(y)
    assert procrustes(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected)


def test_regression_is_scikit_learns():
    x, y = (a.numpy() for a in correlated())
    expected = LinearRegression().fit(x, y).score(x, y, sample_weight=None)
    predicted = LinearRegression().fit(x, y).predict(x)
    expected = 1 - ((y - predicted) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert linear_regression_r2(torch.tensor(x), torch.tensor(y)) == pytest.approx(expected)
    plain = LinearRegression(fit_intercept=False).fit(x, y).predict(x)
    expected = 1 - ((y - plain) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert linear_regression_r2(torch.tensor(x), torch.tensor(y), paper_variant=True) == pytest.approx(expected)


def test_a_constant_feature_does_not_disturb_regression():
    x, y = correlated()
    with_constant = torch.cat([x, torch.full((TOKENS, 1), 5.0)], dim=1)
    assert linear_regression_r2(with_constant, y) == pytest.approx(linear_regression_r2(x, y))
    assert svcca(with_constant, y) == pytest.approx(svcca(x, y))


@pytest.mark.parametrize("variance", [0.8, 0.99, 1.0])
def test_svcca_is_scikit_learns_pca_and_cca(variance):
    x, y = correlated()
    reduced = [PCA(None if variance == 1 else variance).fit_transform(a.numpy()) for a in (x, y)]
    n = min(a.shape[1] for a in reduced)
    pairs = CCA(n, scale=False, max_iter=20_000, tol=1e-12).fit(*reduced).transform(*reduced)
    expected = np.mean([scipy.stats.pearsonr(pairs[0][:, i], pairs[1][:, i])[0] for i in range(n)])
    assert svcca(x, y, variance=variance) == pytest.approx(expected, abs=1e-5)


def test_mutual_knn_is_scikit_learns():
    x, y = (a.numpy() for a in correlated(1500))
    found = [NearestNeighbors(n_neighbors=8, metric="cosine").fit(a).kneighbors(return_distance=False) for a in (x, y)]
    expected = np.mean([len(set(a) & set(b)) / 8 for a, b in zip(*found, strict=True)])
    assert mutual_knn(torch.tensor(x), torch.tensor(y), k=8) == pytest.approx(expected)


@pytest.mark.parametrize("center", [True, False])
def test_relative_is_cosines_with_anchors(center):
    sides, anchors = [a.numpy() for a in correlated()], [3, 50, 51, 7]
    described = []
    for a in sides:
        a = a - a.mean(0) if center else a
        described.append(1 - scipy.spatial.distance.cdist(a, a[anchors], "cosine"))
    expected = np.mean([1 - scipy.spatial.distance.cosine(p, q) for p, q in zip(*described, strict=True)])
    found = relative(*map(torch.tensor, sides), anchors=torch.tensor(anchors), center=center)
    assert found == pytest.approx(expected)


def test_relative_takes_its_random_anchors_from_the_seed():
    x, y = correlated()
    assert relative(x, y, anchors=20, seed=3) == relative(x, y, anchors=20, seed=3)
    assert relative(x, y, anchors=20, seed=3) != relative(x, y, anchors=20, seed=4)


def test_paper_variants_are_the_steps_of_the_released_code():
    x, y = correlated(widths=(25, 30))
    a, b = (side.numpy() - side.numpy().mean(0) for side in (x, y))
    unit = [s / np.linalg.norm(s, axis=0) for s in (a, b)]
    expected = np.linalg.norm(unit[0].T @ unit[1]) ** 2
    expected /= np.linalg.norm(unit[0].T @ unit[0]) * np.linalg.norm(unit[1].T @ unit[1])
    assert linear_cka(x, y, paper_variant=True) == pytest.approx(expected)
    rotated = transformed(x, "orthogonal", 1)
    assert linear_cka(rotated, x, paper_variant=True) < 0.95
    assert linear_cka(rotated, x) == pytest.approx(1)

    p, q = (u[:, :20] * s[:20] for u, s, _ in (np.linalg.svd(side, full_matrices=False) for side in (a, b)))
    m = np.linalg.pinv(p.T @ p) @ (p.T @ q) @ np.linalg.pinv(q.T @ q) @ (q.T @ p)
    expected = np.sqrt(np.linalg.eigvalsh(np.tril(m) + np.tril(m, -1).T).clip(0)).mean()
    assert svcca(x, y, paper_variant=True) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", MEASURES)
def test_bad_activations_are_refused(name):
    compare, (x, y) = MEASURES[name].compare, correlated()
    constant = torch.ones(TOKENS, 6) * 0.1
    nan = x.clone()
    nan[5, 2] = torch.nan
    for bad, message in [
        ((x[:-1], y), "399 tokens and y has 400"),
        ((nan, y), "x holds NaN"),
        ((constant, y), "x is the same for every token"),
        ((y, constant), "y is the same for every token"),
        ((x[:1], y[:1]), "1 tokens, and .* needed"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare(*bad)


def test_too_few_tokens_for_a_fit_are_refused():
    x, y = correlated(8)
    with pytest.raises(ValueError, match="8 tokens, and 11 are needed, more than the 9 dimensions"):
        svcca(x, y)
    with pytest.raises(ValueError, match="11 are needed, more than the 9 dimensions of x"):
        linear_regression_r2(y, x)
    assert 0 <= linear_regression_r2(x, y) <= 1
    moments = CrossMoments([6, 9])
    moments.update([x, y])
    with pytest.raises(ValueError, match="8 tokens for 9 dimensions"):
        MEASURES["linear_regression_r2"].of_moments(moments.pair(1, 0))
    for pair in (moments.pair(0, 1), moments.pair(1, 0)):
        with pytest.raises(ValueError, match="8 tokens for 9 dimensions"):
            MEASURES["svcca"].of_moments(pair)
    with pytest.raises(ValueError, match="GiB is the limit"):
        CrossMoments([4096] * 10)


@pytest.mark.parametrize("name", MEASURES)
def test_measures_need_as_many_tokens_as_they_declare(name):
    measure = MEASURES[name]
    for widths in ((6, 14), (14, 6)):
        needed = measure.needs(*widths)
        x, y = correlated(needed, widths)
        assert measure.range[0] <= measure.compare(x, y) <= measure.range[1]
        with pytest.raises(ValueError, match=f"{needed - 1} tokens, and {needed} are needed"):
            measure.compare(x[1:], y[1:])


@pytest.mark.parametrize(
    ("measure", "options", "message"),
    [
        (svcca, {"variance": 0.0}, "variance must be above 0"),
        (mutual_knn, {"k": 0}, "k must be at least 1"),
        (mutual_knn, {"k": 399}, "401 are needed for k=399"),
        (relative, {"anchors": 500}, "500 anchors can't be chosen from 400"),
        (relative, {"anchors": torch.tensor([400])}, "rows from 0 to 399"),
        (linear_cka, {"debiased": True}, None),
    ],
)
def test_bad_options_are_refused(measure, options, message):
    x, y = correlated()
    if message is None:
        with pytest.raises(ValueError, match="3 tokens, and 4 are needed"):
            measure(x[:3], y[:3], **options)
    else:
        with pytest.raises(ValueError, match=message):
            measure(x, y, **options)


def placed(rows: list[int], **more: object) -> Provenance:
    return Provenance(torch.tensor(rows), torch.zeros(len(rows), dtype=torch.int64), **more)


def streamed(texts: list[str], rows: list[int]) -> Provenance:
    """Atoms at the last character of some rows of a stream; a token is a character."""
    sequences = {row: torch.tensor([ord(c) for c in texts[row]]) for row in rows}
    position = torch.tensor([len(texts[row]) - 1 for row in rows])
    prompts = tuple((texts[row][:-1], texts[row][-1]) for row in rows)
    return Provenance(torch.tensor(rows), position, sequences, prompts, "characters")


def test_jaccard_counts_sets():
    assert jaccard(placed([1, 2, 3, 3]), placed([3, 4])) == 1 / 4
    itda = ITDA.from_atoms(torch.eye(3), k=1, provenance=placed([0, 1, 2]))
    assert jaccard(itda, placed([2, 1, 0])) == 1
    assert jaccard(itda, placed([5])) == 0
    with pytest.raises(ValueError, match="no provenance"):
        jaccard(ITDA.from_atoms(torch.eye(3), k=1), itda)


def test_jaccard_uses_the_strongest_identity_that_both_have():
    stream = ["one", "two", "three", "four"]
    a, b = streamed(stream, [0, 1, 2]), streamed(stream[::-1], [1, 2, 3])
    with pytest.warns(UserWarning, match="different streams: of 2 rows that both have atoms of, 0% begin alike"):
        assert jaccard(a, b) == 1
    assert jaccard(a, placed([0, 1])) == 0  # by position: (0, 2) is not (0, 0)
    assert jaccard(a, Provenance(a.row, torch.tensor([2, 2, 3])), kind="position") == 1 / 2
    with pytest.raises(ValueError, match="without a tokenizer and tokens"):
        jaccard(a, placed([0, 1]), kind="text")


def test_jaccard_of_different_streams_is_refused():
    a, b = streamed(["one", "two"], [0, 1]), streamed(["three", "four"], [0, 1])
    with pytest.raises(ValueError, match="of 2 rows that both have atoms of, none begins alike"):
        jaccard(a, b)
    with pytest.warns(UserWarning, match="50% begin alike"):
        assert jaccard(a, streamed(["one", "four"], [0, 1])) == 1 / 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jaccard(a, streamed(["one", "two", "three"], [1, 2])) == 1 / 3
    whole, cut = (
        Provenance(torch.tensor([0]), torch.tensor([position]), {0: ids}, prompts, digest)
        for position, ids, prompts, digest in (
            (4, torch.arange(5), (("café", "s"),), "characters"),
            (3, torch.arange(4), (("caf", "\ufffd"),), "bytes"),
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jaccard(whole, cut) == 0  # the text that ends within a character begins like the other
    others = Provenance(a.row, a.position, a.sequences, (), "words")
    mine = Provenance(a.row, a.position, a.sequences, (), "characters")
    with pytest.raises(ValueError, match="token ids of different tokenizers"):
        jaccard(mine, others)


def test_jaccard_of_large_dictionaries_is_fast():
    n = 16_384
    g = torch.Generator().manual_seed(0)
    sequences = {row: torch.randint(2048, (128,), generator=g) for row in range(2000)}
    sides = []
    for _ in range(2):
        row, position = torch.randint(2000, (n,), generator=g), torch.randint(128, (n,), generator=g)
        prompts = tuple((f"{r} " * int(p), f"{r} ") for r, p in zip(row.tolist(), position, strict=True))
        sides.append(Provenance(row, position, sequences, prompts, "t"))
    started = time.process_time()
    sides[0].identity_set()
    identities = time.process_time() - started
    jaccard(*sides)
    started = time.process_time()
    jaccard(*sides)
    assert identities < 2
    assert time.process_time() - started < 0.5  # ten times the goal: a busy machine must not fail this


def test_layer_similarity_has_a_row_for_each_layer_of_the_first():
    x, y = correlated()
    matrix = layer_similarity([x, y], [y, x, x], "linear_regression_r2")
    expected = [[linear_regression_r2(a, b) for b in (y, x, x)] for a in (x, y)]
    assert torch.allclose(matrix, torch.tensor(expected, dtype=torch.float64))
    sets = [placed([0, 1]), placed([1, 2])]
    assert layer_similarity(sets, sets, jaccard).tolist() == [[1, 1 / 3], [1 / 3, 1]]
    with pytest.raises(ValueError, match="layers 0 and 1: x has 400 tokens and y has 399"):
        layer_similarity([x], [y, y[1:]], linear_cka)
    with pytest.raises(ValueError, match="no measure 'cka', only"):
        layer_similarity([x], [y], "cka")
    with pytest.raises(ValueError, match="0 and 1 layers"):
        layer_similarity([], [y], linear_cka)


def test_layer_matching_accuracy():
    right, wrong = torch.eye(3), torch.eye(3).roll(1, dims=0)
    assert layer_matching_accuracy([right, wrong]) == 0.5
    assert layer_matching_accuracy({("a", "b"): torch.ones(4, 4)}) == 0.25
    half = torch.tensor([[2.0, 2, 1], [1, 2, 2], [0, 1, 0]])
    assert layer_matching_accuracy([half]) == pytest.approx((0.5 + 0.5 + 0) / 3)
    for bad, message in [
        ([], "no matrices"),
        ([torch.ones(1, 1)], "two or more"),
        ([torch.ones(2, 3)], "2 by 3"),
        ([torch.tensor([[1, torch.nan], [0, 1]])], "NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer_matching_accuracy(bad)


def test_the_mean_over_layers_is_taken_off_as_from_vectors():
    g = torch.Generator().manual_seed(0)
    layers = {m: torch.nn.functional.normalize(torch.rand(4, 50, generator=g), dim=1) for m in "ab"}
    matrices = {(p, q): layers[p] @ layers[q].T for p in "ab" for q in "ab"}
    left = {m: torch.nn.functional.normalize(x - x.mean(dim=0), dim=1) for m, x in layers.items()}
    for (p, q), matrix in less_layer_mean(matrices).items():
        assert torch.allclose(matrix, left[p] @ left[q].T, atol=1e-5)
    with pytest.raises(ValueError, match="like the mean of its model"):
        less_layer_mean({("a", "a"): torch.ones(3, 3)})


def test_intervals_are_over_pairs_of_models():
    names = ["a", "b", "c", "d", "e"]
    right, wrong = torch.eye(4), torch.eye(4).roll(1, dims=0)
    matrices = {(p, q): right if {p, q} < {"a", "b", "c"} or p == q else wrong for p in names for q in names}
    found = matching_interval(matrices)
    assert (found.accuracy, found.cells) == (pytest.approx(0.3), 80)
    # Ten pairs of which three are right: the interval is that of a binomial count.
    expected = scipy.stats.binom.ppf([0.025, 0.975], 10, 0.3) / 10
    assert [found.low, found.high] == pytest.approx(expected.tolist(), abs=0.051)
    assert matching_interval(matrices, self_pairs=True).accuracy == pytest.approx((20 * 0.3 + 5) / 25)
    assert matching_interval({("a", "b"): right, ("b", "a"): wrong})[:3] == (0.5, 0.5, 0.5)
