"""The exception for errors that a user can mend, and helpers that show text from files: in messages, in Markdown."""

import re
import reprlib
import unicodedata
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """Bad input: a file, an option or a combination of them that cannot work.

    The message is one line that names the file or option, what was found, what was expected and
    what to do. Scripts print it without a traceback and exit with status 1 (see ``cli.run``).
    """


class _ShortRepr(reprlib.Repr):
    """Shows a few entries of a few levels: the contents of a file may be endless, and need not be plain values."""

    def repr_instance(self, x: Any, level: int) -> str:
        plain = x is None or isinstance(x, (bool, float, bytes))
        return repr(x)[:40] if plain else f"<{type(x).__name__}>"

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 512 else "<a number of over 150 digits>"


# An underscore between letters, as in file_name, is none of Markdown's.
_MARKDOWN = re.compile(r"[\\`*\[\]&$~]|(?<![^\W_])_|_(?![^\W_])|^[#+>-]")

_SHORT_REPR = _ShortRepr()
_SHORT_REPR.maxlevel, _SHORT_REPR.maxstring, _SHORT_REPR.maxother = 3, 60, 60


def short_repr(value: Any) -> str:
    """Return ``repr(value)`` on one short line; the contents of tensors and objects are left out."""
    return single_line(_SHORT_REPR.repr(value), 160)


def single_line(text: str, most: int = 200) -> str:
    """Return the first ``most`` characters of ``text`` on one line, as :func:`visible` shows them."""
    return visible(" ".join(text[: 2 * most].split()))[:most]


def visible(text: str, keep: str = "") -> str:
    """Return ``text`` with escapes such as ``\\x1b`` for what steers a terminal, cannot be seen, or is not UTF-8.

    The characters of ``keep`` stay. So do spaces of other widths, and the joiners of Persian, Hindi and emoji.
    """
    keep += "\u200c\u200d"
    return "".join(
        c if c.isprintable() or c in keep or unicodedata.category(c) == "Zs" else ascii(c)[1:-1] for c in text
    )


def markdown(text: str) -> str:
    """Return ``text`` on one line, in which nothing is Markdown or HTML."""
    return _MARKDOWN.sub(r"\\\g<0>", visible(" ".join(text.split()))).replace("<", "&lt;")


def check_utf8(option: str, path: Path) -> None:
    """Refuse a path that is not UTF-8, where a library is to write (TensorBoard, safetensors, onnxruntime)."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(f"{option} {path}: its name is not UTF-8, which libraries cannot write to; rename it") from None


def one_line(error: Exception) -> str:
    """Return the message of an error on one line, or its class if it has none."""
    return single_line(str(error)) or type(error).__name__


def listed(label: str, names: list[str], most: int = 8) -> str:
    """Return ``"9 missing (a, b, ...)"``: the number of names, the label, and the first names."""
    shown = ", ".join(single_line(name, 80) for name in names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names)} {label}" + (f" ({shown})" if names else "")
