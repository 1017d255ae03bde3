"""The command `itda-lens`.

The options of its sub-commands are dataclasses, in `options`; what a sub-command does is `run` in the module of its
name. That one is imported only when the arguments are read: torch takes seconds.
"""

import importlib
import io
import logging
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from types import MappingProxyType
from typing import Any, NoReturn

from simple_parsing import ArgumentParser, DashVariant

from itda_lens.cli.options import COMMANDS
from itda_lens.cli.terminal import Terminal
from itda_lens.plain_text import printable

INTERRUPTED = 130


def main(arguments: list[str] | None = None, *, load: Callable[[], None] | None = None) -> None:
    """Run the command line. Bad input ends with its message and exit status 2, Ctrl-C with a line and 130.

    Args:
        arguments: those of the process if not given.
        load: called when the arguments are read and before anything is done.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whose encoding may lack what is printed
            stream.reconfigure(errors="backslashreplace")
    name, options = _parse(sys.argv[1:] if arguments is None else arguments)
    with _ends_in_a_line():
        if load is not None:
            load()
        command = importlib.import_module(f"itda_lens.cli.{name}")
        command.run(options, Terminal(width=None if sys.stdout.isatty() else 150))


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage())


def _parse(arguments: list[str]) -> tuple[str, Any]:
    dashes: dict[str, Any] = {"add_option_string_dash_variants": DashVariant.DASH}
    parser = _Parser(prog="itda-lens", description="Dictionaries of real activations for SAELens.")
    parser.add_argument("--version", action="version", version=f"itda-lens {version('itda-lens')}")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    for name, kind in COMMANDS.items():
        summary = (kind.__doc__ or "").split(".")[0]
        command = commands.add_parser(name, help=summary, **dashes)
        if name in arguments:  # reading the sources of all options would take a while
            for option in fields(kind):
                if option.type is bool:  # --no-pack, where simple-parsing would have --nopack
                    option.metadata = MappingProxyType({"custom_args": {"negative_prefix": "--no-"}})
            command.add_arguments(kind, dest="options")
    parsed = parser.parse_args(arguments)
    if parsed.command is None:
        parser.print_help()
        sys.exit(0)
    return parsed.command, parsed.options


@contextmanager
def _ends_in_a_line() -> Iterator[None]:
    formatted, record = warnings.formatwarning, logging.getLogRecordFactory()
    warnings.formatwarning = lambda message, *_, **__: printable(f"itda-lens: warning: {message}\n")
    logging.setLogRecordFactory(_Record)
    try:
        with _ended_as_by_ctrl_c(signal.SIGTERM):
            yield
    except KeyboardInterrupt:
        _say("stopped", INTERRUPTED)
    except (ValueError, RuntimeError, OSError, ImportError) as e:
        _say(f"error: {e}", 2)
    except Exception:
        _say(traceback.format_exc(), 1)
    finally:
        warnings.formatwarning = formatted
        logging.setLogRecordFactory(record)


@contextmanager
def _ended_as_by_ctrl_c(by: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may say so
        yield
        return
    before = signal.signal(by, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(by, before)


def _say(message: str, status: int) -> NoReturn:
    Terminal(stderr=True).print(f"itda-lens: {message}", style="red")
    sys.exit(status)
