"""Effects and p-values mean what they say."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch

from itda_lens import Provenance
from itda_lens.similarity import MEASURES, MembershipProfiles, calibrate, calibrate_jaccard, linear_cka, mutual_knn
from itda_lens.similarity.calibration import calibrate_all


def layers(seed: int, *, shared: float, tokens: int = 120, count: int = 3) -> tuple[list[torch.Tensor], ...]:
    g = torch.Generator().manual_seed(seed)
    cause = torch.randn(tokens, 5, generator=g)
    made = [shared * cause + torch.randn(tokens, 5, generator=g) for _ in range(2 * count)]
    return made[:count], made[count:]


@pytest.mark.parametrize("name", MEASURES)
def test_a_declared_measure_is_calibrated_like_a_plain_function(name):
    a, b = layers(0, shared=1, tokens=302, count=2)
    fast = calibrate(a, b, name, permutations=5, seed=3)
    plain = calibrate(a, b, lambda x, y: MEASURES[name].compare(x, y), permutations=5, seed=3)
    for one, other in zip(fast, plain, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_chance_is_the_mean_over_permutations_and_effect_the_way_from_it_to_one():
    a, b = layers(0, shared=1)
    found = calibrate(a, b, "linear_cka", permutations=40)
    g = np.random.default_rng(5)
    chance = np.mean([linear_cka(a[1], b[2][g.permutation(120)]) for _ in range(100)])
    assert found.chance[1, 2].item() == pytest.approx(chance, rel=0.15)
    similarity = linear_cka(a[1], b[2])
    assert found.similarity[1, 2].item() == pytest.approx(similarity)
    assert found.effect[1, 2].item() == pytest.approx((similarity - chance) / (1 - chance), rel=0.05)


def test_width_raises_cka_and_not_its_effect():
    g = torch.Generator().manual_seed(0)
    narrow, wide = ([torch.randn(100, d, generator=g) for _ in range(2)] for d in (4, 80))
    results = [calibrate(x[:1], x[1:], permutations=50) for x in (narrow, wide)]
    assert results[1].similarity.item() > results[0].similarity.item() + 0.3
    assert all(abs(r.effect.item()) < 0.05 for r in results)


def test_p_values_are_uniform_without_and_small_with_a_relation():
    false, p = 0, []
    for seed in range(60):
        found = calibrate(*layers(seed, shared=0, tokens=40, count=2), "linear_cka", permutations=19, seed=seed)
        p.append(found.p[0, 0].item())
        false += bool((found.p_adjusted <= 0.05).any())
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.001
    assert false <= scipy.stats.binom.ppf(0.999, 60, 0.05)
    related = calibrate(*layers(0, shared=2), "mutual_knn", permutations=99)
    assert related.p_adjusted.max().item() == pytest.approx(0.01)


def test_adjusted_p_values_are_never_below_those_of_a_cell():
    found = calibrate(*layers(1, shared=0.3), permutations=99)
    assert (found.p_adjusted > found.p).float().mean() > 0.9
    assert calibrate_all(*layers(1, shared=0.3), ["linear_cka"], permutations=99)["linear_cka"].p.equal(found.p)


def atoms(rows: range | list[int]) -> Provenance:
    return Provenance(torch.tensor(list(rows)), torch.zeros(len(rows), dtype=torch.int64))


def test_dictionaries_of_random_tokens_have_no_effect():
    g = np.random.default_rng(0)
    a, b = ([atoms(g.choice(1000, n, replace=False).tolist()) for n in (100, 400)] for _ in range(2))
    found = calibrate_jaccard(a, b, tokens=1000, draws=500)
    assert found.similarity[1, 1] > found.similarity[0, 0] + 0.1
    assert found.effect.abs().max() < 0.05
    assert found.p_adjusted.min() > 0.01
    for i, j in [(0, 0), (0, 1), (1, 1)]:
        shared = scipy.stats.hypergeom(1000, (100, 400)[i], (100, 400)[j]).mean()
        assert found.chance[i, j].item() == pytest.approx(shared / ((100, 400)[i] + (100, 400)[j] - shared), rel=0.05)


def test_dictionaries_that_share_atoms_have_an_effect():
    found = calibrate_jaccard([atoms(range(100))], [atoms(range(60, 160)), atoms(range(100))], tokens=2000)
    assert found.p_adjusted.max() < 0.01
    assert found.effect[0, 1] == 1
    assert 0.1 < found.effect[0, 0] < found.similarity[0, 0] + 1e-6


def test_bad_input_is_refused():
    a, b = layers(0, shared=1)
    with pytest.raises(ValueError, match="permutations must be at least 1"):
        calibrate(a, b, permutations=0)
    with pytest.raises(ValueError, match="no measure 'cka'"):
        calibrate(a, b, "cka")
    with pytest.raises(ValueError, match="tokens=50, but there are 100 atoms"):
        calibrate_jaccard([atoms(range(100))], [atoms(range(100))], tokens=50)


def test_neighbours_of_permuted_tokens_are_those_of_the_permuted_matrix():
    (x,), (y,) = layers(2, shared=1, count=1)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    prepare, permute, compare = MEASURES["mutual_knn"].in_steps
    assert compare(prepare(x), permute(prepare(y), order)) == mutual_knn(x, y[order])


def test_neighbouring_tokens_do_not_make_chance_look_significant():
    """Layers that have nothing to do with each other, whose grades change slowly along the stream."""
    generator = torch.Generator().manual_seed(0)
    layers = torch.randn(4, 3000, 6, generator=generator)
    for t in range(1, 3000):
        layers[:, t] = 0.97 * layers[:, t - 1] + 0.24 * layers[:, t]
    profiles = MembershipProfiles(4, dictionaries=2, atoms=10, k=2, beginning=200)
    profiles.update(list(layers))
    extreme = {
        block: sum(
            not 0.05 < profiles.calibrate([a], [b], permutations=99, block=block).p.item() < 0.95
            for a, b in itertools.combinations(range(4), 2)
        )
        for block in (1, 128)
    }
    assert extreme[1] >= 4
    assert extreme[128] <= 2
