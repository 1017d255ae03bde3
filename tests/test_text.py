"""`load_text`: whatever holds text is read alike, and what holds none is named."""

import gzip
import itertools
import json

import pandas as pd
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from itda_lens import BuildConfig, build, embedded
from itda_lens.interpret.prompts import probe
from itda_lens.streams import load_text
from tests.conftest import HOOK

TEXTS = ['One, "two".', "NA", "Three\nlines\nhere.", "研究"]
ROWS = [{"n": i, "text": text, "more": {"any": i} if i else "thing"} for i, text in enumerate(TEXTS)]


def texts(source: object, **how: object) -> list[str]:
    return [row["text"] for row in load_text(source, **how)]


def lines(rows: list[dict], key: str = "text") -> str:
    return "".join(json.dumps({"n": row["n"], key: row["text"]}) + "\n" for row in rows)


@pytest.mark.parametrize(
    "source",
    [
        lambda: TEXTS,
        lambda: tuple(TEXTS),
        lambda: ROWS,
        lambda: iter(ROWS),
        lambda: (text for text in TEXTS),
        lambda: dict.fromkeys(TEXTS).keys(),
        lambda: pd.DataFrame(ROWS),
        lambda: pd.DataFrame(ROWS)["text"],
        lambda: Dataset.from_dict({"text": TEXTS}),
        lambda: Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
        lambda: DatasetDict({"train": Dataset.from_dict({"text": TEXTS}), "test": Dataset.from_dict({"text": ["-"]})}),
        lambda: {"train": TEXTS, "test": ["-"]},
    ],
)
def test_texts_and_rows_of_any_kind_are_read_alike_and_more_than_once(source):
    data = load_text(source())
    for _ in range(2):
        assert [row["text"] for row in data] == TEXTS


def test_files_patterns_and_folders_are_read_alike(tmp_path):
    table = pd.DataFrame(ROWS)[["n", "text"]]
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_csv(tmp_path / "b.csv.gz", index=False)
    table.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines(ROWS))
    with gzip.open(tmp_path / "a.txt.gz", "wt", encoding="utf8") as file:
        file.write("\n\n".join(TEXTS))
    (tmp_path / "bom.txt").write_text("\ufeff" + "\n\n".join(TEXTS), encoding="utf8")
    for name in ("a.csv", "b.csv.gz", "a.tsv", "a.jsonl.gz", "a.txt.gz", "bom.txt"):
        assert texts(str(tmp_path / name)) == texts(tmp_path / name) == TEXTS, name
    for kind in ("jsonl", "parquet"):
        folder = tmp_path / kind
        folder.mkdir()
        for i, part in enumerate((ROWS[:2], ROWS[2:])):
            if kind == "jsonl":
                (folder / f"{i}.jsonl").write_text(lines(part))
            else:
                Dataset.from_dict({"text": [row["text"] for row in part]}).to_parquet(folder / f"{i}.parquet")
        (folder / "README.md").write_text("About these files.")
        assert texts(folder) == texts(folder, streaming=False) == texts(f"{folder}/*.{kind}") == TEXTS
    assert sorted(texts(f"{tmp_path}/*.csv*")) == sorted(2 * TEXTS)
    stories = tmp_path / "stories"
    (stories / "more").mkdir(parents=True)
    for name, text in zip(("a.txt", "b.txt", "more/c.txt"), ("One.\n\nTwo.", "Three.", "Four."), strict=True):
        (stories / name).write_text(text)
    assert texts(stories) == texts(f"{stories}/**/*.txt") == ["One.", "Two.", "Three.", "Four."]


def test_a_folder_has_splits_and_a_home_has_a_tilde(tmp_path, monkeypatch):
    for split in ("train", "test"):
        Dataset.from_dict({"text": [split]}).to_parquet(tmp_path / "data" / f"{split}-0.parquet")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/data") == ["train"]
    assert texts(tmp_path / "data", split="test") == ["test"]
    (tmp_path / "stories").mkdir()
    for split in ("train", "test"):
        (tmp_path / "stories" / f"wiki.{split}.txt").write_text(f"{split}\n\nmore")
    assert texts(tmp_path / "stories") == ["train", "more"]
    assert texts(tmp_path / "stories", split="test") == ["test", "more"]
    with pytest.raises(ValueError, match=r"no split 'valid', only \['test', 'train'\]"):
        load_text(tmp_path / "data", split="valid")


def test_a_generator_without_end_is_read_as_far_as_it_is_needed():
    read = []
    stream = (read.append(i) or f"Return item {i} of the list." for i in itertools.count())
    data = load_text(stream)
    assert isinstance(data, IterableDataset)
    assert [row["text"] for row in itertools.islice(data, 3)] == [f"Return item {i} of the list." for i in range(3)]
    assert len(read) == 3
    assert len(probe(embedded.model(), stream, tokens=50)) == 50
    assert len(read) < 40


def test_a_dictionary_is_the_same_from_a_generator(model):
    config = BuildConfig(k=4, n_atoms=32, tokens=1000, progress=False)
    documents = embedded.dataset()[:60]["text"]
    alike = [build(model, source, HOOK, config)[HOOK] for source in (documents, (text for text in documents))]
    assert alike[0].atoms.equal(alike[1].atoms)


def test_half_a_character_in_a_text_is_read_as_one_that_is_not_known(model):
    broken, whole = ["a\ud800b", "\ud83d\ude00 and so on"], ["a\ufffdb", "\U0001f600 and so on"]
    config = BuildConfig(k=2, n_atoms=8, threshold=0.1, context_size=16, progress=False)
    found, expected = (build(model, [*texts, *TEXTS * 9], HOOK, config)[HOOK] for texts in (broken, whole))
    assert [found.provenance.tokens(i) for i in range(8)] == [expected.provenance.tokens(i) for i in range(8)]
    assert "\ufffd" in found.provenance.text(7)


IDS = [[0, 5, 6], [0, 7, 8]]


@pytest.mark.parametrize(
    "bad", [[3, 4], [["some", "words"], ["more"]], [None, None], [0.5, 1.5], [[0.5], [1.5]], [[], []]]
)
@pytest.mark.parametrize("name", ["tokens", "input_ids"])
def test_columns_that_hold_something_else_are_passed_over(bad, name):
    rows = [{name: value, "text": text} for value, text in zip(bad, TEXTS, strict=False)]
    assert texts(rows) == texts(Dataset.from_list(rows)) == TEXTS[:2]
    with pytest.raises(ValueError, match=rf"(the column |no column .*: ){name!r} holds"):
        load_text(rows, column=name)


def test_the_column_that_is_named_is_the_one_that_is_read():
    rows = [
        {"tokens": ids, "input_ids": ids[::-1], "text": text, "n": 1} for ids, text in zip(IDS, TEXTS, strict=False)
    ]
    for source in (rows, iter(rows), Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        data = load_text(source, column="text")
        assert list(data) == [{"text": text} for text in TEXTS[:2]]
    assert list(load_text(rows)) == list(load_text(rows, column="tokens")) == [{"tokens": ids} for ids in IDS]
    assert list(load_text(rows, column="input_ids")) == [{"tokens": ids[::-1]} for ids in IDS]
    for column, held in [("n", "int"), ("story", "no column 'story', only")]:
        with pytest.raises(ValueError, match=held):
            load_text(rows, column=column)


def test_messages_and_masks_come_along():
    chat = [[{"role": "user", "content": "Hello"}], [{"role": "user", "content": "Bye"}]]
    assert [row["messages"] for row in load_text([{"id": 1, "conversations": messages} for messages in chat])] == chat
    rows = [{"input_ids": ids, "attention_mask": [1, 1, 0]} for ids in IDS]
    for source in (rows, Dataset.from_list(rows)):
        assert [row["attention_mask"] for row in load_text(source)] == [[1, 1, 0]] * 2


def test_columns_that_begin_late_are_found():
    rows = [{"text": None}] * 150 + [{"n": 2}, {"text": "Late."}]
    assert texts(rows)[-1] == "Late."


@pytest.mark.parametrize(
    ("source", "how", "message"),
    [
        ([], {}, "is empty"),
        ([3], {}, "row 0 is int .'3'., neither text nor a dict"),
        ([None, float("nan")], {}, "'text' holds nothing in any of the 2 rows"),
        ([{"text": 3}], {}, "'text' holds int"),
        (
            [{"messages": [{"from": "me", "value": "Hi"}]}],
            {},
            "each with role and content.: 'messages' holds list of dict",
        ),
        (["a"], {"revision": "main"}, "revision='main' is for datasets of the hub, and this is none"),
        (["a"], {"config": "en"}, "config='en' is for datasets of the hub, and this is none"),
        ("nowhere/*.jsonl", {}, r"there is no file or folder nowhere/\*.jsonl"),
    ],
)
def test_what_can_not_be_read_is_named(source, how, message):
    with pytest.raises(ValueError, match=message):
        load_text(source, **how)


def test_files_that_can_not_be_read_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n{"text": \n')
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00One.")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("a.jsonl", r"a\.jsonl can't be read"),
        ("a.txt", r"a\.txt is not UTF-8"),
        ("empty", "a folder without files that end in"),
        (".", r"files of several kinds \(.jsonl, .txt\).*name one kind"),
        ("*", r"files of several kinds \(.jsonl, .txt\).*name one kind"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_text(tmp_path / name)
