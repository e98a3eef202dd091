"""What every script shares around its ``main``: one-line errors, quiet Ctrl-C, honest exit status."""

import argparse
import sys
from collections.abc import Callable

from wav2vec2.errors import UserError


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
    """Run ``main(args)``; an expected error prints one line and exits 1, Ctrl-C exits 130.

    Expected errors are :class:`UserError` and ``OSError`` (a missing file, a full disk). Anything
    else is a defect of the program and keeps its traceback.
    """
    try:
        main(args)
    except (UserError, OSError) as error:
        if args.debug:
            raise
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
