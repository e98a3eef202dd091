"""Shared by every script around its ``main``: one-line errors, quiet Ctrl-C, honest exit status, progress."""

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from tqdm import tqdm

from wav2vec2.files.errors import UserError, visible
from wav2vec2.threads import choose_waiting

choose_waiting()  # every script imports this module before torch

# Seconds between the lines of a progress bar in a log file.
LOG_SECONDS = 30.0


class Interrupted(Exception):
    """A run stopped because the signal ``signum`` asked for it; all its processes raise this together."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class AllProcessesError(UserError):
    """An error that all processes of a run raise together, so that the first one can speak for all."""


class _VisibleOutput:
    """A stream that shows what would steer the terminal: text from files is part of what scripts print."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(visible(text, keep="\n\t"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults that say something and keeps the line breaks of the commands in the script's docstring."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with the script's docstring as its description and the shared ``--debug``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run ``main(args)``; an expected error prints one line and exits 1.

    Expected errors are :class:`UserError` and ``OSError`` (a missing file, a full disk). Anything
    else is a defect of the program and keeps its traceback. A signal exits 128 plus its number, as shells count.
    """
    # The terminal's encoding need not have all of Unicode: printing a file name must not end a run.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    if os.getpid() == 1:  # of a container: there the kernel leaves out what SIGTERM does by default
        signal.signal(signal.SIGTERM, lambda signum, _: os._exit(128 + signum))
    try:
        with contextlib.redirect_stdout(_VisibleOutput(sys.stdout)):
            main(args)
    except Interrupted as stop:
        print(visible(str(stop)), file=sys.stderr)
        sys.exit(128 + stop.signum)
    except (UserError, OSError) as error:
        if args.debug:
            raise
        print("error: " + visible(" ".join(str(error).split())), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def print_line(message: str) -> None:
    """Print a line on stderr without breaking a progress bar."""
    tqdm.write(visible(message), file=sys.stderr)
    sys.stderr.flush()


def progress(items: Iterable | None, desc: str, **options: Any) -> tqdm:
    """Make a bar on stderr: it moves on a terminal; a log file gets a line now and then, and nothing of a short wait.

    The bar goes over ``items``; with None it is moved by hand. ``options`` are those of ``tqdm``.
    """
    desc = visible(desc)
    if sys.stderr.isatty():
        return tqdm(items, desc, dynamic_ncols=True, **options)
    # tqdm's own thread would write a line at least every maxinterval.
    seldom = dict.fromkeys(("mininterval", "maxinterval", "delay"), LOG_SECONDS)
    return tqdm(items, desc, file=_Lines(), **{**seldom, **options})


class _Lines:
    """Writes a line to stderr where a bar would be drawn over."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()
