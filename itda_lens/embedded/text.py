"""English prose that every Python carries: the language reference and the standard library's docstrings.

Nothing is imported and nothing is shipped: sources are parsed, so that no module's import runs.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from datasets import Dataset, DatasetInfo

Split = Literal["train", "heldout"]

MIN_DOCSTRING_CHARACTERS = 80
MIN_TOTAL_CHARACTERS = 500_000
HELDOUT_PERCENT = 10
_SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__",
}  # fmt: skip


def dataset(split: Split = "train") -> Dataset:
    """The documents of one split, as a dataset with the columns `name` and `text`.

    A document belongs to the held-out split when a hash of its name says so, hence a document that two
    versions of Python share is on the same side in both.

    Raises:
        ValueError: `split` is neither `"train"` nor `"heldout"`.
        RuntimeError: this Python was installed without its sources, so there are no docstrings to read.

    Example:
        >>> sorted(dataset("heldout").column_names)
        ['name', 'text']
    """
    return _split(_documents(), split, "embedded")


def code(split: Split = "train") -> Dataset:
    """Another kind of text: the standard library's functions in Python, without comments and docstrings.

    The embedded models were not trained on it. Columns and splits are those of `dataset`.

    Raises:
        ValueError: `split` is neither `"train"` nor `"heldout"`.
        RuntimeError: this Python was installed without its sources.

    Example:
        >>> "def " in code("heldout")["text"][0]
        True
    """
    return _split(_functions(), split, "embedded-code")


def _split(documents: tuple[tuple[str, str], ...], split: str, name: str) -> Dataset:
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    chosen = [(title, text) for title, text in documents if is_heldout(title) == (split == "heldout")]
    columns = {"name": [title for title, _ in chosen], "text": [text for _, text in chosen]}
    return Dataset.from_dict(columns, info=DatasetInfo(dataset_name=f"{name}:{split}"))


def is_heldout(name: str) -> bool:
    """Whether the document of this name is held out: a property of the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < HELDOUT_PERCENT


@cache
def _documents() -> tuple[tuple[str, str], ...]:
    return _shuffled([*_topics(), *_docstrings()], "documentation")


@cache
def _functions() -> tuple[tuple[str, str], ...]:
    return _shuffled(list(_bodies()), "code")


def _shuffled(documents: list[tuple[str, str]], what: str) -> tuple[tuple[str, str], ...]:
    # Sorted by a hash so that neighbours in the stream are not neighbours in the manual.
    documents = sorted(documents, key=lambda document: hashlib.sha256(document[0].encode()).digest())
    total = sum(len(text) for _, text in documents)
    if total < MIN_TOTAL_CHARACTERS:
        raise RuntimeError(
            f"only {total:,} characters of {what} were found in this Python's standard library, "
            f"{MIN_TOTAL_CHARACTERS:,} are needed: it seems to be installed without its sources or documentation. "
            "Use a Python that has them, or pass a dataset of your own."
        )
    return tuple(documents)


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    yield from ((f"topics/{name}", text) for name, text in topics.items())


def _modules() -> Iterator[tuple[str, ast.Module]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in library.rglob("*.py"):
        relative = path.relative_to(library)
        if _SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        yield ".".join(relative.with_suffix("").parts), tree


def _docstrings() -> Iterator[tuple[str, str]]:
    for name, tree in _modules():
        yield from _docstrings_below(tree, name)


def _bodies() -> Iterator[tuple[str, str]]:
    for name, tree in _modules():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                if ast.get_docstring(node) is not None:
                    node.body = node.body[1:] or [ast.Pass()]
                if len(text := ast.unparse(node)) >= MIN_DOCSTRING_CHARACTERS:
                    yield f"{name}.{node.name}", text


def _docstrings_below(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text is not None and len(text) >= MIN_DOCSTRING_CHARACTERS:
            yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings_below(child, f"{name}.{child.name}")
