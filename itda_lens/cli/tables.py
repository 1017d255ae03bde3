"""Tables for the terminal."""

import re
from collections.abc import Iterable

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Column, Table

from itda_lens.interpret import Explanation

_PROMPT_WIDTH = 56
_NAME_WIDTH = 40


def metrics_table(metrics: pd.DataFrame, *, caption: str | None = None) -> Table:
    headings = (column.replace("_", " ") for column in metrics.columns)
    table = Table(Column("", no_wrap=True), *headings, caption=caption)
    for name, row in metrics.astype(object).iterrows():
        table.add_row(escape(str(name)[-_NAME_WIDTH:]), *map(_number, row))
    return table


def ranked_table(rows: pd.DataFrame, index: str, columns: Iterable[str]) -> Table:
    table = Table(index, *columns, Column("text", no_wrap=True), box=SIMPLE_HEAD)
    for name, row in rows.iterrows():
        values = (f"{row[c]:.3f}" if isinstance(row[c], float) else str(row[c]) for c in columns)
        text = visible(str(row["text"]))[-_PROMPT_WIDTH:]
        table.add_row(*map(escape, (str(name), *values, text)))
    return table


def explanation_table(explanation: Explanation) -> Table:
    token, error = escape(visible(explanation.token)), explanation.relative_error
    title = f"«{token}» at position {explanation.position}, {error:.0%} of its squared norm unexplained"
    table = Table("coefficient", "atom", "its prompt", title=title, title_justify="left", box=SIMPLE_HEAD)
    for term in explanation.terms:
        before, token = visible(term.before)[-_PROMPT_WIDTH:], visible(term.token)
        table.add_row(f"{term.coefficient:+11.2f}", str(term.atom), f"{escape(before)}[b]«{escape(token)}»[/b]")
    return table


def visible(text: str) -> str:
    return re.sub(r" {2,}", " ", text.replace("\n", "↵"))


def _number(value: float | int) -> str:
    if pd.isna(value):
        return ""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.3f}"
