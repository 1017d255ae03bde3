"""The builder against ten slow lines, and the paper's selection against its released behaviour."""

import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from itda_lens import ITDA, DictionaryBuilder, Provenance, matching_pursuit
from itda_lens.building.losses import LOSSES
from itda_lens.building.paths import changed_eager, mark_changed
from itda_lens.pursuit import matching_pursuit_reference

D, K = 24, 4
_KNOWN: dict[tuple, list[int]] = {}


def stream(sequences: int = 40, length: int = 20, d: int = D, seed: int = 0) -> Tensor:
    """Sparse mixtures of fixed directions about a mean, with noise: `[sequences, length, d]`."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(200, d, generator=generator)
    shape = (sequences, length, 200)
    weights = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.03)
    return weights @ directions + 0.05 * torch.randn(sequences, length, d, generator=generator) + 1


def slow_reference(x: Tensor, k: int, threshold: float, loss: str, bias: Tensor) -> list[int]:
    """Judge each row of `[tokens, d]` against every atom before it, one at a time; which rows become atoms."""
    key = (x.sum().item(), k, threshold, loss, bias.sum().item())
    if key in _KNOWN:
        return _KNOWN[key]
    atoms, chosen = x.new_empty(0, x.shape[1]), []
    for i, raw in enumerate(x):
        decoded = matching_pursuit_reference((raw - bias)[None], atoms, k).decode(atoms)[0] if len(atoms) else 0 * raw
        if LOSSES[loss].measure(raw[None], (bias + decoded)[None], bias) > threshold:
            chosen.append(i)
            atoms = torch.cat([atoms, normalize(raw - bias, dim=0)[None]])
    return _KNOWN.setdefault(key, chosen)


def places(itda: ITDA) -> list[tuple[int, int]]:
    assert itda.provenance is not None
    return itda.provenance.identities("position")


def fed(builder: DictionaryBuilder, x: Tensor, cut: int = 1000, **more: Tensor) -> DictionaryBuilder:
    for part in range(0, len(x), cut):
        builder.update(x[part : part + cut], **{name: value[part : part + cut] for name, value in more.items()})
    return builder


@pytest.mark.parametrize("cut", [1, 7, 40])
@pytest.mark.parametrize(
    ("loss", "threshold", "center"),
    [("relative", 0.05, True), ("relative", 0.3, True), ("relative", 0.3, False), ("cosine", 0.02, True),
     ("cosine", 0.1, False), ("paper", 0.004, False)],
)  # fmt: skip
def test_selection_is_sequential_however_the_stream_is_cut(loss, threshold, center, cut):
    x = stream()
    flat = x.flatten(0, 1)
    bias = flat[:100].mean(dim=0) if center else torch.zeros(D)
    expected = slow_reference(flat, K, threshold, loss, bias)
    builder = DictionaryBuilder(D, K, threshold=threshold, loss=loss, center=center, center_tokens=100)
    itda = fed(builder, x, cut).to_itda()
    assert 20 < len(expected) < len(flat)
    assert [row * x.shape[1] + position for row, position in places(itda)] == expected
    torch.testing.assert_close(itda.atoms.data, normalize(flat[expected] - bias, dim=-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(itda.b_dec.data, bias)


def test_many_blocks_and_retries_change_nothing(monkeypatch):
    x = stream(20)
    expected = places(fed(DictionaryBuilder(D, K, threshold=0.1), x).to_itda())
    for block, retry in itertools.product((1, 13, 400), (1, 50)):
        monkeypatch.setattr("itda_lens.building.sequential.BLOCK_TOKENS", block)
        monkeypatch.setattr("itda_lens.building.sequential.RETRY_TOKENS", retry)
        assert places(fed(DictionaryBuilder(D, K, threshold=0.1), x).to_itda()) == expected


def test_a_dictionary_whose_gram_matrix_does_not_fit_is_the_same(monkeypatch):
    x = stream(20)
    expected = places(fed(DictionaryBuilder(D, K, threshold=0.2), x).to_itda())
    monkeypatch.setattr("itda_lens.pursuit.gram._limit", 40_000)
    assert len(expected) > 100
    assert places(fed(DictionaryBuilder(D, K, threshold=0.2), x).to_itda()) == expected


def test_masked_tokens_count_for_nothing_but_keep_their_place():
    x = stream()
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(x.shape[:2], generator=generator) < 0.7
    poisoned = x.masked_fill(~mask[..., None], torch.nan)
    itda = fed(DictionaryBuilder(D, K, threshold=0.2, center_tokens=100), poisoned, 7, mask=mask).to_itda()
    kept = x[mask]
    chosen = slow_reference(kept, K, 0.2, "relative", kept[:100].mean(dim=0))
    assert places(itda) == [tuple(place) for place in mask.nonzero()[chosen].tolist()]
    assert itda.cfg.metadata.itda_build["tokens_judged"] == int(mask.sum())


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_budget_gives_exactly_as_many_atoms_over_the_whole_stream(cut):
    x = stream()
    builder = fed(DictionaryBuilder(D, K, n_atoms=150, tokens=700), x, cut)
    itda = builder.to_itda()
    assert builder.done
    assert itda.cfg.d_sae == 150
    numbers = [row * 20 + position for row, position in places(itda)]
    assert numbers == sorted(numbers)
    assert max(numbers) < 700, "the budget is passed over"
    assert sum(n >= 630 for n in numbers) > 0, "the last tenth of the budget adds atoms"
    record = itda.cfg.metadata.itda_build
    assert record["threshold_history"][-1] == [700, record["threshold"], 150]
    settled = [threshold for tokens, threshold, _ in record["threshold_history"] if 200 < tokens < 650]
    assert max(settled) < 1.5 * min(settled), "the threshold settles"
    whole = fed(DictionaryBuilder(D, K, n_atoms=150, tokens=700), x).to_itda()
    assert places(itda) == places(whole)


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(20, 400), share=st.floats(0.02, 1), cut=st.integers(1, 200), held=st.sampled_from([5, 50, 900])
)
def test_any_budget_gives_exactly_as_many_atoms(tokens, share, cut, held):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(1, tokens + 10, D, generator=generator)
    # Late tokens are easy, so that a threshold that suited the early ones would leave the dictionary too small.
    x[:, tokens // 3 :] = x[:, :1] + 0.03 * torch.randn(1, tokens + 10 - tokens // 3, D, generator=generator)
    n_atoms = max(2, round(share * tokens))
    builder = DictionaryBuilder(D, 2, n_atoms=n_atoms, tokens=tokens, center_tokens=held)
    for part in x.split(cut, dim=1):
        builder.update(part)
    assert builder.done
    assert builder.to_itda().cfg.d_sae == n_atoms


def test_a_stream_that_ends_first_gives_what_there_is_with_a_warning():
    builder = fed(DictionaryBuilder(D, K, n_atoms=100, tokens=5000), stream(4))
    with pytest.warns(UserWarning, match=r"atoms of the 100 asked for: the stream ended after 80 tokens.*more text"):
        assert 20 < builder.to_itda().cfg.d_sae < 80


def test_a_threshold_with_a_size_stops_there():
    x = stream()
    free = places(fed(DictionaryBuilder(D, K, threshold=0.2, center_tokens=100), x).to_itda())
    builder = fed(DictionaryBuilder(D, K, threshold=0.2, n_atoms=50, center_tokens=100), x, 7)
    assert builder.done
    assert places(builder.to_itda()) == free[:50]
    limited = fed(DictionaryBuilder(D, K, threshold=0.2, tokens=300, center_tokens=100), x, 7)
    whole = places(fed(DictionaryBuilder(D, K, threshold=0.2, center_tokens=100), x).to_itda())
    assert places(limited.to_itda()) == [place for place in whole if place[0] * 20 + place[1] < 300]


def test_all_zero_activations_and_duplicates_never_become_atoms():
    x = stream(10)
    x[2, 3] = x[5, 5] = 0
    x[7] = x[1]
    itda = fed(DictionaryBuilder(D, K, n_atoms=150, tokens=200), x).to_itda()
    assert not {(2, 3), (5, 5)} & set(places(itda))
    exact = fed(DictionaryBuilder(D, K, threshold=0.0), x).to_itda()
    assert not {(2, 3), (5, 5)} & set(places(exact))
    assert not {row for row, _ in places(exact)} & {7}


def test_trailing_dimensions_are_flattened():
    x = stream()
    heads = fed(DictionaryBuilder(D, K, threshold=0.3, center_tokens=100), x.unflatten(-1, (4, 6))).to_itda()
    assert torch.equal(
        heads.atoms.data, fed(DictionaryBuilder(D, K, threshold=0.3, center_tokens=100), x).to_itda().atoms.data
    )


def test_a_saved_state_goes_on_as_if_nothing_had_happened(tmp_path):
    x, tokens = stream(), torch.arange(800).view(40, 20)
    for sizes, split in [({"threshold": 0.2}, 3), ({"threshold": 0.2}, 20), ({"n_atoms": 100, "tokens": 600}, 15)]:
        straight = DictionaryBuilder(D, K, center_tokens=100, **sizes)
        straight.update(x, tokens)
        builder = DictionaryBuilder(D, K, center_tokens=100, **sizes)
        builder.update(x[:split], tokens[:split])
        torch.save(builder.state_dict(), tmp_path / "state.pt")
        resumed = DictionaryBuilder(D, K, center_tokens=100, **sizes)
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        resumed.update(x[split:], tokens[split:])
        before, after = straight.to_itda(), resumed.to_itda()
        assert places(after) == places(before)
        assert torch.equal(after.atoms.data, before.atoms.data)
        assert after.provenance.identities("tokens") == before.provenance.identities("tokens")
        record, expected = after.cfg.metadata.itda_build, before.cfg.metadata.itda_build
        assert record["tokens_judged"] == expected["tokens_judged"]
        assert record["threshold"] == pytest.approx(expected["threshold"])
        histories = [torch.tensor(r.get("threshold_history", [])) for r in (record, expected)]
        torch.testing.assert_close(*histories)
    other = DictionaryBuilder(D, K + 1, threshold=0.2)
    with pytest.raises(ValueError, match="saved builder has k=4, this one k=5"):
        other.load_state_dict(builder.state_dict())


def test_an_itda_can_be_made_on_the_way_without_a_trace():
    x = stream()
    watched, plain = (DictionaryBuilder(D, K, n_atoms=100, tokens=700, center_tokens=300) for _ in range(2))
    for part in x.split(9):
        watched.update(part)
        plain.update(part)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert 5 < watched.to_itda().cfg.d_sae <= 100
    assert places(watched.to_itda()) == places(plain.to_itda())


def test_building_goes_on_from_a_dictionary():
    x, tokens = stream(), torch.arange(800).view(40, 20)
    first = DictionaryBuilder(D, K, threshold=0.2, center_tokens=100)
    first.update(x[:20], tokens[:20])
    start = first.to_itda({"hook_name": "blocks.0.hook_resid_post"})
    more = DictionaryBuilder.from_itda(start, threshold=0.2)
    more._rows_seen = 20  # the first rows of the second half would otherwise follow the last row that has an atom
    more.update(x[20:], tokens[20:])
    straight = DictionaryBuilder(D, K, threshold=0.2, center_tokens=100)
    straight.update(x, tokens)
    after, expected = more.to_itda(), straight.to_itda()
    assert places(after) == places(expected)
    assert after.provenance.identities("tokens") == expected.provenance.identities("tokens")
    assert after.cfg.metadata.hook_name == "blocks.0.hook_resid_post"
    grown = fed(DictionaryBuilder.from_itda(start, n_atoms=start.cfg.d_sae + 30, tokens=400), x[20:]).to_itda()
    assert grown.cfg.d_sae == start.cfg.d_sae + 30
    torch.testing.assert_close(grown.atoms.data[: start.cfg.d_sae], start.atoms.data)
    with pytest.raises(ValueError, match="k must be a whole number of at least 1, got 0"):
        DictionaryBuilder.from_itda(start, k=0, threshold=0.2)
    positive = ITDA.from_atoms(start.atoms.data, K, nonnegative=True)
    with pytest.raises(ValueError, match="nonnegative=True"):
        DictionaryBuilder.from_itda(positive, threshold=0.2)
    with pytest.raises(ValueError, match=r"n_atoms=10 counts the \d+ atoms that the dictionary has already"):
        DictionaryBuilder.from_itda(start, n_atoms=10, tokens=400)


def paper_reference(batches: list[Tensor], k: int, threshold: float) -> list[tuple[int, int]]:
    """The selection of the paper's released code, from its description: labels (row, position) in order."""
    d = batches[0].shape[-1]
    atoms, labels, first_row = torch.empty(0, d), [], 0
    for batch in batches:
        flat = batch.flatten(0, 1)
        if len(atoms) < d:
            unique, counts = torch.unique(flat, dim=0, return_counts=True)
            seeds = unique[torch.sort(counts, descending=True).indices][: d - len(atoms)]
            atoms = torch.cat([atoms, seeds / seeds.norm(dim=-1, keepdim=True)])
            labels += [next(i for i, token in enumerate(flat) if torch.equal(token, seed)) for seed in seeds]
        x_hat = matching_pursuit_reference(flat, atoms, k).decode(atoms)
        loss = (flat / flat.norm(dim=-1, keepdim=True) - x_hat / x_hat.norm(dim=-1, keepdim=True)).square().mean(-1)
        worse = (loss > threshold).nonzero()[:, 0]
        atoms = torch.cat([atoms, flat[worse] / flat[worse].norm(dim=-1, keepdim=True)])
        labels += worse.tolist()
        length = batch.shape[1]
        labels = [
            label if isinstance(label, tuple) else (first_row + label // length, label % length) for label in labels
        ]
        first_row += len(batch)
    return labels


@pytest.mark.parametrize("rows", [1, 3, 10])
@pytest.mark.parametrize("threshold", [0.002, 0.01])
def test_paper_mode_is_the_released_code_atom_for_atom(rows, threshold):
    x = stream(40, 10, d=48)
    x[:, 0] = x[0, 0]  # every row begins alike, as BOS does
    x[5] = x[2]
    batches = list(x.split(rows))
    expected = paper_reference(batches, K, threshold)
    builder = DictionaryBuilder.paper(48, K, threshold)
    for batch in batches:
        builder.update(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        itda = builder.to_itda()
    assert sorted(places(itda)) == sorted(expected)
    assert len(expected) > 48
    if rows == 1:
        assert len(batches[0].flatten(0, 1)) < 48, "several batches seed"
    cropped = fed(DictionaryBuilder.paper(48, K, threshold, max_atoms=60), x, rows).to_itda()
    assert set(places(cropped)) == set(expected[:60])


def test_loss_ranges_hold():
    x, x_hat = stream(20).flatten(0, 1), stream(20, seed=3).flatten(0, 1)
    zeros = torch.zeros(D)
    assert LOSSES["relative"].measure(x, x, zeros).max() == 0
    assert LOSSES["relative"].measure(x, zeros.expand_as(x), zeros).sub(1).abs().max() < 1e-6
    torch.testing.assert_close(LOSSES["paper"].measure(x, x_hat, zeros), 2 * (1 - cosine_similarity(x, x_hat)) / D)
    for loss in LOSSES.values():
        assert loss.measure(x, x_hat, zeros).min() >= 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0, "threshold": 0.1}, "k must be a whole number of at least 1, got 0"),
        ({"d_in": 0, "threshold": 0.1}, "d_in must be a whole number"),
        ({}, "give a threshold, or n_atoms together with tokens"),
        ({"n_atoms": 10}, "give a threshold, or n_atoms together with tokens"),
        ({"n_atoms": 3, "tokens": 100}, "k is 4, but the dictionary shall have n_atoms=3"),
        ({"n_atoms": 100, "tokens": 50}, "tokens=50 is a budget too small for n_atoms=100"),
        ({"threshold": 1.0}, r"threshold 1.0 can't be reached.*between 0 and 1"),
        ({"threshold": -0.1}, "can't be reached"),
        ({"threshold": 0.1, "loss": "paper", "center": False}, r"between 0 and 0.0833"),
        ({"threshold": 1.5, "loss": "cosine", "center": False}, "between 0 and 1"),
        ({"threshold": 0.1, "loss": "l2"}, "loss must be one of"),
    ],
)
def test_bad_settings_are_named_before_any_work(settings, message):
    with pytest.raises(ValueError, match=message):
        DictionaryBuilder(**({"d_in": D, "k": K} | settings))


def test_bad_activations_are_named_and_leave_the_builder_as_it_was():
    x = stream()
    builder = fed(DictionaryBuilder(D, K, threshold=0.2), x[:10])
    broken = x[10:20].clone()
    broken[3, 7, 2] = torch.inf
    with pytest.raises(ValueError, match=r"sequence 13 \(number 3 of this call\) at position 7 holds NaN or infinite"):
        builder.update(broken)
    for wrong, message in [
        (x[..., :5], "width 5, but this builder was made for d_in=24"),
        (x[0], r"shape \[sequences, positions, ...\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            builder.update(wrong)
    with pytest.raises(ValueError, match="mask has shape"):
        builder.update(x[:2], mask=torch.ones(2, 19, dtype=torch.bool))
    with pytest.raises(ValueError, match="tokens has shape"):
        builder.update(x[:2], torch.zeros(3, 20, dtype=torch.int64))
    builder.update(x[10:])
    assert places(builder.to_itda()) == places(fed(DictionaryBuilder(D, K, threshold=0.2), x).to_itda())


def test_thresholds_that_all_or_none_passed_are_said():
    x = stream()
    with pytest.warns(UserWarning, match=r"every token became an atom.*losses of 80 tokens were between"):
        fed(DictionaryBuilder(D, 1, threshold=1e-5), x[:4]).to_itda()
    with (
        pytest.warns(UserWarning, match=r"1 of 800 tokens became atoms.*Lower it"),
        pytest.warns(UserWarning, match=r"only 1 atoms were found, fewer than k=4"),
    ):
        fed(DictionaryBuilder(D, K, threshold=0.9999, loss="cosine", center=False), x).to_itda()
    with pytest.raises(ValueError, match="none was given that is not masked"):
        DictionaryBuilder(D, K, threshold=0.1).to_itda()


def test_stats_add_up():
    x = stream()
    builder = DictionaryBuilder(D, K, n_atoms=100, tokens=700, center_tokens=100)
    atoms = 0
    for part in x.split(9):
        stats = builder.update(part)
        atoms += stats.added - stats.dropped
        assert stats.atoms == atoms == builder.n_atoms
        assert stats.done == (stats.tokens == 700)
    assert stats.tokens == 700


def test_provenance_names_the_tokens_of_each_atom():
    x, tokens = stream(), torch.arange(800).view(40, 20)
    builder = DictionaryBuilder(D, K, n_atoms=100, tokens=700)
    builder.update(x, tokens)
    prov = builder.to_itda().provenance
    assert isinstance(prov, Provenance)
    for i, (row, position) in enumerate(prov.identities("position")):
        assert prov.tokens(i) == tokens[row, : position + 1].tolist()


@pytest.mark.parametrize("ended", [False, True], ids=["all steps taken", "left early"])
def test_paths_that_a_new_atom_changes_are_those_that_pursuit_would_change(ended):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=generator, dtype=torch.float64)
    atoms = normalize(torch.randn(21, 8, generator=generator, dtype=torch.float64), dim=-1)
    tolerance = 0.7 if ended else 0.0
    codes = matching_pursuit(x, atoms[:20], 4, tolerance=tolerance)
    after = matching_pursuit(x, atoms, 4, tolerance=tolerance)
    differs = (codes.indices != after.indices).any(-1) | (codes.values != after.values).any(-1)
    assert 0.01 < differs.float().mean() < 0.5
    product, products = x @ atoms[20], atoms[:20] @ atoms[20]
    stale, left = torch.zeros(300, dtype=torch.bool), torch.full((300,), ended)
    mark_changed(stale, product, products, codes, left)
    assert torch.equal(stale, differs)
    assert torch.equal(changed_eager(product, products, codes, left), differs)


def test_a_token_leaves_as_soon_as_it_is_below_the_threshold_and_the_same_atoms_are_chosen(monkeypatch):
    x = stream(20)
    builder = DictionaryBuilder(D, K, threshold=0.3, center_tokens=100)
    stats = builder.update(x)
    whole = LOSSES["relative"]._replace(falls_with_steps=False)
    monkeypatch.setitem(LOSSES, "relative", whole)
    other = DictionaryBuilder(D, K, threshold=0.3, center_tokens=100)
    to_the_end = other.update(x)
    assert places(builder.to_itda()) == places(other.to_itda())
    assert to_the_end.loss < stats.loss < 0.6


def test_the_pursuit_of_an_itda_is_the_builders():
    x = torch.randn(1, 200, 8, generator=torch.Generator().manual_seed(0))
    for builder, orthogonal in (
        (DictionaryBuilder(8, 3, threshold=0.2), True),
        (DictionaryBuilder(8, 3, threshold=0.2, orthogonal=False), False),
        (DictionaryBuilder.paper(8, 3, threshold=0.01), False),
    ):
        builder.update(x)
        itda = builder.to_itda()
        on = DictionaryBuilder.from_itda(itda, threshold=0.2).to_itda()
        assert itda.cfg.orthogonal == on.cfg.orthogonal == orthogonal
