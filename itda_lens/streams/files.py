"""Text in local files: one, those that a pattern matches, or a folder of them."""

import glob
import gzip
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

_READERS = {
    ".txt": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
}
# A document that reads "NA" or "None" is no missing value.
_OPTIONS: dict[str, dict[str, Any]] = {
    "csv": {"keep_default_na": False},
    "tsv": {"keep_default_na": False, "sep": "\t"},
}
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")


def is_local(source: str) -> bool:
    """Whether a name means a file, a folder or a pattern, be it there or not; else it is one of the hub."""
    return (
        Path(source).expanduser().exists()
        or source.startswith((".", "/", "~"))
        or glob.has_magic(source)
        or _ending(Path(source)) in _READERS
    )


def open_files(source: str, config: str | None, streaming: bool) -> Dataset | IterableDataset | Mapping[Any, Any]:
    """The rows of a file, of the files that a pattern matches, or of a folder; several splits by name.

    Raises:
        ValueError: nothing is there, the files are of unknown or of several kinds, or can't be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if any((path / name).exists() for name in _SAVED):
            return load_from_disk(str(path))
        return _folder(path, config, streaming)
    if path.is_file():
        return _read([path], streaming=False)
    root = Path(path.anchor)
    files = sorted(file for file in root.glob(str(path.relative_to(root))) if file.is_file())
    if not files:
        raise ValueError(f"there is no file or folder {source}")
    return _read(files, streaming)


def _folder(path: Path, config: str | None, streaming: bool) -> Any:
    files = sorted(file for file in path.rglob("*") if _ending(file) in _READERS)
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    files = [file for file in files if file.suffix != ".md"] or files  # a README beside the data
    if not files:
        raise ValueError(
            f"{path} is a folder without files that end in {', '.join(_READERS)}, and not one that datasets' "
            "save_to_disk has written"
        )
    reader = _reader(files) if config is None else None
    if files[0].suffix == ".md":
        return _read(files, streaming)
    try:
        # It tells splits by the names of files.
        if reader != "text":
            return load_dataset(str(path), name=config, streaming=streaming, trust_remote_code=False)
        splits: Any = load_dataset(str(path), sample_by="document", streaming=True, trust_remote_code=False)
        return {name: _texts(row["text"] for row in rows) for name, rows in splits.items()}
    except DatasetGenerationError as e:
        raise ValueError(f"{path} can't be read: {e.__cause__ or e}") from e


def _read(files: list[Path], streaming: bool) -> Dataset | IterableDataset:
    reader = _reader(files)
    if reader == "text":
        return _texts(_content(file) for file in files)
    names, builder = [str(file) for file in files], "csv" if reader == "tsv" else reader
    try:
        return load_dataset(builder, data_files=names, split="train", streaming=streaming, **_OPTIONS.get(reader, {}))
    except DatasetGenerationError as e:
        raise ValueError(f"{names[0]} can't be read: {e.__cause__ or e}") from e


def _reader(files: list[Path]) -> str:
    for file in files:
        if _ending(file) not in _READERS:
            raise ValueError(
                f"{file} has the ending {file.suffix!r}: {', '.join(_READERS)} can be read, and .gz of these"
            )
    readers = {_READERS[_ending(file)] for file in files}
    if len(readers) > 1:
        folder, endings = files[0].parent, sorted({_ending(file) for file in files})
        raise ValueError(
            f"{folder} holds files of several kinds ({', '.join(endings)}), and is none that datasets' save_to_disk "
            f"has written: name one kind, such as {folder}/*{endings[0]}"
        )
    return readers.pop()


def _content(file: Path) -> str:
    try:
        with gzip.open(file, "rt", encoding="utf8") if file.suffix == ".gz" else file.open(encoding="utf8") as text:
            return text.read()
    except UnicodeDecodeError as e:
        raise ValueError(f"{file} is not UTF-8: {e}") from e


def _texts(contents: Iterable[str]) -> Dataset:
    """Documents are paragraphs."""
    paragraphs = (text for content in contents for text in re.split(r"\n\s*\n", content.removeprefix("\ufeff")))
    return Dataset.from_dict({"text": [text for text in paragraphs if text.strip()]})


def _ending(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
