"""Writing what was found: whether it can be is seen before any long work, and nothing is lost after it."""

import contextlib
import csv
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from safetensors import SafetensorError

from itda_lens.plain_text import spreadsheet

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_ROOM = 1 << 20
"""Bytes of room that any output takes."""


class Written(NamedTuple):
    """Where things lie now, by where they should, and what went wrong, a line each."""

    places: dict[Path, Path]
    problems: list[str]

    def check(self) -> None:
        """Raise an OSError where something went wrong."""
        if self.problems:
            raise OSError("\n".join(self.problems))


def check_file(path: Path | None) -> None:
    """Raise a ValueError where a file, if one is given, can't be written."""
    if path is not None:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name a file")
        _check_writable(path)


def check_folder(path: Path) -> None:
    """Raise a ValueError where a folder can't be made, or files in it."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name a folder")
    try:
        str(path).encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{path} is not UTF-8, and safetensors reads no such path: name another folder") from e
    _check_writable(path)


def check_room(path: Path, size: int) -> None:
    """Raise a ValueError where less than `size` bytes are left for a file or folder."""
    free = shutil.disk_usage(_existing(path)).free
    if free < size:
        raise ValueError(
            f"{path} takes about {size / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are left there: free some, or name "
            "another place"
        )


def write_all(writes: Mapping[Path, Callable[[Path], object]]) -> Written:
    """Write each thing to its path, or to a temporary folder if that fails; one that fails stops none of the others.

    Ctrl-C is held off meanwhile.
    """
    written = Written({}, [])
    with _held_off():
        for path, write in writes.items():
            try:
                write(path)
                written.places[path] = path
            except (OSError, SafetensorError) as e:
                place = _elsewhere(path, write)
                where = "and nowhere else either: it is lost" if place is None else f"it is in {place}"
                written.problems.append(f"{path} could not be written ({e}): {where}")
                if place is not None:
                    written.places[path] = place
    return written


def write_csv(table: pd.DataFrame, path: Path, *, index: bool = True) -> None:
    """Write a table so that at any time the whole of it, or of the one before, is there. All text in it is quoted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = table.select_dtypes(exclude="number")
    guarded = table.assign(**{str(column): texts[column].map(_cell) for column in texts}).rename(index=_cell)
    special = path.exists() and not path.is_file()  # such as /dev/stdout
    beside = path if special else path.resolve().with_name(path.name + ".part")
    try:
        guarded.to_csv(beside, index=index, quoting=csv.QUOTE_NONNUMERIC, errors="backslashreplace")
        if not special:
            beside.replace(path.resolve())
    finally:
        if not special:
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folders: Iterable[Path]) -> Iterator[None]:
    """Raise a ValueError where another process writes to one of these folders; a dead one holds nothing."""
    with contextlib.ExitStack() as stack:
        for folder in dict.fromkeys(folders):
            stack.enter_context(_locked(folder))
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    while True:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"{folder} is being written by another process: wait until it has ended, or name another --out"
                ) from None
            except OSError:  # a file system without locks
                pass
            # Whoever held the lock has removed the file by now, if it is not this one.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


def _check_writable(path: Path) -> None:
    there = _existing(path)
    folder = there.parent if there == path and not there.is_dir() else there
    if not folder.is_dir():
        raise ValueError(f"{path} can't be written: {there} is no folder")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{path} can't be written: it is read-only")
    if path.exists() and not path.is_dir() and not path.is_file():
        return
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise ValueError(f"{path} can't be written: {folder} takes no files ({e.strerror})") from e
    check_room(path, _ROOM)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def _elsewhere(path: Path, write: Callable[[Path], object]) -> Path | None:
    for root in (tempfile.gettempdir(), Path.home(), "/dev/shm"):
        with contextlib.suppress(OSError, SafetensorError):
            folder = Path(tempfile.mkdtemp(prefix="itda-lens-", dir=root))
            try:
                write(folder / path.name)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            return folder / path.name
    return None


def _cell(value: object) -> object:
    return spreadsheet(value).replace("\0", r"\x00") if isinstance(value, str) else value


@contextlib.contextmanager
def _held_off() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
