"""Provenance: what it knows, that it survives every cast, and that it refuses what is not its own."""

import json
import tracemalloc
import zlib
from contextlib import suppress
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from itda_lens import ITDA, Provenance, embedded
from itda_lens.interpret.placing import place
from itda_lens.provenance import same_tokenizer, shared_kind
from itda_lens.similarity import jaccard


@pytest.fixture(scope="module")
def tokenizer():
    return embedded.model(0).tokenizer


def provenance(tokenizer, texts: list[str], places: list[tuple[int, int]]) -> Provenance:
    bos = tokenizer.bos_token_id
    sequences = {
        row: torch.tensor([bos, *tokenizer(text, add_special_tokens=False)["input_ids"]])
        for row, text in enumerate(texts)
    }
    row, position = torch.tensor(places).T
    return Provenance.from_tokens(row, position, sequences, tokenizer)


def assert_equal(a: Provenance, b: Provenance) -> None:
    assert torch.equal(a.row, b.row)
    assert torch.equal(a.position, b.position)
    assert a.prompts == b.prompts
    assert a.tokenizer_digest == b.tokenizer_digest
    assert a.kinds == b.kinds
    assert a.vocabulary == b.vocabulary
    if "tokens" in a.kinds:
        assert [a.tokens(i) for i in range(len(a))] == [b.tokens(i) for i in range(len(b))]


TEXTS = ["Return the number of items.", "naïve “quoted” 日本語 🙂 text", "  spaces\n\n and lines"]
PLACES = [(0, 3), (1, 0), (2, 4), (1, 9), (0, 1), (1, 10), (1, 11)]


def test_text_and_tokens_are_what_the_tokenizer_says(tokenizer):
    prov = provenance(tokenizer, TEXTS, PLACES)
    for i in range(len(prov)):
        assert prov.text(i) == tokenizer.decode(prov.tokens(i), skip_special_tokens=True)
        before, token = prov.prompt(i)
        assert before + token == prov.text(i)
        assert len(prov.tokens(i)) == PLACES[i][1] + 1
    assert prov.text(1) == "", "BOS alone has no text"
    assert prov.prompt(0)[1] == tokenizer.decode(prov.tokens(0)[-1:])


def test_identities_follow_the_text_not_the_row(tokenizer):
    a = provenance(tokenizer, ["Return the list", "other"], [(0, 2), (1, 1)])
    b = provenance(tokenizer, ["unrelated", "Return the set"], [(1, 2), (0, 1)])
    for kind in ("text", "tokens"):
        assert a.identities(kind)[0] == b.identities(kind)[0]
        assert len({*a.identities(kind), *b.identities(kind)}) == 3
    assert a.identities("position") == [(0, 2), (1, 1)]


def test_pieces_of_one_character_are_different_atoms(tokenizer):
    pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("研", "究")]
    n = len(pieces[0])
    assert n > 1
    assert len(pieces[1]) == n
    a, b = (provenance(tokenizer, [text], [(0, p + 1) for p in range(n)]) for text in ("研", "究"))
    alike = sum(x == y for x, y in zip(*pieces, strict=True))
    for kind in ("text", "tokens", None):
        assert len(a.identity_set(kind or "text")) == n
        assert jaccard(a, a, kind=kind) == 1
        with pytest.warns(UserWarning, match="different streams"):
            assert jaccard(a, b, kind=kind) == alike / (2 * n - alike)
    assert a.identities()[-1] == provenance(tokenizer, ["-", "研"], [(1, n)]).identities()[0]


def test_under_one_tokenizer_special_tokens_make_a_difference(tokenizer):
    bos, (x, y, *_) = tokenizer.bos_token_id, tokenizer("Return the list", add_special_tokens=False)["input_ids"]
    rows = torch.tensor([0, 1])
    a, b = (
        Provenance.from_tokens(rows, torch.tensor([1, end]), {0: torch.tensor([bos, x]), 1: ids}, tokenizer)
        for end, ids in ((2, torch.tensor([bos, x, y])), (3, torch.tensor([bos, x, bos, y])))
    )
    assert a.prompts == b.prompts
    assert a.shown(1, tokenizer) != b.shown(1, tokenizer)
    assert b.shown(1, tokenizer)[0] == "Return<|endoftext|>"
    with pytest.warns(UserWarning, match="different streams"):
        assert jaccard(a, b) == 1 / 3
    with pytest.warns(UserWarning, match="different streams"):
        assert jaccard(a, b, kind="text") == 1


def extended(*tokens: str):
    tokenizer = AutoTokenizer.from_pretrained(embedded.path())
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def test_a_tokenizer_with_more_tokens_is_the_same_for_the_others(tokenizer):
    more, other = extended("<a>", "<b>"), extended("<c>")
    prov = provenance(tokenizer, TEXTS, PLACES)
    for tokens in (more, other):
        longer = provenance(tokens, TEXTS, PLACES)
        assert longer.tokenizer_digest != prov.tokenizer_digest
        assert same_tokenizer(prov, tokens)
        assert same_tokenizer(longer, tokenizer)
        for a, b in ((prov, longer), (longer, Provenance.from_bytes(prov.to_bytes()))):
            assert same_tokenizer(a, b)
            assert shared_kind([a, b]) == "tokens"
            assert jaccard(a, b) == 1
    with_a, with_c = (provenance(t, ["<a> or <c>"], [(0, 1), (0, 2)]) for t in (more, other))
    assert 2048 in with_a.tokens(1)
    assert same_tokenizer(with_a, more)
    assert same_tokenizer(Provenance.from_bytes(with_a.to_bytes()), more)
    for lacking in (tokenizer, other):
        assert not same_tokenizer(with_a, lacking)
    assert same_tokenizer(with_a, prov)
    assert not same_tokenizer(with_a, with_c)
    assert shared_kind([with_a, with_c]) == "text"


def test_a_tokenizer_with_more_tokens_is_known_from_older_files_too(tokenizer):
    old = replace(provenance(tokenizer, TEXTS, PLACES), vocabulary=None)
    assert same_tokenizer(Provenance.from_bytes(old.to_bytes()), extended("<a>", "<b>"))
    assert same_tokenizer(old, tokenizer)
    assert not same_tokenizer(replace(old, tokenizer_digest="another"), tokenizer)
    assert not same_tokenizer(replace(provenance(tokenizer, TEXTS, PLACES), tokenizer_digest="another"), tokenizer)


def test_prompts_stay_where_they_are_in_a_model_of_an_extended_tokenizer(tokenizer):
    tuned = embedded.model(1)
    tuned.tokenizer = extended("<a>", "<b>")
    prov = provenance(tokenizer, TEXTS, PLACES)
    here = place(replace(prov, prompts=()), tuned).provenance
    assert here.identities("tokens") == prov.identities("tokens")
    assert same_tokenizer(here, tuned.tokenizer)
    back = place(provenance(tuned.tokenizer, TEXTS, PLACES), embedded.model(0)).provenance
    assert back.identities("tokens") == prov.identities("tokens")


@settings(deadline=None, max_examples=25)
@given(
    rows=st.lists(st.integers(0, 10**12), min_size=1, max_size=6, unique=True),
    seed=st.integers(0, 10**6),
    with_tokens=st.booleans(),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bytes_survive_any_cast(rows, seed, with_tokens, dtype):
    generator = torch.Generator().manual_seed(seed)
    sequences = {row: torch.randint(2**40, (12,), generator=generator) for row in rows}
    row = torch.tensor(rows)[torch.randint(len(rows), (20,), generator=generator)]
    position = torch.randint(12, (20,), generator=generator)
    prov = Provenance.from_tokens(row, position, sequences if with_tokens else {})
    packed = prov.to_bytes()
    assert packed.dtype == torch.uint8
    assert_equal(Provenance.from_bytes(packed.to(dtype).to(torch.uint8)), prov)


def test_texts_survive_packing_whatever_the_order(tokenizer):
    prov = provenance(tokenizer, TEXTS, PLACES)
    assert_equal(Provenance.from_bytes(prov.to_bytes()), prov)
    chosen = prov.select([5, 0, 3])
    assert_equal(Provenance.from_bytes(chosen.to_bytes()), chosen)
    assert [chosen.text(i) for i in range(3)] == [prov.text(i) for i in (5, 0, 3)]


def test_packing_writes_each_sequence_once():
    tokens = torch.randint(50_000, (1000,), generator=torch.Generator().manual_seed(0))
    one = Provenance.from_tokens(torch.zeros(1, dtype=torch.int64), torch.tensor([999]), {0: tokens})
    many = Provenance.from_tokens(torch.zeros(1000, dtype=torch.int64), torch.arange(1000), {0: tokens})
    assert len(many.to_bytes()) < len(one.to_bytes()) + 1000 * 4


def test_it_says_what_it_lacks(tokenizer):
    bare = Provenance(torch.tensor([0]), torch.tensor([3]))
    assert bare.kinds == ("position",)
    for call in (lambda: bare.tokens(0), lambda: bare.text(0), lambda: bare.identities("text")):
        with pytest.raises(ValueError, match="built without"):
            call()
    assert provenance(tokenizer, TEXTS, PLACES).kinds == ("text", "tokens", "position")


def test_truncation_anywhere_is_noticed(tokenizer):
    packed = provenance(tokenizer, TEXTS, PLACES).to_bytes()
    for length in range(len(packed)):
        with pytest.raises(ValueError, match="truncated or edited"):
            Provenance.from_bytes(packed[:length])


def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(tokenizer):
    prov = provenance(tokenizer, TEXTS, PLACES)
    packed, unnoticed = prov.to_bytes(), 0
    for i in range(len(packed)):
        edited = packed.clone()
        edited[i] ^= 1 << i % 8
        with suppress(ValueError):
            assert_equal(Provenance.from_bytes(edited), prov)
            unnoticed += 1
    assert unnoticed < 5


def test_what_was_unpacked_edited_and_packed_again_is_a_value_error_or_makes_sense(tokenizer):
    raw = zlib.decompress(provenance(tokenizer, TEXTS, PLACES).to_bytes().numpy().tobytes())
    for i in range(len(raw)):
        edited = bytearray(raw)
        edited[i] ^= 1 << i % 8
        with suppress(ValueError):
            found = Provenance.from_bytes(torch.frombuffer(bytearray(zlib.compress(edited)), dtype=torch.uint8))
            assert len(found.prompts) == len(found) == len([found.tokens(j) for j in range(len(found))])


def test_mismatches_are_refused():
    with pytest.raises(ValueError, match="equally long"):
        Provenance(torch.tensor([0, 1]), torch.tensor([3]))
    with pytest.raises(ValueError, match="atom 1 is at row 0, position 5"):
        Provenance(torch.tensor([0, 0]), torch.tensor([3, 5]), {0: torch.arange(5)})
    with pytest.raises(ValueError, match="names 2 atoms, but the dictionary has 3"):
        ITDA.from_atoms(torch.eye(3), 1, provenance=Provenance(torch.tensor([0, 1]), torch.tensor([0, 0])))


PIECES = st.text(st.characters(exclude_categories=()), max_size=4)  # any character, lone surrogates too


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    texts=st.lists(st.lists(PIECES, min_size=1, max_size=6), min_size=1, max_size=5),
    data=st.data(),
)
def test_prompts_are_what_was_given_however_they_are_made_chosen_and_written(texts, data):
    """Prompts that go on, branch off, repeat and stop early, in any order."""
    places = st.tuples(st.integers(0, len(texts) - 1), st.integers(0, 5))
    at = data.draw(st.lists(places, min_size=1, max_size=12))
    prompts = tuple(("".join(texts[r][:p]), (texts[r][p:] or [""])[0]) for r, p in at)
    row, position = torch.tensor(at).T
    prov = Provenance(row, position, {}, prompts)
    assert prov.prompts == prompts
    assert prompts == prov.prompts
    assert [prov.prompt(i) for i in range(len(at))] == list(prompts) == list(prov.prompts[:])
    assert prov.prompts[-1] == prompts[-1]
    chosen = data.draw(st.lists(st.integers(0, len(at) - 1), min_size=1, max_size=6))
    some = prov.select(chosen)
    assert some.prompts == tuple(prompts[i] for i in chosen)
    for each, expected in ((prov, prov.prompts), (some, some.prompts)):
        again = Provenance.from_bytes(each.to_bytes(), len(each))
        assert again.prompts == expected
        assert Provenance.from_bytes(again.to_bytes()).prompts == expected
    assert prov.prompts != (*prompts[:-1], ("", "of another"))


def bytes_of(n: int, prompts: str, header: dict | None = None, **more: torch.Tensor) -> torch.Tensor:
    """What anyone may write."""
    tensors = {"row": torch.zeros(n, dtype=torch.int64), "position": torch.arange(n)}
    tensors |= dict.fromkeys(("sequence_row", "sequence_end", "sequence"), torch.zeros(0, dtype=torch.int64)) | more
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    raw = safetensors.torch.save(tensors, {"prompts": prompts, "tokenizer_digest": ""} | (header or {}))
    return torch.frombuffer(bytearray(zlib.compress(raw)), dtype=torch.uint8)


def test_prompts_that_share_take_the_memory_of_what_they_do_not_share():
    """A thousand million characters in a file of some 100 kB."""
    n, length = 10_000, 100_000
    letters = torch.randint(97, 123, (length,), generator=torch.Generator().manual_seed(0))
    base = bytes(letters.tolist()).decode()
    packed = bytes_of(n, json.dumps([[0, base, 0], *([length - i, "X", 1] for i in range(n - 1))]))
    tracemalloc.start()
    try:
        prov = Provenance.from_bytes(packed, n)
        assert tracemalloc.get_traced_memory()[1] < 10 * len(packed) + (20 << 20)
    finally:
        tracemalloc.stop()
    for i in (0, 1, 5000, n - 1):
        assert prov.text(i) == (base[: length - i + 1] + "X" if i else base)
    assert prov.prompt(5)[0] == base[:1]


def test_bytes_that_become_too_many_are_refused_before_they_have():
    for packed in (
        zlib.compress(bytes(100 << 20), 1),
        bytes_of(1, "[" * (20 << 20)).numpy().tobytes(),
        bytes_of(2_000_000, "[]", position=torch.zeros(2_000_000, dtype=torch.int64)).numpy().tobytes(),
    ):
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=r"become more than [\d,]+, the most that is taken"):
                Provenance.from_bytes(torch.frombuffer(bytearray(packed), dtype=torch.uint8))
            assert tracemalloc.get_traced_memory()[1] < 10 * len(packed) + (60 << 20)
        finally:
            tracemalloc.stop()


def test_what_compresses_too_well_is_written_so_that_it_can_be_read():
    n = 3_000_000
    prov = Provenance(torch.zeros(1, dtype=torch.int64), torch.tensor([n - 1]), {0: torch.zeros(n, dtype=torch.int64)})
    assert Provenance.from_bytes(prov.to_bytes(), 1).tokens(0) == [0] * n


@pytest.mark.parametrize(
    "prompts",
    [
        *("", "[", "[[0, ", "{}", "null", '"', '[[0, "a"]]', '[["a", 0, 0]]', '[[0, "a", 0], [0, "b", 0]]'),
        *('[[1, "a", 0]]', '[[0, "a", 2]]', '[[-1, "a", 0]]', '[[0, "a", -1]]', '[[0, "a", 1e9]]', '[[0, "\\q", 0]]'),
        *('[[0, "a", 99999999999]]', '[[0, "a", 0]' + " " * 500 + "]", '[[0, "\\ud83d\\u00zz", 0]]'),
    ],
)
def test_prompts_of_another_form_are_a_value_error(prompts):
    with pytest.raises(ValueError, match="can't be read"):
        Provenance.from_bytes(bytes_of(1, prompts), 1)


@pytest.mark.parametrize("lengths", [[2**62, 2**62], [2**63 - 1, 3], [-1, 4], [0, 3], [3, 0], [3, 3], [1, 1]])
def test_sequences_of_other_lengths_are_a_value_error(lengths):
    more = {"sequence_row": torch.arange(2), "sequence_end": torch.tensor(lengths), "sequence": torch.arange(3)}
    with pytest.raises(ValueError, match="other lengths"):
        Provenance.from_bytes(bytes_of(3, "[]", position=torch.zeros(3).long(), **more))


def test_another_number_of_atoms_is_named_before_anything_is_made_of_them():
    with pytest.raises(ValueError, match="the provenance names 7 atoms, but the dictionary has 8"):
        Provenance.from_bytes(bytes_of(7, "no prompts at all"), 8)
    with pytest.raises(ValueError, match="7 rows, 6 positions"):
        Provenance.from_bytes(bytes_of(7, "[]", position=torch.arange(6)), 7)
    rows = torch.arange(9)
    with pytest.raises(ValueError, match="9 sequences"):
        Provenance.from_bytes(bytes_of(7, "[]", sequence_row=rows, sequence_end=rows * 0 + 1, sequence=rows), 7)


def test_a_header_that_is_larger_than_what_is_in_it_is_refused():
    for header in ({"vocabulary": "[" * (5 << 20)}, {"x" * (5 << 20): "y"}):
        with pytest.raises(ValueError, match="can't be read"):
            Provenance.from_bytes(bytes_of(1, "[]", {"tokenizer_digest": "a"} | header))


def test_one_tensor_may_be_given_for_two_things():
    here = torch.arange(3)
    prov = Provenance(here, here, dict.fromkeys(range(3), here))
    assert_equal(Provenance.from_bytes(prov.to_bytes(), 3), prov)
