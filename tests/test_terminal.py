"""Any terminal: of another encoding, without color, or none; and input that is refused before any long work."""

import io
import logging
import os
import subprocess
import sys
import warnings
from dataclasses import fields

import pytest

from benchmarks.attack.text import fault
from itda_lens import cli
from itda_lens.cli.options import COMMANDS
from itda_lens.cli.terminal import Terminal
from itda_lens.interpret import explain
from itda_lens.streams.models import check_device
from tests.command_line import fails, run
from tests.conftest import HOOK

HOOKS = [HOOK, "blocks.1.hook_mlp_out"]
HARMFUL = "a\x1b]0;title\x07\u202e\x9b[red]:smile:"
SHOWN = r"a\x1b]0;title\x07\u202e\x9b[red]:smile:"


@pytest.fixture
def saved(built, tmp_path):
    for build, hook in ((b, h) for b in ("a", "b") for h in HOOKS):
        built.save_model(tmp_path / build / hook)
    return tmp_path / "a"


def commands(saved, out) -> dict[str, list[object]]:
    return {
        "build": ["build", "--model", "embedded", "--dataset", "embedded", "--hooks", HOOK, "-k", 4, "--n-atoms", 40,
                  "--tokens", 1000, "--no-progress", "--out", out],
        "eval": ["eval", "--saes", saved / HOOK, "--dataset", "embedded:heldout", "--n-batches", 1, "--batch-size", 2],
        "explain": ["explain", "--itda", saved / HOOK, "--prompt", "Rückgabe «日本語»\n", "--positions", 3, -1],
        "compare": ["compare", "--builds", saved, saved.parent / "b"],
        "diff": ["diff", "--itda", saved / HOOK, "--tuned", "embedded:1", "--dataset", "embedded:heldout", "--tokens",
                 500],
    }  # fmt: skip


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("command", ["build", "eval", "explain", "compare", "diff"])
def test_a_terminal_of_another_encoding_gets_escapes_and_never_an_error(
    command, encoding, saved, tmp_path, monkeypatch
):
    screens = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2)]
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", screens[0])
        patched.setattr(sys, "stderr", screens[1])
        run(*commands(saved, tmp_path / "Ausgänge «é»")[command])
        patched.undo()
    out, err = (screen.buffer.getvalue().decode(encoding) for screen in screens)
    if encoding == "ascii":
        assert out.isascii()
        assert not {*"─│━┃"} & {*out}
    if command in ("eval", "compare", "diff"):
        assert "---" in out or "===" in out, "tables are drawn in ASCII"
    if command == "explain":
        assert ("«" in out) == (encoding == "cp1252")
    if command == "build":
        assert (r"Ausg\xe4nge" if encoding == "ascii" else "Ausgänge") in out
    assert "Error" not in err


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("environment", [C_LOCALE, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "utf-8:strict"}])
def test_a_process_with_another_encoding_prints_all_of_it(environment):
    code = "import itda_lens_cli; itda_lens_cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "explain", "--itda=x", "--prompt=x", "--日本語\udcff\x1b"],
        capture_output=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 2
    last = done.stderr.decode().splitlines()[-1]
    *_, shown = last.split("--")
    assert "Traceback" not in last
    # In the C locale Python itself reads the bytes of an argument one by one.
    assert shown.isascii() == (not any(":strict" in value for value in environment.values()))
    assert shown.endswith(r"\udcff\x1b")


@pytest.mark.parametrize("color", [False, True])
def test_strings_are_printed_as_they_are_whatever_they_are_printed_in(color):
    from rich.table import Table

    screen = io.StringIO()
    console = Terminal(file=screen, width=200, force_terminal=color)
    table = Table(HARMFUL, title=HARMFUL, caption=HARMFUL)
    table.add_row(HARMFUL)
    console.print(HARMFUL, table, style="bold")
    assert fault(screen.getvalue(), SHOWN, tty=color) is None
    assert screen.getvalue().count(SHOWN) == 5
    assert ("\x1b[1m" in screen.getvalue()) == color


def test_a_long_line_is_not_cut(tmp_path, capsys):
    place = tmp_path / ("long " * 40) / "file"
    assert f"{place} holds no SAE" in fails(capsys, "explain", "--itda", place, "--prompt", "x")


def test_warnings_logs_and_unknown_errors_are_plain_text(capsys):
    before = logging.getLogRecordFactory()

    def work() -> None:
        assert warnings.formatwarning(HARMFUL, UserWarning, "a.py", 1) == f"itda-lens: warning: {SHOWN}\n"
        record = logging.getLogRecordFactory()("a", logging.INFO, "a.py", 1, "%s", (HARMFUL,), None)
        assert logging.Formatter().format(record) == SHOWN
        raise LookupError(HARMFUL)

    with pytest.raises(SystemExit) as stopped, cli._ends_in_a_line():
        work()
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert fault(message, f"LookupError: {SHOWN}") is None
    assert "Traceback" in message
    assert logging.getLogRecordFactory() is before


def test_arguments_that_are_not_understood_are_plain_text(capsys):
    message = fails(capsys, "explain", "--itda", "x", "--prompt", "x", f"--{HARMFUL}")
    assert fault(message, SHOWN) is None


# What is refused before any long work.

DEVICES = [
    "cuda",
    "cuda:0",
    "cuda:7",
    "cuda:-1",
    "mps",
    "mps:3",
    "xpu",
    "hpu",
    "meta",
    "xla",
    "nonsense",
    "",
    "0",
    " cpu",
]
EVERY_COMMAND = {
    "quickstart": [],
    "build": ["--model", "m", "--dataset", "d", "--hooks", "h", "--out", "o"],
    "eval": ["--saes", "s", "--dataset", "d"],
    "explain": ["--itda", "i", "--prompt", "p"],
    "compare": ["--models", "a", "b", "--dataset", "d"],
    "diff": ["--itda", "i", "--tuned", "t", "--dataset", "d"],
}


def usable(device: str) -> bool:
    try:
        check_device(device)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_is_not_there_is_refused_first(command, device, capsys):
    if usable(device):
        pytest.skip(f"{device} is there")
    message = fails(capsys, command, *EVERY_COMMAND[command], f"--device={device}")
    assert f"device {device!r} can't be used here: " in message
    assert "Pass cpu" in message


def test_the_devices_that_are_there_can_be_used():
    assert usable("cpu")
    assert usable("cpu:0")


def counts(command: str) -> list[str]:
    other = {"seed", "hook_head_index", "permutations"}
    return [f.name for f in fields(COMMANDS[command]) if f.type in (int, int | None) and f.name not in other]


@pytest.mark.parametrize(("command", "name"), [(c, name) for c in COMMANDS for name in counts(c)])
@pytest.mark.parametrize("value", [0, -1])
def test_a_count_below_one_is_refused_by_name(command, name, value, saved, tmp_path, capsys):
    arguments = commands(saved, tmp_path / "out") | {
        "quickstart": ["quickstart", "--out", tmp_path / "out"],
        "compare": ["compare", "--models", "embedded:0", "embedded:1", "--dataset", "embedded", "--no-progress"],
    }
    option = "-k" if name == "k" else f"--{name.replace('_', '-')}"
    message = fails(capsys, *arguments[command], option, value)
    assert str(value) in message
    assert "Traceback" not in message


@pytest.mark.parametrize("n_terms", [0, -1, -5])
def test_explain_names_at_least_one_atom(n_terms, built, model):
    with pytest.raises(ValueError, match=f"n_terms must be at least 1, got {n_terms}"):
        explain(built, model, "Return the list", n_terms=n_terms)


def test_a_negative_seed_is_refused_before_the_work(saved, capsys):
    arguments = ["compare", "--models", "embedded:0", "embedded:1", "--dataset", "embedded", "--seed", -1]
    assert "seed must be at least 0, got -1" in fails(capsys, *arguments)


def test_half_a_character_in_a_prompt_is_named(built, model):
    with pytest.raises(ValueError, match=r"the prompt holds '\\ud800', half of a character, at 2: leave it out"):
        explain(built, model, "ab\ud800")
