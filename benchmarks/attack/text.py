"""Text of others as prompt, token and name, through all that prints or writes it: it may only ever be text.

What is printed by each sub-command, with and without a terminal, may hold no control, format or surrogate character;
the page of the hub, as a Markdown library reads it, has the structure of one with harmless names; a spreadsheet gets
the same text, and no formula. In all of them the text has to be there, as it is or with escapes.
"""

import ast
import csv
import io
import itertools
import json
import os
import re
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
import yaml
from markdown_it import MarkdownIt

from benchmarks.attack.injections import INJECTIONS
from itda_lens import ITDA, BuildConfig, Provenance, build, cli, embedded
from itda_lens.cli import saving
from itda_lens.hub import readme
from itda_lens.plain_text import one_line, printable

HOOKS = ("blocks.2.hook_resid_post", "blocks.3.hook_resid_post")
_BUILD = ["--model", "embedded", "-k", 4, "--n-atoms", 40, "--tokens", 1000, "--no-progress", "--hooks", HOOKS[0]]
_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_LIVE = re.compile(r"\x1b\[\?25[lh]|\x1b\[\d*[AK]|\r")
_PROGRESS = re.compile(r"\r[^\r\n]*(?:\d+%\||\d+ examples)[^\r\n]*")
_ENCODINGS = ("ascii", "cp1252")
_SHOWN = 40
"""Of a longer prompt the end is shown."""


def run(scale: float, seed: int) -> list[dict[str, Any]]:
    """Every string through every surface at scale 1; a share of the strings below it."""
    names = list(INJECTIONS)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {names[i]: INJECTIONS[names[i]] for i in sorted(order[: max(1, round(scale * len(names)))])}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"TERM": "xterm-256color"}):
        attacks = _Attacks(Path(folder))
        rows = []
        for surface in (
            attacks.explain_atoms,
            attacks.explain_prompt,
            attacks.other_encodings,
            attacks.names_in_messages,
            attacks.arguments,
            attacks.build,
            attacks.eval,
            attacks.compare,
            attacks.diff,
            attacks.page,
            attacks.spreadsheet,
        ):
            tried, failed = 0, []
            for name, text in chosen.items():
                try:
                    found = [*surface(text)]
                except AssertionError as e:
                    found = [str(e)]
                tried += len(found)
                failed += [f"{name}: {fault}" for fault in found if fault is not None]
            about = (surface.__doc__ or "").strip().rstrip(".")
            rows.append({"surface": about, "strings": len(chosen), "outputs": tried, "got through": len(failed)})
            rows[-1]["first of them"] = failed[0] if failed else ""
    return rows


class _Attacks:
    """Each method puts a text through one surface, and gives for each output what is wrong with it, or None."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = embedded.model()
        config = BuildConfig(k=4, n_atoms=40, tokens=1000, progress=False)
        self.itdas = build(self.model, embedded.dataset(), HOOKS, config)
        self._count = itertools.count()

    def explain_atoms(self, text: str) -> Iterator[str | None]:
        """explain: the prompts of the atoms."""
        where = self._saved(text)
        for tty in (False, True):
            output = printed("explain", f"--itda={where}", "--prompt", "Return the list", tty=tty)
            yield fault(output, one_line(text)[-_SHOWN:], tty=tty)

    def explain_prompt(self, text: str) -> Iterator[str | None]:
        """explain: the prompt and its tokens."""
        where = self._saved("a")
        tokens = self.model.to_tokens(_encodable(text), truncate=False).shape[1]
        fails = tokens > self.model.cfg.n_ctx or text != _encodable(text)
        arguments = ["explain", f"--itda={where}", f"--prompt={text}", "--positions", *range(min(tokens, 12))]
        for tty in (False, True):
            yield fault(printed(*arguments, tty=tty, fails=fails), tty=tty)

    def other_encodings(self, text: str) -> Iterator[str | None]:
        """explain: the prompts of the atoms, on terminals of other encodings."""
        where = self._saved(text)
        for encoding in _ENCODINGS:
            output = printed("explain", f"--itda={where}", "--prompt", "Return the list", encoding=encoding)
            shown = one_line(text).encode(encoding, "backslashreplace").decode(encoding)[-_SHOWN:]
            yield fault(output, shown) or (None if encoding != "ascii" or output.isascii() else "not ASCII")

    def names_in_messages(self, text: str) -> Iterator[str | None]:
        """messages: names of models, hook points, data sets, folders and devices."""
        there = self._saved("a")
        hook, model = self._saved("a", hook_name=text), self._saved("a", model_name=text, model_path=None)
        prompt = ["--prompt", "Return"]
        for arguments in (
            ["explain", f"--itda={hook}", *prompt],
            ["explain", f"--itda={model}", *prompt],
            ["explain", f"--itda={there}", *prompt, f"--model={text}"],
            ["explain", f"--itda={self.folder / 'no'}{text}", *prompt],
            ["explain", f"--itda={there}", *prompt, f"--device={text}"],
            ["eval", f"--saes={there}", f"--dataset={text}.txt"],
            ["diff", f"--itda={there}", f"--tuned={text}", "--dataset=embedded:heldout"],
            ["compare", "--models", "embedded", f"./{text}", "--dataset=embedded"],
            ["build", f"--model={text}", "--dataset=embedded", "--hooks", HOOKS[0], f"--out={self.folder / 'out'}"],
            ["build", *_BUILD[:-1], f"blocks.{text}", "--dataset=embedded", f"--out={self.folder / 'out'}"],
        ):
            yield fault(printed(*arguments, fails=True))

    def arguments(self, text: str) -> Iterator[str | None]:
        """messages: options that there are not."""
        yield fault(printed("explain", "--itda", "x", "--prompt", "x", f"--no{text}", fails=True))
        yield fault(printed("build", f"--loss={text}", fails=True))

    def build(self, text: str) -> Iterator[str | None]:
        """build: the folder and the name of the data set."""
        out = self._folder(text)
        if out is not None:
            output = printed("build", *_BUILD, "--dataset=embedded", f"--dataset-name={text}", f"--out={out}")
            yield fault(output, printable(str(out / HOOKS[0])))
            itda = ITDA.load_from_disk(out / HOOKS[0])
            yield None if itda.cfg.metadata.dataset_path == (text or "embedded") else "another name was saved"

    def eval(self, text: str) -> Iterator[str | None]:
        """eval: the folder's name, in the table and the CSV."""
        where = self._folder(text)
        if where is not None:
            self.itdas[HOOKS[0]].save_model(where)
            for tty in (False, True):
                table = self.folder / "table.csv"
                arguments = ["eval", f"--saes={where}", "--dataset", "embedded:heldout", "--n-batches", 1]
                output = printed(*arguments, "--batch-size", 1, f"--csv={table}", tty=tty)
                yield fault(output, one_line(str(where)[-40:])[:12], tty=tty)
                yield cell_fault(table, [str(where)])

    def compare(self, text: str) -> Iterator[str | None]:
        """compare: the folders' names, in the CSV and the notes."""
        folders = [self._folder(text), self._folder(text)]
        if folders[0] is not None and folders[1] is not None:
            for folder, (hook, itda) in itertools.product(folders, self.itdas.items()):
                itda.save_model(folder / hook)
            table = self.folder / "cells.csv"
            yield fault(printed("compare", "--builds", *folders, f"--csv={table}"))
            yield cell_fault(table, [str(folder) for folder in folders])

    def diff(self, text: str) -> Iterator[str | None]:
        """diff: the text of the data set, in the tables and the CSVs."""
        there, data, out = self._saved(text), self.folder / "probe.jsonl", self.folder / "diff"
        rows = [text, *(f"{text} {i}" for i in range(30))]
        data.write_text("".join(json.dumps({"text": _encodable(row)}) + "\n" for row in rows))
        arguments = ["diff", f"--itda={there}", "--tuned=embedded:1", f"--dataset={data}", "--tokens=300"]
        yield fault(printed(*arguments, f"--out={out}", fails=None))  # prompts that no tokenizer gives are refused
        for path in out.glob("*.csv"):
            yield cell_fault(path, [])

    def page(self, text: str) -> Iterator[str | None]:
        """hub's page: names of models, hook points, data sets and the repository, and prompts."""
        page, harmless = (
            readme({name: self._named(name), "b": self._named(name)}, f"someone/{name}") for name in (text, "a")
        )
        yield page_fault(page, harmless, text)

    def spreadsheet(self, text: str) -> Iterator[str | None]:
        """CSV: a text in the index, in a column of texts and in one of all kinds."""
        path = self.folder / "cells.csv"
        text = text.encode("utf8", "backslashreplace").decode()  # pandas takes no lone surrogates
        table = pd.DataFrame({"text": pd.Series([text], dtype=object), "mixed": [text], "n": [-1.5]}, index=[text])
        saving.write_csv(table, path)
        yield cell_fault(path, [text])

    def _named(self, text: str) -> ITDA:
        itda = next(iter(self.itdas.values())).with_k(4)
        metadata = {"model_name": text, "hook_name": text, "dataset_path": text, "itda_build": {"tokens_judged": text}}
        for key, value in metadata.items():
            itda.cfg.metadata[key] = value
        itda.provenance = _provenance(text)
        return itda

    def _saved(self, text: str, **metadata: str | None) -> Path:
        itda = self.itdas[HOOKS[0]].with_k(4)
        itda.provenance = _provenance(text)
        for key, value in metadata.items():
            itda.cfg.metadata[key] = value
        where = self.folder / str(next(self._count))
        itda.save_model(where)
        return where

    def _folder(self, text: str) -> Path | None:
        """A new folder of this name, where a file system takes it."""
        folder = self.folder / str(next(self._count)) / re.sub("[/\0]", "_", text)
        try:
            text.encode()
            folder.mkdir(parents=True)
        except (OSError, UnicodeEncodeError):
            return None
        return folder


class _Screen(io.TextIOWrapper):
    def __init__(self, encoding: str, tty: bool):
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty


def printed(*arguments: object, tty: bool = False, encoding: str = "utf-8", fails: bool | None = False) -> str:
    """All that the command line prints, of any kind; with `fails=None` it may end with an error, which is no fault."""
    screens = _Screen(encoding, tty), _Screen(encoding, tty)
    status: Any = 0
    with mock.patch.multiple(sys, stdout=screens[0], stderr=screens[1]):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as e:
            status = e.code
    out, err = (screen.buffer.getvalue().decode(encoding) for screen in screens)  # type: ignore[reportAttributeAccessIssue]
    assert status in {None: (0, 2), True: (2,), False: (0,)}[fails], f"{arguments} ended with {status}: {err}"
    return out + _PROGRESS.sub("", err)


def fault(output: str, expected: str = "", *, tty: bool = False) -> str | None:
    """What is wrong with what was printed: a character on which a terminal acts, or that a text is not there."""
    plain = _LIVE.sub("", _STYLE.sub("", output)) if tty else output
    for character in plain:
        if character != "\n" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            return f"{character!r} was printed"
    return None if _solid(expected) in _solid(plain) else "the text was changed"


def cell_fault(path: Path, texts: list[str]) -> str | None:
    """What is wrong with a CSV file: a formula, or a text that is not there."""
    with path.open(newline="", encoding="utf8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    for cell in cells:
        if re.match(r"[\t\r\n]|\s*[=+\-@＝＋－＠]", cell) and not re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", cell):  # noqa: RUF001
            return f"{cell[:20]!r} is a formula"
    for text in texts:
        meant = text.replace("\0", r"\x00")
        if not {meant, f"'{meant}"} & set(cells):
            return "the text was changed"
    return None


def page_fault(page: str, harmless: str, text: str) -> str | None:
    """What is wrong with a page: other structure than that of one with harmless names, or a text that is not there."""
    (front, body), (front_meant, body_meant) = (p.removeprefix("---\n").split("\n---\n", 1) for p in (page, harmless))
    if yaml.safe_load(front) != yaml.safe_load(front_meant) or "library_name" not in yaml.safe_load(front):
        return "another front matter"
    (shape, spans, code), (meant, _, _) = _read(body), _read(body_meant)
    if shape != meant:
        return "another structure"
    loaded = ast.parse(code).body[-1].value  # type: ignore[reportAttributeAccessIssue]
    if [ast.literal_eval(argument) for argument in loaded.args] != [f"someone/{text}", text]:
        return "other code"
    literal = one_line(text).replace("|", r"\x7c")
    return None if spans.count(literal) >= 9 and _unseen(page) is None else "the text was changed"


def _read(body: str) -> tuple[list[str], list[str], str]:
    """The kinds of all parts of a page in order, its literal texts, and its code."""
    reader: Callable[[str], Any] = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse
    shape, spans, code = [], [], ""
    for block in reader(body):
        shape.append(block.type)
        code = block.content if block.type == "fence" else code
        for part in block.children or []:
            shape.append(part.type)
            if part.type == "code_inline":
                spans.append(part.content)
    return shape, spans, code


def _unseen(page: str) -> str | None:
    return next((c for c in page if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")), None)


def _provenance(text: str) -> Provenance:
    places = torch.arange(40)
    return Provenance(places, torch.zeros_like(places), {}, ((text, text),) * 40)


def _encodable(text: str) -> str:
    return text.encode("utf8", "replace").decode()


def _solid(text: str) -> str:
    return re.sub(r"[\s|]", "", text)  # tables break long lines
