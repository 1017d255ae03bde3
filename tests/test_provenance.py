"""Provenance: what it knows, that it survives every cast, and that it refuses what is not its own."""

import zlib
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from itda_lens import ITDA, Provenance, embedded


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
