"""Text from anywhere: a dataset object, a local file, a saved dataset or a name on the hub."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk

TOKEN_COLUMNS = ("tokens", "input_ids")
TEXT_COLUMNS = ("text", "problem")

AnyDataset = Dataset | IterableDataset | Mapping[str, Any]
"""A dataset, or several splits of one by name."""


def load_text(
    source: AnyDataset | str | Path, *, split: str = "train", column: str | None = None, streaming: bool = True
) -> Dataset | IterableDataset:
    """A dataset that has a first row with text or tokens.

    Args:
        source: a `datasets` object; a text file (documents are its paragraphs), JSON, JSON lines or Parquet file;
            a folder written by `save_to_disk`; or the name of a dataset on the hub.
        split: which split, where the source has several.
        column: the column with the text, when it is not called `text`.
        streaming: do not download a whole dataset of the hub.

    Raises:
        ValueError: no such file, an unknown kind of file, an empty dataset, a missing split or column.

    Example:
        >>> load_text(Dataset.from_dict({"story": ["Once."]}), column="story")["text"][0]
        'Once.'
    """
    data = _open(source, split, streaming)
    if isinstance(data, Mapping):
        if split not in data:
            raise ValueError(f"the dataset has no split {split!r}, only {sorted(data)}")
        data = data[split]
    first = next(iter(data), None)
    if first is None:
        raise ValueError(f"the dataset {source if isinstance(source, str | Path) else ''} is empty")
    wanted = (column,) if column else (*TOKEN_COLUMNS, *TEXT_COLUMNS)
    if not any(name in first for name in wanted):
        raise ValueError(f"the dataset has no column {' or '.join(map(repr, wanted))}, only {sorted(first)}: name it")
    if column and column != "text":
        data = data.select_columns([column]).rename_column(column, "text")
    # A copy of the view: SAELens sets a format on what it is given.
    return data.with_format(None)


def _open(source: AnyDataset | str | Path, split: str, streaming: bool) -> AnyDataset:
    if not isinstance(source, str | Path):
        return source
    path = Path(source)
    if path.is_dir():
        if not any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
            raise ValueError(f"{path} is a folder, but not one that datasets' save_to_disk has written")
        return load_from_disk(str(path))  # type: ignore[return-value]
    if path.is_file():
        if path.suffix in (".txt", ".md"):
            paragraphs = re.split(r"\n\s*\n", path.read_text(encoding="utf8"))
            return Dataset.from_dict({"text": [text for text in paragraphs if text.strip()]})
        if path.suffix in (".json", ".jsonl"):
            return Dataset.from_json(str(path))  # type: ignore[return-value]
        if path.suffix == ".parquet":
            return Dataset.from_parquet(str(path))  # type: ignore[return-value]
        raise ValueError(f"{path} has the ending {path.suffix!r}: .txt, .md, .json, .jsonl and .parquet can be read")
    if path.suffix in (".txt", ".md", ".json", ".jsonl", ".parquet") or str(source).startswith((".", "/", "~")):
        raise ValueError(f"there is no file or folder {source}")
    return load_dataset(str(source), split=split, streaming=streaming)  # type: ignore[return-value]
