"""Text of others is only ever text: on a terminal, in a page of Markdown, in a CSV."""

import csv
import io
import re
import unicodedata

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from benchmarks.attack import text as attack
from itda_lens import ITDA, hub
from itda_lens.cli import saving
from itda_lens.cli.tables import explanation_table, headed, metrics_table, ranked_table
from itda_lens.cli.terminal import Terminal
from itda_lens.interpret.explain import Explanation, Term
from itda_lens.plain_text import markdown, one_line, printable, spreadsheet

HARMFUL = ("Cc", "Cf", "Cs", "Zl", "Zp")
SPECIAL = "\x1b\r\n\t\0\x9b\u202e\u2066\u200b\u2028\ud800|`\\<[]#=-+@'\" a"
anything = st.lists(st.sampled_from(SPECIAL) | st.characters(), max_size=12).map("".join)


@given(anything)
@settings(derandomize=True, deadline=None)
def test_what_is_printed_holds_nothing_on_which_a_terminal_acts_and_the_rest_is_as_it_was(text):
    shown = printable(text)
    assert not [c for c in shown if c != "\n" and unicodedata.category(c) in HARMFUL]
    assert printable(shown) == shown, "escapes are plain text"
    assert shown.encode("utf8").decode() == shown
    kept = [c for c in text if unicodedata.category(c)[0] in "LNPSZ" and unicodedata.category(c) not in HARMFUL]
    assert len(shown) >= len(kept)
    if text.isascii() and text.isprintable():
        assert shown == text
    assert "\n" not in one_line(text)


@pytest.mark.parametrize("text", ["naïve café", "日本語", "Привет", "שלום", "🙂", "a\u00a0b\u3000c", "C:\\new\\table"])
def test_text_of_any_language_stays_as_it_is(text):
    assert one_line(text) == text


@given(anything)
@settings(derandomize=True, deadline=None)
def test_in_markdown_it_is_one_literal_span_alone_in_a_cell_in_an_item_and_in_a_heading(text):
    span, read = markdown(text), MarkdownIt("commonmark").enable("table").parse
    for page, around in (("| {} | b |\n|---|---|\n| {} | c |\n", ""), ("- 1: {}\n", "1: "), ("## A {}\n", "A ")):
        parts = [block for block in read(page.format(span, span)) if block.type == "inline"]
        found = [part for block in parts for part in block.children if part.type != "text" or part.content.strip()]
        spans = [part.content for part in found if part.type == "code_inline"]
        literal = one_line(text).replace("|", r"\x7c")
        if literal.strip(" "):
            assert set(spans) == {literal}
        assert len(spans) == (0 if not text else 2 if "|---" in page else 1)
        assert {part.content.strip() for part in found if part.type == "text"} <= {"b", "c", around.strip()}
        assert {part.type for part in found} <= {"code_inline", "text"}


def whole(text: str) -> bool:
    return not any(unicodedata.category(c) == "Cs" for c in text)  # of which pandas takes none


@given(st.lists(anything.filter(whole), min_size=1, max_size=4, unique=True), st.floats(allow_nan=False))
@settings(derandomize=True, deadline=None)
def test_a_csv_gives_the_same_text_back_and_no_formula(tmp_path_factory, texts, number):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    saving.write_csv(pd.DataFrame({"text": pd.Series(texts, dtype=object).array, "x": number}, index=texts), path)
    with path.open(newline="", encoding="utf8") as file:
        rows = list(csv.reader(file))[1:]
    for text, row in zip(texts, rows, strict=True):
        meant = spreadsheet(text).replace("\0", r"\x00")
        assert row[:2] == [meant, meant]
        assert float(row[2]) == number
        assert not row[0].lstrip().startswith(tuple("=+-@"))


def test_a_csv_of_ordinary_text_is_read_by_pandas_as_it_was(tmp_path):
    table = pd.DataFrame({"a": ["x, y", '"z"', "1\n2"], "b": [1, 2, 3], "c": [-0.5, None, 2.5]}, index=["i", "j", "k"])
    saving.write_csv(table, tmp_path / "deep" / "table.csv")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "deep" / "table.csv", index_col=0), table)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["table.csv"]


def test_some_injections_are_inert_in_all_that_prints_or_writes():
    for row in attack.run(0.02, 0):
        assert row["got through"] == 0, row
        assert row["strings"] == 2


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize("name", attack.INJECTIONS)
def test_every_injection_is_inert_in_every_table(name, color):
    text, screen = attack.INJECTIONS[name], io.StringIO()
    console = Terminal(file=screen, width=8000, force_terminal=color)
    frame = pd.DataFrame({"x": [1.5]}, index=pd.Index([text], dtype=object))
    console.print(explanation_table(Explanation(3, text, [Term(1.0, 2, text, text)], 0.1)))
    console.print(metrics_table(frame), headed("Heading", text), text)
    if whole(text):
        console.print(ranked_table(frame.assign(text=text), "row", ["x"]))
    assert attack.fault(screen.getvalue(), one_line(text), tty=color) is None
    shown = re.sub(r"\s", "", one_line(text))
    if shown and len(shown) < 40:
        assert re.sub(r"\s", "", screen.getvalue()).count(shown) >= 4


def test_every_injection_is_inert_in_the_page(built):
    attacks = attack._Attacks.__new__(attack._Attacks)
    attacks.itdas = {"a": built}
    faults = {name: [*attacks.page(text)] for name, text in attack.INJECTIONS.items()}
    assert len(faults) >= 40
    assert not {name: found for name, found in faults.items() if found != [None]}


def test_the_attack_would_see_what_gets_through(monkeypatch, built):
    assert attack.fault("a\x1b[2Jb") == "'\\x1b' was printed"
    assert attack.fault("\x1b[1mbold\x1b[0m", "bold", tty=True) is None
    assert attack.fault("\x1b[1mbold", "other", tty=True) == "the text was changed"
    monkeypatch.setattr(hub, "markdown", str)
    attacks = attack._Attacks.__new__(attack._Attacks)
    attacks.itdas = {"a": built}
    for name in ("Markdown, heading", "Markdown, image", "HTML", "Markdown, cells", "carriage returns, a page"):
        assert [*attacks.page(attack.INJECTIONS[name])] != [None]


def test_the_page_s_front_matter_is_its_own(built):
    itda: ITDA = built.with_k(8)
    itda.cfg.metadata.model_name = "---\nlicense: mit\n---\n"
    page = io.StringIO(hub.readme({"---\na: b": itda}, "someone/---"))
    assert [next(page).strip() for _ in range(5)] == ["---", "library_name: saelens", "tags:", "- itda", "---"]
