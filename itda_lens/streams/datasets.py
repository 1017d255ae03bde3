"""Text from anywhere: a dataset, a list, a table, a generator, local files or a name on the hub."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
from datasets import Dataset, IterableDataset, load_dataset
from datasets.iterable_dataset import ExamplesIterable

from itda_lens.streams.columns import MASK_COLUMN, describe, find_column, is_missing
from itda_lens.streams.files import is_local, open_files

AnyDataset: TypeAlias = Dataset | IterableDataset | Mapping[str, Any] | Iterable[Any]
"""A dataset, several splits of one by name, or texts and rows one after the other (a list, a generator, a table)."""


def load_text(
    source: AnyDataset | str | Path,
    *,
    split: str = "train",
    column: str | None = None,
    streaming: bool = True,
    config: str | None = None,
    revision: str | None = None,
) -> Dataset | IterableDataset:
    """A dataset of one column, `text`, `tokens` or `messages`, and the `attention_mask` of tokens, if there is one.

    Args:
        source: a `datasets` object; texts, or rows (dicts), in a list, a generator or any other iterable; a pandas
            table; a text file (documents are its paragraphs), JSON, JSON lines, CSV, TSV or Parquet file, or `.gz` of
            these; a pattern (`data/*.jsonl`) or a folder of such files; a folder written by `save_to_disk`; or the
            name of a dataset on the hub. What is read of a generator is kept, since some read the text twice.
        split: which split, where the source has several.
        column: the column with the text, token ids or messages; if not given, the first of `tokens`, `input_ids`,
            `text`, `problem`, `messages`, `conversations`, `conversation` that holds such.
        streaming: do not download a whole dataset of the hub, or read in all files of a folder.
        config: which configuration of a dataset on the hub or in a folder.
        revision: which revision of a dataset on the hub.

    Raises:
        ValueError: no such file, an unknown kind of file, an empty dataset, a missing split or column, a column that
            holds neither text, token ids nor messages.

    Example:
        >>> load_text(Dataset.from_dict({"story": ["Once."]}), column="story")["text"][0]
        'Once.'
        >>> list(load_text(["Once.", "Twice."]))
        [{'text': 'Once.'}, {'text': 'Twice.'}]
    """
    data: Any = _open(source, split, streaming, config, revision)
    if isinstance(data, Mapping):
        if split not in data:
            raise ValueError(f"the dataset has no split {split!r}, only {sorted(data)}")
        data = data[split]
    if not isinstance(data, Dataset | IterableDataset):
        data = _stream(_rows(data))
    rows: Any = data
    try:
        found = find_column(rows, column)
    except ValueError as e:
        raise ValueError(f"{source}: {e}" if isinstance(source, str | Path) else str(e)) from e
    names = [found.name, MASK_COLUMN] if found.kind == "tokens" and found.name != MASK_COLUMN else [found.name]
    known = data.column_names
    if known is None or found.name not in known:
        return _stream(lambda: ({found.kind: row.get(found.name), **_mask(row, names)} for row in rows))
    data = data.select_columns([name for name in names if name in known])
    if found.name != found.kind:
        data = data.rename_column(found.name, found.kind)
    # A copy of the view: SAELens sets a format on what it is given.
    return data.with_format(None)


def _open(source: Any, split: str, streaming: bool, config: str | None, revision: str | None) -> Any:
    remote = isinstance(source, str) and not is_local(source)
    if remote:
        given: dict[str, Any] = {"split": split, "revision": revision, "streaming": streaming}
        return load_dataset(source, config, **given, trust_remote_code=False)
    local = isinstance(source, str | Path)
    if revision is not None or (config is not None and not (local and Path(source).expanduser().is_dir())):
        name = f"revision={revision!r}" if revision is not None else f"config={config!r}"
        raise ValueError(f"{name} is for datasets of the hub, and {source if local else 'this'} is none: leave it out")
    return open_files(str(source), config, streaming) if local else source


def _rows(source: Any) -> Callable[[], Iterator[dict[str, Any]]]:
    """A function that gives the rows of any iterable, each time from the first one on."""
    if isinstance(source, pd.DataFrame):
        return lambda: (dict(zip(source, row, strict=True)) for row in source.itertuples(index=False, name=None))
    if not isinstance(source, Iterable):
        raise ValueError(f"the dataset is a {type(source).__name__}, neither text, rows, a file nor a name")
    again = _Replayed(source) if isinstance(source, Iterator) else source
    return lambda: (_row(i, row) for i, row in enumerate(again))


def _row(i: int, row: Any) -> dict[str, Any]:
    if isinstance(row, Mapping):
        return dict(row)
    if isinstance(row, str) or is_missing(row):
        return {"text": row}
    raise ValueError(f"row {i} is {describe(row)}, neither text nor a dict of columns")


def _mask(row: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: row[name] for name in names[1:] if name in row}


def _stream(rows: Callable[[], Iterator[dict[str, Any]]]) -> IterableDataset:
    # IterableDataset.from_generator would pickle the source, for a name in a cache that is not used.
    return IterableDataset(ExamplesIterable(lambda: enumerate(rows()), {}))


class _Replayed:
    """An iterator that can be read again: what was read of it is kept."""

    def __init__(self, source: Iterator[Any]):
        self._start = source

    def __iter__(self) -> Iterator[Any]:
        self._start, again = itertools.tee(self._start)
        return again
