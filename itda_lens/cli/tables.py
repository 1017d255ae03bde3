"""Tables for the terminal."""

import re
from collections.abc import Iterable

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table
from rich.text import Text

from itda_lens.interpret import Explanation
from itda_lens.plain_text import one_line, printable

_PROMPT_WIDTH = 56
_NAME_WIDTH = 40


def metrics_table(metrics: pd.DataFrame, *, caption: str | None = None) -> Table:
    headings = (column.replace("_", " ") for column in metrics.columns)
    table = Table(Column("", no_wrap=True), *headings, caption=caption)
    for name, row in metrics.astype(object).iterrows():
        table.add_row(one_line(str(name)[-_NAME_WIDTH:]), *map(_number, row))
    return table


def ranked_table(rows: pd.DataFrame, index: str, columns: Iterable[str]) -> Table:
    table = Table(index, *columns, Column("text", no_wrap=True), box=SIMPLE_HEAD)
    for name, row in rows.iterrows():
        values = (f"{row[c]:.3f}" if isinstance(row[c], float) else one_line(str(row[c])) for c in columns)
        table.add_row(one_line(str(name)), *values, visible(str(row["text"]))[-_PROMPT_WIDTH:])
    return table


def explanation_table(explanation: Explanation) -> Table:
    token, error = visible(explanation.token), explanation.relative_error
    title = f"«{token}» at position {explanation.position}, {error:.0%} of its squared norm unexplained"
    table = Table("coefficient", "atom", "its prompt", title=title, title_justify="left", box=SIMPLE_HEAD)
    for term in explanation.terms:
        before, token = visible(term.before)[-_PROMPT_WIDTH:], visible(term.token)
        shown = Text.assemble(before, (f"«{token}»", "bold"))
        table.add_row(f"{term.coefficient:+11.2f}", str(term.atom), shown)
    return table


def headed(heading: str, text: str) -> Text:
    return Text.assemble((printable(heading), "bold"), f"  {printable(text)}")


def visible(text: str) -> str:
    return re.sub(r" {2,}", " ", one_line(text))


def _number(value: float | int) -> str:
    if pd.isna(value):
        return ""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.3f}"
